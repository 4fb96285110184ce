"""What a network works on, and back: images as they are, or latents with a text. Nothing else knows the difference."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from deme.errors import RunError, UserError
from deme.models.inference import AUTOCAST_TYPES, memory_format
from deme.models.parts import blaming, load_parts
from deme.models.pipelines import latent_factor, takes_text

MODES = {1: "L", 3: "RGB"}  # PIL's mode for a number of channels
CODED_AT_ONCE = 4  # images: a VAE takes many times a UNet's memory for each
Condition = dict[str, torch.Tensor]  # what a network is told beside its noisy input, by the name of its argument


@dataclass(frozen=True)
class Captioned:
    """Images with a caption each."""

    pixels: torch.Tensor  # uint8, shape (B, C, H, W)
    captions: list[str]


@dataclass(frozen=True)
class Encoded:
    """The same, encoded before."""

    moments: torch.Tensor  # mean and log variance of the VAE's posterior, shape (B, 2 · latent channels, h, w)
    embeddings: torch.Tensor  # of the captions, shape (B, tokens, D)


class Encoder(Protocol):
    """Between what people see and what a network works on."""

    image_channels: int
    takes_text: bool

    def check_fits(self, channels: int) -> None:
        """Make sure that a network of so many input channels works on what this gives; UserError where not."""

    def prepare(self, device: torch.device, mixed_precision: str) -> None:
        """Where, and how precisely, to work."""

    def rest(self) -> None:
        """Leave the device's memory to others until the next use."""

    def encode(self, examples: Any) -> tuple[torch.Tensor, Condition]:
        """What a network is trained on: clean float32 tensors (B, C, H, W) on the device, and their condition.

        What is random in it comes from torch's generator of the device.
        """

    def condition(self, texts: Sequence[str]) -> Condition:
        """The condition that these texts make, on the device."""

    def decode(self, tensors: torch.Tensor) -> torch.Tensor:
        """Float32 tensors (B, C, H, W), as the network sees them, to uint8 images (B, C', H', W') on the CPU."""


class Pixels:
    """Images in [−1, 1], without a condition.

    Args:
        channels: 1 (grayscale) or 3 (RGB).
    """

    takes_text = False

    def __init__(self, channels: int):
        self.image_channels = channels
        self.device = torch.device("cpu")

    def check_fits(self, channels: int) -> None:
        """UserError where images have another number of channels."""
        if channels not in MODES:
            raise UserError(f"in_channels={channels}: images have {' or '.join(map(str, MODES))} channels")

    def prepare(self, device: torch.device, mixed_precision: str) -> None:
        """Where to work."""
        self.device = device

    def rest(self) -> None:
        """Nothing is held."""

    def encode(self, examples: torch.Tensor) -> tuple[torch.Tensor, Condition]:
        """uint8 images (B, C, H, W) to [−1, 1], same shape."""
        return to_unit_range(examples, self.device), {}

    def condition(self, texts: Sequence[str]) -> Condition:
        """There is none."""
        return {}

    def decode(self, tensors: torch.Tensor) -> torch.Tensor:
        """Images in [−1, 1] to uint8 on the CPU, what lies outside clipped."""
        return to_bytes(tensors)


class LatentsAndText:
    """Latents of a VAE, which stand for images, and embeddings of captions (Rombach et al. 2022).

    Args:
        vae: diffusers' AutoencoderKL.
        text_encoder: transformers' CLIPTextModel.
        tokenizer: its CLIPTokenizer.
    """

    takes_text = True

    def __init__(self, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any):
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_channels = vae.config.in_channels
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.has_warned = os.environ.get("RANK", "0") != "0"  # one process does

    def check_fits(self, channels: int) -> None:
        """UserError where latents have another number of channels, or images one that PIL does not know."""
        latents = self.vae.config.latent_channels
        if channels != latents:
            raise UserError(f"in_channels={channels}: the VAE's latents have {latents} channels")
        if self.image_channels not in MODES:
            raise UserError(f"vae: in_channels={self.image_channels}: images have 1 or 3 channels")

    def prepare(self, device: torch.device, mixed_precision: str) -> None:
        """Where to work; on a GPU in half precision where the networks are. A part moves when it is first used."""
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else AUTOCAST_TYPES[mixed_precision] or torch.float32

    def rest(self) -> None:
        """VAE and text encoder go back to main memory."""
        for part in (self.vae, self.text_encoder):
            nn.Module.to(part, "cpu")

    @property
    def _shift(self) -> float:
        """What the VAE's latents are shifted by before they are scaled; most are not."""
        return self.vae.config.get("shift_factor") or 0.0

    def _ready(self, part: nn.Module) -> nn.Module:
        """A part where and how it is to work."""
        return nn.Module.to(part, self.device, self.dtype)  # diffusers' own warns of every change of the type

    @torch.no_grad()
    def encode(self, examples: Captioned | Encoded) -> tuple[torch.Tensor, Condition]:
        """Images with captions, encoded before or not, to scaled samples of the posterior, and the embeddings."""
        if isinstance(examples, Captioned):
            examples = Encoded(self.moments(examples.pixels), self.embed(examples.captions))
        moments = examples.moments.to(self.device, non_blocking=True)
        embeddings = examples.embeddings.to(self.device, non_blocking=True)
        return self.sample(moments), {"encoder_hidden_states": embeddings}

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) to the posterior's mean and log variance, (B, 2 · latent channels, h, w)."""
        vae = self._ready(self.vae)
        parts = to_unit_range(pixels, self.device).to(self.dtype).split(CODED_AT_ONCE)
        return torch.cat([vae.encode(part).latent_dist.parameters for part in parts])

    def sample(self, moments: torch.Tensor) -> torch.Tensor:
        """A sample of the posterior, as the network sees latents: float32, (B, latent channels, h, w)."""
        mean, log_variance = moments.float().contiguous().chunk(2, dim=1)
        deviation = torch.exp(log_variance.clamp(-30, 20) / 2)
        noise = torch.randn(mean.shape, device=mean.device)  # randn_like fills in the order in which a tensor lies
        latents = (mean + deviation * noise - self._shift) * self.vae.config.scaling_factor
        return latents.to(memory_format=memory_format(self.device))

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts to the text encoder's last hidden states, (B, tokens, D); too long ones are cut, which is said once."""
        length = self.tokenizer.model_max_length
        if not self.has_warned:
            for text in texts:
                if len(text) > length and len(self.tokenizer(text).input_ids) > length:
                    print(f"cut to {length} tokens, as all such texts: {text[:200]}")
                    self.has_warned = True
                    break
        return self._ready(self.text_encoder)(self.tokens(texts).to(self.device))[0]

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts, cut or filled to the tokenizer's length: int64, (B, tokens)."""
        filled = {"padding": "max_length", "max_length": self.tokenizer.model_max_length, "truncation": True}
        return self.tokenizer(list(texts), **filled, return_tensors="pt").input_ids

    def condition(self, texts: Sequence[str]) -> Condition:
        """The embeddings of these texts."""
        return {"encoder_hidden_states": self.embed(texts)}

    @torch.no_grad()
    def decode(self, tensors: torch.Tensor) -> torch.Tensor:
        """Latents to uint8 images on the CPU, a few at a time.

        Raises:
            RunError: the VAE gives NaN or infinite values, as some do in half precision.
        """
        vae = self._ready(self.vae)
        latents = (tensors / self.vae.config.scaling_factor + self._shift).to(self.dtype)
        images = []
        for part in latents.split(CODED_AT_ONCE):
            decoded = vae.decode(part).sample.float()
            if not decoded.isfinite().all():
                raise RunError(f"the VAE, in {self.dtype}, decodes to NaN or infinite values")
            images.append(to_bytes(decoded))
        return torch.cat(images)


def load_encoder(pipeline: Path, unet: nn.Module) -> Encoder:
    """What stands between images and a pipeline's network."""
    asks_for_text = hasattr(unet.config, "cross_attention_dim")
    if asks_for_text != takes_text(pipeline):
        wants = "needs a text encoder, which the folder lacks" if asks_for_text else "takes no text"
        raise UserError(f"{pipeline}: its network, a {type(unet).__name__}, {wants}")
    if not asks_for_text:
        return Pixels(unet.config.in_channels)
    encoder = LatentsAndText(*load_parts(pipeline))
    _try_parts(encoder, pipeline, unet.config.cross_attention_dim)
    return encoder


@torch.no_grad()
def _try_parts(encoder: LatentsAndText, pipeline: Path, width: Any) -> None:
    """Use each part once, so that what does not work is named after the part.

    Args:
        width: of the texts' embeddings, as the network takes them; a list where its blocks take several.
    """
    with blaming(pipeline / "tokenizer"):
        tokens = encoder.tokens([""])
    with blaming(pipeline / "text_encoder"):
        found = encoder.text_encoder(tokens)[0].shape[2]
        if isinstance(width, int) and found != width:
            raise UserError(f"its embeddings have {found} entries, the network's cross_attention_dim is {width}")
    with blaming(pipeline / "vae"):
        side = 2 * latent_factor(pipeline)
        pixels = torch.zeros(1, encoder.image_channels, side, side, dtype=torch.uint8)
        mean, _ = encoder.moments(pixels).chunk(2, dim=1)
        decoded = encoder.decode(mean)
        if decoded.shape != pixels.shape:
            raise UserError(f"encodes and decodes {tuple(pixels.shape)} to {tuple(decoded.shape)}")


def to_unit_range(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images (B, C, H, W) to [−1, 1] on the device, same shape, in its memory format; a GPU is not waited for."""
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    pixels = pixels.to(device, non_blocking=True, memory_format=memory_format(device))
    return pixels.float().div_(127.5).sub_(1)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images in [−1, 1] (B, C, H, W) to uint8 on the CPU, what lies outside clipped."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
