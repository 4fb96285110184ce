"""Between images and what a network works on: pixels, or latents and text. Nothing else knows the difference."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional

from deme.errors import RunError, UserError
from deme.models.denoisers import AUTOCAST_TYPES, memory_format

CHANNELS = (1, 3)  # of images: grayscale and RGB
CODED_AT_ONCE = 4  # images: a VAE takes many times a UNet's memory for each
T5, GEMMA = "T5EncoderModel", "Gemma2Model"
LENGTHS = {T5: 256, GEMMA: 300}  # tokens, as diffusers' pipelines take by default; both overflow in fp16
Condition = dict[str, torch.Tensor]  # a network's further arguments, by name


class Captioned(NamedTuple):
    """Images with a caption or a label each."""

    pixels: torch.Tensor  # uint8, shape (B, C, H, W)
    captions: list[str | int]  # an empty one stands for no label, too
    sizes: torch.Tensor | None = None  # of the crops, as `CroppedImages.crops` gives them, shape (B, 6)


class Encoded(NamedTuple):
    """Captioned images that were encoded before."""

    moments: torch.Tensor  # mean and log variance of the VAE's posterior, shape (B, 2 · latent channels, h, w)
    embeddings: torch.Tensor  # of the captions, shape (B, tokens, D), as the encoder's `embed` gives them
    sizes: torch.Tensor | None = None  # of the crops, shape (B, 6)


def to_unit_range(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images (B, C, H, W) to [−1, 1] on the device, same shape, in its memory format, without waiting for it."""
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    pixels = pixels.to(device, non_blocking=True, memory_format=memory_format(device))
    return pixels.float().div_(127.5).sub_(1)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [−1, 1] (B, C, H, W) to uint8 on the CPU, clipped."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


class Pixels:
    """Images in [−1, 1], grayscale or RGB, without a condition."""

    takes_text, takes_sizes, classes = False, False, 0  # the number of labels that the network takes
    decode = staticmethod(to_bytes)

    def __init__(self, channels: int):
        if channels not in CHANNELS:
            raise UserError(f"in_channels={channels}: images have 1 or 3 channels")
        self.channels = self.image_channels = channels
        self.device = torch.device("cpu")

    def prepare(self, device: torch.device, mixed_precision: str) -> None:
        """Set the device and the type."""
        self.device = device

    def rest(self) -> None:
        """Free the device's memory; here there is nothing to free."""

    def encode(self, examples: torch.Tensor) -> tuple[torch.Tensor, Condition]:
        """uint8 images (B, C, H, W) to [−1, 1] on the device, same shape, and no condition."""
        return to_unit_range(examples, self.device), {}

    def condition(self, texts: Sequence[str]) -> Condition:
        """No condition."""
        return {}

    def negative(self, texts: Sequence[str]) -> Condition:
        """The same for what guidance leads away from."""
        return self.condition(texts)


class LabelledPixels(Pixels):
    """The same with a label each."""

    def __init__(self, channels: int, classes: int):
        super().__init__(channels)
        self.classes = classes

    def encode(self, examples: Captioned) -> tuple[torch.Tensor, Condition]:
        """uint8 images (B, C, H, W) to [−1, 1] on the device, same shape, and the labels."""
        return to_unit_range(examples.pixels, self.device), self.condition(examples.captions)

    def condition(self, texts: Sequence[str | int]) -> Condition:
        """The network's further argument for these labels, shape (B,)."""
        return {"class_labels": as_labels(texts, self.classes, self.device)}


def as_labels(labels: Sequence[str | int], classes: int, device: torch.device) -> torch.Tensor:
    """Labels as a network takes them: int64, shape (B,), where an empty one is the one after all classes."""
    return torch.tensor([classes if label == "" else label for label in labels], device=device)


class LatentsAndText:
    """Latents of an AutoencoderKL, and a CLIPTextModel's embeddings of captions (Rombach et al. 2022)."""

    takes_text, takes_sizes, classes = True, False, 0

    def __init__(self, vae: nn.Module, text_encoders: Sequence[nn.Module], tokenizers: Sequence[Any]):
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoders = [part.eval().requires_grad_(False) for part in text_encoders]
        self.tokenizers = tokenizers
        self.channels, self.image_channels = vae.config.latent_channels, vae.config.in_channels
        self.scale, self.shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0  # of latents
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.has_warned = os.environ.get("RANK", "0") != "0"  # one process does

    def prepare(self, device: torch.device, mixed_precision: str) -> None:
        """Set the device and, on a GPU, the type. Parts move there when they are used."""
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else AUTOCAST_TYPES[mixed_precision] or torch.float32

    def rest(self) -> None:
        """Free the device's memory until the next use."""
        for part in (self.vae, *self.text_encoders):
            nn.Module.to(part, "cpu")

    def _ready(self, part: nn.Module) -> nn.Module:
        overflows = self.dtype is torch.float16 and type(part).__name__ in LENGTHS
        dtype = torch.bfloat16 if overflows else self.dtype
        return nn.Module.to(part, self.device, dtype)  # diffusers' own warns of every change of the type

    @torch.no_grad()
    def encode(self, examples: Captioned | Encoded) -> tuple[torch.Tensor, Condition]:
        """Scaled latents, float32 (B, C, h, w), and the embeddings.

        Latents are samples of the posterior, drawn from torch's generator, if the VAE has one.
        """
        if isinstance(examples, Captioned):
            examples = Encoded(self.moments(examples.pixels), self.embed(examples.captions), examples.sizes)
        moments = examples.moments.to(self.device, non_blocking=True).float().contiguous()
        is_sure = moments.shape[1] == self.channels
        latents = moments if is_sure else DiagonalGaussianDistribution(moments).sample()
        latents = (latents - self.shift) * self.scale
        embeddings = examples.embeddings.to(self.device, non_blocking=True)
        sizes = None if examples.sizes is None else examples.sizes.to(self.device, non_blocking=True)
        return latents.to(memory_format=memory_format(self.device)), self._as_condition(embeddings, sizes)

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) to the posterior's mean and log variance, (B, 2 · latent channels, h, w).

        A VAE without a posterior gives latents, (B, latent channels, h, w).
        """
        vae = self._ready(self.vae)
        parts = to_unit_range(pixels, self.device).to(vae.dtype).split(CODED_AT_ONCE)
        encoded = map(vae.encode, parts)
        return torch.cat([out.latent if "latent" in out else out.latent_dist.parameters for out in encoded])

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The text encoder's last hidden states, (B, tokens, D); texts that are too long are cut, with one warning."""
        return self._ready(self.text_encoders[0])(self._tokens(texts, self.tokenizers[0]).input_ids)[0]

    def _of_clips(self, texts: Sequence[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The hidden states before the last of the first two text encoders, side by side, and their pooled texts."""
        found = []
        for part, tokenizer in list(zip(self.text_encoders, self.tokenizers, strict=True))[:2]:
            found.append(self._ready(part)(self._tokens(texts, tokenizer).input_ids, output_hidden_states=True))
        pooled = [output.text_embeds for output in found if "text_embeds" in output]
        return torch.cat([output.hidden_states[-2] for output in found], dim=-1), pooled

    def _tokens(self, texts: Sequence[str], tokenizer: Any, begin: str = "") -> Mapping[str, torch.Tensor]:
        """The tokens of texts, which all begin with another one, and their attention mask."""
        most = tokenizer.model_max_length
        length = most + (len(tokenizer.encode(begin)) - 2 if begin else 0)  # two of `begin` are counted already
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = tokenizer([begin + text for text in texts], **options)
        filled = zip(texts, tokens.attention_mask.all(dim=1), strict=True)  # the rest was not cut
        too_long = (text for text, full in filled if full and len(tokenizer(begin + text).input_ids) > length)
        if not self.has_warned and (text := next(too_long, None)) is not None:
            print(f"cut to {most} tokens, as all such texts: {text[:200]}")
            self.has_warned = True
        return tokens.to(self.device)

    def _as_condition(self, embeddings: torch.Tensor, sizes: torch.Tensor | None) -> Condition:
        return {"encoder_hidden_states": embeddings}

    def condition(self, texts: Sequence[str]) -> Condition:
        """The network's further arguments for these texts."""
        return self._as_condition(self.embed(texts), None)

    def negative(self, texts: Sequence[str]) -> Condition:
        """The same for texts that guidance leads away from."""
        return self.condition(texts)

    @torch.no_grad()
    def decode(self, tensors: torch.Tensor) -> torch.Tensor:
        """Latents to uint8 images on the CPU; RunError if they are NaN or infinite, as some are in half precision."""
        vae = self._ready(self.vae)
        latents = (tensors / self.scale + self.shift).to(vae.dtype)
        images = []  # of bytes: a batch in float32 would take four times the device's memory
        for part in latents.split(CODED_AT_ONCE):
            decoded = vae.decode(part).sample.float()
            if not decoded.isfinite().all():
                raise RunError(f"the VAE, in {vae.dtype}, decodes to NaN or infinite values")
            images.append(to_bytes(decoded))
        return torch.cat(images)


class LatentsAndTwoTexts(LatentsAndText):
    """The same for Stable Diffusion XL (Podell et al. 2023): two text encoders, a pooled text, the sizes of crops.

    The hidden states before the last of both encoders lie side by side. Sizes are the height and width of the image,
    the top and left edge of the crop, and its height and width. The VAE is in float32 where its settings say so, as
    half precision overflows.
    """

    takes_sizes = True

    def __init__(self, *parts: Any, side: int, zeros_for_empty: bool):
        super().__init__(*parts)
        self.side = side  # pixels of the images that are drawn
        self.zeros_for_empty = zeros_for_empty  # an empty negative prompt is all zeros
        self.pooled = self.text_encoders[-1].config.projection_dim

    def _ready(self, part: nn.Module) -> nn.Module:
        whole = part is self.vae and part.config.force_upcast
        return nn.Module.to(part, self.device, torch.float32) if whole else super()._ready(part)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The hidden states of both encoders, (B, tokens, D), and as another token the pooled text, filled with 0."""
        both, pooled = self._of_clips(texts)
        return torch.cat([both, functional.pad(pooled[-1], (0, both.shape[-1] - self.pooled))[:, None]], dim=1)

    def _as_condition(self, embeddings: torch.Tensor, sizes: torch.Tensor | None) -> Condition:
        if sizes is None:  # the whole image
            sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]], device=embeddings.device)
        parts = {"encoder_hidden_states": embeddings[:, :-1], "text_embeds": embeddings[:, -1, : self.pooled]}
        return parts | {"time_ids": sizes.to(embeddings.dtype).expand(len(embeddings), -1)}

    def negative(self, texts: Sequence[str]) -> Condition:
        """The same, or zeros for empty texts where the pipeline says so."""
        found = self.condition(texts)
        if not (self.zeros_for_empty and not any(texts)):
            return found
        return {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in found.items()}


class LatentsAndThreeTexts(LatentsAndText):
    """The same for Stable Diffusion 3 (Esser et al. 2024): two CLIPs, a pooled text, and T5 if it is there.

    The CLIPs' hidden states lie side by side, filled with 0 to the width of T5's, which follow as further tokens.
    Without T5 these are zeros.
    """

    def __init__(self, *parts: Any, width: int):
        super().__init__(*parts)
        self.width = width  # of an embedding
        self.pooled = sum(part.config.projection_dim for part in self.text_encoders[:2])

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The hidden states, (B, tokens, D), and as another token the pooled texts, filled with 0; no zeros for T5."""
        both, pooled = self._of_clips(texts)
        parts = [both, torch.cat(pooled, dim=-1)[:, None]]
        tokens = [functional.pad(part, (0, self.width - part.shape[-1])) for part in parts]
        for text_encoder, tokenizer in zip(self.text_encoders[2:], self.tokenizers[2:], strict=True):
            states = self._ready(text_encoder)(self._tokens(texts, tokenizer).input_ids)[0]
            tokens.insert(1, states.to(both.dtype))
        return torch.cat(tokens, dim=1)

    def _as_condition(self, embeddings: torch.Tensor, sizes: torch.Tensor | None) -> Condition:
        missing = LENGTHS[T5] if len(self.text_encoders) == 2 else 0
        states = functional.pad(embeddings[:, :-1], (0, 0, 0, missing))
        return {"encoder_hidden_states": states, "pooled_projections": embeddings[:, -1, : self.pooled]}


class LatentsAndInstructedText(LatentsAndText):
    """The same for SANA (Xie et al. 2024): Gemma reads each text after an instruction.

    As in the pipeline, texts are in lower case, and texts that guidance leads away from have no instruction. Neither
    has the empty caption, which stands for them in training.
    """

    def __init__(self, *parts: Any, instruction: str):
        super().__init__(*parts)
        self.instruction = instruction

    @torch.no_grad()
    def embed(self, texts: Sequence[str], instruct: bool = True) -> torch.Tensor:
        """The last hidden states of each text, and in another column the attention mask, (B, tokens, D + 1)."""
        [tokenizer], text_encoder, found = self.tokenizers, self._ready(*self.text_encoders), []
        kept = [0, *range(1 - tokenizer.model_max_length, 0)]  # the first token and the text's, not the instruction's
        for text in texts:
            begin = self.instruction if instruct and text else ""
            tokens = self._tokens([text.lower().strip()], tokenizer, begin)
            states = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            mask = tokens.attention_mask[..., None].to(states.dtype)
            found.append(torch.cat([states, mask], dim=-1)[:, kept])
        return torch.cat(found)

    def _as_condition(self, embeddings: torch.Tensor, sizes: torch.Tensor | None) -> Condition:
        return {"encoder_hidden_states": embeddings[..., :-1], "encoder_attention_mask": embeddings[..., -1]}

    def negative(self, texts: Sequence[str]) -> Condition:
        """The same for texts that guidance leads away from."""
        return self._as_condition(self.embed(texts, instruct=False), None)


class LabelledLatents(LatentsAndText):
    """Latents of an AutoencoderKL with a label each (Peebles and Xie 2023)."""

    takes_text = False

    def __init__(self, vae: nn.Module, classes: int):
        super().__init__(vae, [], [])
        self.classes = classes

    def embed(self, texts: Sequence[str | int]) -> torch.Tensor:
        """The labels, shape (B,)."""
        return as_labels(texts, self.classes, self.device)

    def _as_condition(self, embeddings: torch.Tensor, sizes: torch.Tensor | None) -> Condition:
        return {"class_labels": embeddings}


Encoder = Pixels | LatentsAndText  # the same methods
