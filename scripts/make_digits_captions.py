"""Make the encoders of a small text-to-image pipeline, for digits with captions such as "a handwritten three".

    python scripts/make_digits_captions.py --output FOLDER      # minutes on one core

Writes what assets/digits_captions/ holds: a Stable Diffusion pipeline's folder without unet/, which pretrain.py trains.
The autoencoder turns scikit-learn's 8×8 digits into latents of shape (4, 4, 4); the text encoder is drawn at random and
stays so: it tells the captions apart, which is all that ten of them need. The same torch on the same kind of machine
makes the same folder again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deme.data.opening import DIGIT_CAPTIONS as CAPTIONS
from deme.errors import UserError
from deme.job.command import ended_in_one_line
from deme.job.files import atomic_folder, make_folder

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

SEED = 0

HELD_OUT = 359  # images, a fifth, that the autoencoder is measured on
STEPS = 3000
BATCH_SIZE = 64
LEARNING_RATE = 5e-3  # at the peak of its one cycle
KL_WEIGHT = 1e-4  # per latent, beside the mean squared error per pixel: at 1e-3 two channels of four carry noise only

MAX_TOKENS = 77  # as CLIP's
SPREAD = 2.0  # of the random weights, in units of CLIP's: at 1 the sequences of two captions are more alike


def main(output: Path) -> None:
    """Train the autoencoder, draw the text encoder, and write the folder."""
    import diffusers
    import torch

    if output.exists():
        raise UserError(f"--output={output}: exists already")
    make_folder(output.parent, "--output")
    torch.set_num_threads(1)  # more would change the order of sums, and gain nothing on networks this small
    torch.manual_seed(SEED)

    # --- images in [−1, 1], and the autoencoder
    images, held_out = load_images()
    vae = train_autoencoder(images)
    vae.register_to_config(scaling_factor=latent_scaling(vae, images))
    error = reconstruction_error(vae, held_out)
    print(f"autoencoder: {vae.num_parameters():,} parameters, scaling factor {vae.config.scaling_factor}")
    print(f"reconstruction: RMSE {error:.1f} of 255 on {len(held_out)} held-out images, whose 17 levels lie 16 apart")

    # --- captions
    torch.manual_seed(SEED)  # again, so that the text encoder does not depend on how the autoencoder was trained
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(tokenizer)
    token, sequence = caption_distances(tokenizer, text_encoder)
    print(f"text encoder: {text_encoder.num_parameters():,} parameters, {len(tokenizer)} tokens")
    print(f"closest captions: {token:.2f} of the norm apart in the pooled output, {sequence:.2f} in the whole sequence")

    # --- Stable Diffusion's noise schedule, and the folder
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    with atomic_folder(output) as temporary:
        for name, part in parts.items():
            part.save_pretrained(temporary / name)
        write_index(temporary, parts)
        check_written(temporary, parts)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"wrote {output}: {size / 1e6:.2f} MB")


def load_images() -> tuple["torch.Tensor", "torch.Tensor"]:
    """The digits to train on and the held-out ones: float32 in [−1, 1], shape (N, 1, 8, 8)."""
    from deme.config.sections import Data
    from deme.data.examples import load_training_images
    from deme.data.opening import open_source

    split = load_training_images(
        open_source(Data(name="digits", resolution=8, held_out_images=HELD_OUT)), 1, Path("unused")
    )
    images, held_out = (part.batch(range(len(part))).contiguous().float() / 127.5 - 1 for part in split)
    return images, held_out


def train_autoencoder(images: "torch.Tensor") -> "AutoencoderKL":
    """An autoencoder with latents of shape (4, H/2, W/2), trained as latent diffusion's, without its adversary.

    Args:
        images: shape (N, 1, H, W), in [−1, 1].
    """
    import torch
    from diffusers import AutoencoderKL
    from tqdm import trange

    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=images.shape[-1],
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in trange(STEPS, desc="autoencoder", mininterval=1):
        batch = images[torch.randint(len(images), (BATCH_SIZE,))]
        posterior = vae.encode(batch).latent_dist
        latents = posterior.sample()
        divergence = posterior.kl().sum() / latents.numel()
        loss = torch.nn.functional.mse_loss(vae.decode(latents).sample, batch) + KL_WEIGHT * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return vae.eval()


def latent_scaling(vae: "AutoencoderKL", images: "torch.Tensor") -> float:
    """1 / the standard deviation of all latents of the images (N, 1, H, W), to 5 digits (Rombach et al., section 3)."""
    import torch

    with torch.no_grad():
        return round(1 / vae.encode(images).latent_dist.sample().std().item(), 5)


def reconstruction_error(vae: "AutoencoderKL", images: "torch.Tensor") -> float:
    """The RMSE of images (N, 1, H, W) after encoding and decoding, in levels of 0 … 255; the latents are samples."""
    import torch

    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.sample()).sample.clamp(-1, 1)
    return (decoded - images).square().mean().sqrt().item() * 127.5


def make_tokenizer() -> "CLIPTokenizer":
    """CLIP's tokenizer, whose merges make a token of each word of the captions; other text is read in short pieces."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    vocabulary = dict.fromkeys([*symbols, *(f"{symbol}</w>" for symbol in symbols)])  # a set that keeps its order
    merges = {}
    for word in dict.fromkeys(" ".join(CAPTIONS).split()):
        left, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for right in rest:
            merges[left, right] = None
            left += right
            vocabulary[left] = None
    vocabulary |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    numbers = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbers, merges=list(merges), model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer: "CLIPTokenizer") -> "CLIPTextModel":
    """A CLIP text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        initializer_factor=SPREAD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def caption_distances(tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel") -> tuple[float, float]:
    """How far apart the two closest of the captions and "" are, in units of the outputs' mean norm.

    Returns:
        of the pooled outputs, shape (11, width), and of the sequences, shape (11, MAX_TOKENS × width).
    """
    import torch

    texts = ["", *CAPTIONS]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        output = text_encoder(tokens)

    def closest(vectors: torch.Tensor) -> float:
        return (torch.pdist(vectors).min() / vectors.norm(dim=1).mean()).item()

    return closest(output.pooler_output), closest(output.last_hidden_state.flatten(1))


def write_index(folder: Path, parts: dict) -> None:
    """Write model_index.json, as StableDiffusionPipeline has it, with the unet/ that is to come."""
    import diffusers

    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    for name, part in parts.items():
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    content = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model_index.json").write_text(content, encoding="utf-8")


def check_written(folder: Path, parts: dict) -> None:
    """Read every part back from a folder, and compare it with what was written."""
    import torch

    read = {name: type(part).from_pretrained(folder / name) for name, part in parts.items()}
    for name in ("vae", "text_encoder"):
        tensors, written = read[name].state_dict(), parts[name].state_dict()
        assert tensors.keys() == written.keys(), name
        assert all(torch.equal(tensors[key], written[key]) for key in written), name
    assert read["vae"].config.scaling_factor == parts["vae"].config.scaling_factor
    assert public(read["scheduler"].config) == public(parts["scheduler"].config)

    texts = ["", *CAPTIONS, "Some other text, 42"]
    assert read["tokenizer"](texts).input_ids == parts["tokenizer"](texts).input_ids
    assert read["tokenizer"].model_max_length == MAX_TOKENS
    for caption in CAPTIONS:
        assert len(read["tokenizer"].tokenize(caption)) == len(caption.split()), caption


def public(config: dict) -> dict:
    """A diffusers configuration's values, without what diffusers notes about how it came to them."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the folder to write")
    arguments = parser.parse_args()
    with ended_in_one_line(parser.prog):
        main(arguments.output)
