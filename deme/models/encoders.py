"""Between images and what a network works on: pixels, or latents and text. Nothing else knows the difference."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional

from deme.config.sections import Sample
from deme.errors import RunError, UserError
from deme.method.sampling import NetworkAt, guided, sample_images, scaled
from deme.models.denoisers import AUTOCAST_TYPES, memory_format

CHANNELS = (1, 3)  # of images: grayscale and RGB
CODED_AT_ONCE = 4  # images: a VAE takes many times a UNet's memory for each
LEAST_VOCABULARY = 256  # tokens: one for each byte
LEAST_LENGTH = 3  # tokens of a text: its start, its end, and one between
Condition = dict[str, torch.Tensor]  # a network's further arguments, by name


class Captioned(NamedTuple):
    """Images with a caption each."""

    pixels: torch.Tensor  # uint8, shape (B, C, H, W)
    captions: list[str]
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

    takes_text = takes_sizes = False
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

    negative = condition


class LatentsAndText:
    """Latents of an AutoencoderKL, and a CLIPTextModel's embeddings of captions (Rombach et al. 2022)."""

    takes_text, takes_sizes = True, False

    def __init__(self, vae: nn.Module, text_encoders: Sequence[nn.Module], tokenizers: Sequence[Any]):
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoders = [part.eval().requires_grad_(False) for part in text_encoders]
        self.tokenizers = tokenizers
        self.channels, self.image_channels = vae.config.latent_channels, vae.config.in_channels
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
        return nn.Module.to(part, self.device, self.dtype)  # diffusers' own warns of every change of the type

    @torch.no_grad()
    def encode(self, examples: Captioned | Encoded) -> tuple[torch.Tensor, Condition]:
        """Scaled samples of the posterior, float32 (B, C, h, w), drawn from torch's generator, and the embeddings."""
        if isinstance(examples, Captioned):
            examples = Encoded(self.moments(examples.pixels), self.embed(examples.captions), examples.sizes)
        moments = examples.moments.to(self.device, non_blocking=True).float().contiguous()
        latents = DiagonalGaussianDistribution(moments).sample() * self.vae.config.scaling_factor
        embeddings = examples.embeddings.to(self.device, non_blocking=True)
        sizes = None if examples.sizes is None else examples.sizes.to(self.device, non_blocking=True)
        return latents.to(memory_format=memory_format(self.device)), self._as_condition(embeddings, sizes)

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) to the posterior's mean and log variance, (B, 2 · latent channels, h, w)."""
        vae = self._ready(self.vae)
        parts = to_unit_range(pixels, self.device).to(vae.dtype).split(CODED_AT_ONCE)
        return torch.cat([vae.encode(part).latent_dist.parameters for part in parts])

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The text encoder's last hidden states, (B, tokens, D); texts that are too long are cut, with one warning."""
        return self._ready(self.text_encoders[0])(self._tokens(texts, self.tokenizers[0]))[0]

    def _tokens(self, texts: Sequence[str], tokenizer: Any) -> torch.Tensor:
        length = tokenizer.model_max_length
        too_long = (text for text in texts if len(text) > length and len(tokenizer(text).input_ids) > length)
        if not self.has_warned and (text := next(too_long, None)) is not None:
            print(f"cut to {length} tokens, as all such texts: {text[:200]}")
            self.has_warned = True
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.device)

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
        latents = (tensors / vae.config.scaling_factor).to(vae.dtype)
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
        states = []
        for text_encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            output = self._ready(text_encoder)(self._tokens(texts, tokenizer), output_hidden_states=True)
            states.append(output.hidden_states[-2])
        both = torch.cat(states, dim=-1)
        pooled = functional.pad(output.text_embeds, (0, both.shape[-1] - self.pooled))
        return torch.cat([both, pooled[:, None]], dim=1)

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


Encoder = Pixels | LatentsAndText  # the same methods


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: a batch of seeds, from noise to pixels."""

    scheduler: DDPMScheduler
    encoder: Encoder
    settings: Sample
    shape: tuple[int, int, int]  # (C, H, W) of what the network works on
    device: torch.device
    scales: Sequence[tuple[int, int, float]] = ()  # of the predicted noise, as `scaled` takes them

    @cached_property
    def _negative(self) -> Condition:
        return self.encoder.negative([self.settings.negative_prompt])

    @property
    def passes(self) -> int:
        """Passes through the network for each image."""
        is_guided = self.encoder.takes_text and self.settings.guidance_scale != 1
        return self.settings.num_inference_steps * (1 + is_guided)

    def images(self, network_at: NetworkAt, seeds: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """The images of these seeds, each with its prompt if there are prompts: uint8, (B, C', H', W'), on the CPU."""
        settings = self.settings
        scaled_at = scaled(network_at, self.scales)
        network = guided(scaled_at, self.encoder.condition(prompts), self._negative, settings.guidance_scale)
        sampler = (settings.num_inference_steps, settings.scheduler, settings.eta, settings.timestep_spacing)
        return self.encoder.decode(sample_images(network, self.scheduler, seeds, self.shape, self.device, *sampler))
