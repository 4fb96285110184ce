"""Between images and what a network works on: pixels, or latents and text. Nothing else knows the difference."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from deme.errors import RunError, UserError
from deme.job.rank import is_main_process
from deme.models.denoisers import AUTOCAST_TYPES, memory_format
from deme.models.kinds import vae_factor

CHANNELS = (1, 3)  # of images: grayscale and RGB
CODED_AT_ONCE = 4  # images: a VAE takes many times a UNet's memory for each
T5, GEMMA, UMT5 = "T5EncoderModel", "Gemma2Model", "UMT5EncoderModel"
LENGTHS = {T5: 256, GEMMA: 300, UMT5: 512}  # tokens, as diffusers' pipelines take by default; all overflow in fp16
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
    id2label: Mapping[str, str] | None = None  # number → name of the labels' classes, if the pipeline names them
    factor = 1  # pixels for each entry that the network works on, along each side
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

    def shape_of(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of what the network works on, for images with this many pixels along each side."""
        return self.channels, resolution // self.factor, resolution // self.factor

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
    id2label = Pixels.id2label

    def __init__(self, vae: nn.Module, text_encoders: Sequence[nn.Module], tokenizers: Sequence[Any]):
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoders = [part.eval().requires_grad_(False) for part in text_encoders]
        self.tokenizers = tokenizers
        self.image_channels = vae.config.in_channels
        self.factor = vae_factor(vae.config)
        self._set_latents(vae.config)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.has_warned = not is_main_process()  # one process does

    def _set_latents(self, settings: Mapping[str, Any]) -> None:
        """Set the latents' channels and scale by the VAE's settings."""
        self.channels = settings["latent_channels"]
        self.scale, self.shift = settings["scaling_factor"], settings.get("shift_factor") or 0.0

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
        latents = moments = examples.moments.to(self.device, non_blocking=True).float().contiguous()
        if moments.shape[1] != self.channels:
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # imports all autoencoders

            latents = DiagonalGaussianDistribution(moments).sample()
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
        return torch.cat([self._moments(part) for part in parts])

    def _moments(self, images: torch.Tensor) -> torch.Tensor:
        encoded = self.vae.encode(images)
        return encoded.latent if "latent" in encoded else encoded.latent_dist.parameters

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The text encoder's last hidden states, (B, tokens, D); texts that are too long are cut, with one warning."""
        text_encoder, tokens = self._ready(self.text_encoders[0]), self._tokens(texts, self.tokenizers[0])
        is_masked = getattr(text_encoder.config, "use_attention_mask", False)
        return text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if is_masked else None)[0]

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

    shape_of = Pixels.shape_of

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
            decoded = self._decoded(part).float()
            if not decoded.isfinite().all():
                raise RunError(f"the VAE, in {vae.dtype}, decodes to NaN or infinite values")
            images.append(to_bytes(decoded))
        return torch.cat(images)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents).sample


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
