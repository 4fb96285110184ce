"""Between images and what a network works on: pixels, or latents and text. Nothing else knows the difference."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from deme.config.paths import DENOISER
from deme.config.sections import Sample
from deme.errors import RunError, UserError, blaming, one_line
from deme.method.losses import prediction_target
from deme.method.sampling import NetworkAt, guided, sample_images, scaled
from deme.models.denoisers import AUTOCAST_TYPES, memory_format
from deme.models.pipelines import check_settings, has_full_precision, is_xl, latent_factor, takes_text

CHANNELS = (1, 3)  # of images: grayscale and RGB
CODED_AT_ONCE = 4  # images: a VAE takes many times a UNet's memory for each
LEAST_VOCABULARY = 256  # tokens: one for each byte
LEAST_LENGTH = 3  # tokens of a text: its start, its end, and one between
Condition = dict[str, torch.Tensor]  # a network's further arguments, by name


class Captioned(NamedTuple):
    """Images with a caption each."""

    pixels: torch.Tensor  # uint8, shape (B, C, H, W)
    captions: list[str]


class Encoded(NamedTuple):
    """Captioned images that were encoded before."""

    moments: torch.Tensor  # mean and log variance of the VAE's posterior, shape (B, 2 · latent channels, h, w)
    embeddings: torch.Tensor  # of the captions, shape (B, tokens, D)


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

    takes_text = False
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


class LatentsAndText:
    """Latents of an AutoencoderKL, and a CLIPTextModel's embeddings of captions (Rombach et al. 2022)."""

    takes_text = True

    def __init__(self, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any):
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.channels, self.image_channels = vae.config.latent_channels, vae.config.in_channels
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.has_warned = os.environ.get("RANK", "0") != "0"  # one process does

    def prepare(self, device: torch.device, mixed_precision: str) -> None:
        """Set the device and, on a GPU, the type. Parts move there when they are used."""
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else AUTOCAST_TYPES[mixed_precision] or torch.float32

    def rest(self) -> None:
        """Free the device's memory until the next use."""
        for part in (self.vae, self.text_encoder):
            nn.Module.to(part, "cpu")

    def _ready(self, part: nn.Module) -> nn.Module:
        return nn.Module.to(part, self.device, self.dtype)  # diffusers' own warns of every change of the type

    @torch.no_grad()
    def encode(self, examples: Captioned | Encoded) -> tuple[torch.Tensor, Condition]:
        """Scaled samples of the posterior, float32 (B, C, h, w), drawn from torch's generator, and the embeddings."""
        if isinstance(examples, Captioned):
            examples = Encoded(self.moments(examples.pixels), self.embed(examples.captions))
        moments = examples.moments.to(self.device, non_blocking=True).float().contiguous()
        latents = DiagonalGaussianDistribution(moments).sample() * self.vae.config.scaling_factor
        embeddings = examples.embeddings.to(self.device, non_blocking=True)
        return latents.to(memory_format=memory_format(self.device)), {"encoder_hidden_states": embeddings}

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) to the posterior's mean and log variance, (B, 2 · latent channels, h, w)."""
        vae = self._ready(self.vae)
        parts = to_unit_range(pixels, self.device).to(self.dtype).split(CODED_AT_ONCE)
        return torch.cat([vae.encode(part).latent_dist.parameters for part in parts])

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The text encoder's last hidden states, (B, tokens, D); texts that are too long are cut, with one warning."""
        length = self.tokenizer.model_max_length
        too_long = (text for text in texts if len(text) > length and len(self.tokenizer(text).input_ids) > length)
        if not self.has_warned and (text := next(too_long, None)) is not None:
            print(f"cut to {length} tokens, as all such texts: {text[:200]}")
            self.has_warned = True
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self._ready(self.text_encoder)(tokens.to(self.device))[0]

    def condition(self, texts: Sequence[str]) -> Condition:
        """The embeddings of these texts."""
        return {"encoder_hidden_states": self.embed(texts)}

    @torch.no_grad()
    def decode(self, tensors: torch.Tensor) -> torch.Tensor:
        """Latents to uint8 images on the CPU; RunError if they are NaN or infinite, as some are in half precision."""
        vae = self._ready(self.vae)
        latents = (tensors / vae.config.scaling_factor).to(self.dtype)
        images = []  # of bytes: a batch in float32 would take four times the device's memory
        for part in latents.split(CODED_AT_ONCE):
            decoded = vae.decode(part).sample.float()
            if not decoded.isfinite().all():
                raise RunError(f"the VAE, in {self.dtype}, decodes to NaN or infinite values")
            images.append(to_bytes(decoded))
        return torch.cat(images)


Encoder = Pixels | LatentsAndText  # the same methods


@torch.no_grad()
def load_encoder(pipeline: Path, denoiser: nn.Module) -> Encoder:
    """The encoder of a pipeline, each of its parts tried once."""
    width = denoiser.config.get("cross_attention_dim")  # None where the network takes no text
    if (width is not None) != takes_text(pipeline):
        wants = "takes no text" if width is None else "needs a text encoder, which the folder lacks"
        raise UserError(f"{pipeline}: its network, a {type(denoiser).__name__}, {wants}")
    if width is None:
        return Pixels(denoiser.config.in_channels)
    if is_xl(denoiser.config):
        raise UserError(f"{pipeline}: a network of Stable Diffusion XL is merged alone, neither trained nor sampled")
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # errors are told below, in one line
    vae = _load_network(pipeline / "vae", AutoencoderKL, torch_dtype=torch.float32)
    text_encoder = _load_network(pipeline / "text_encoder", CLIPTextModel, dtype=torch.float32)
    with blaming(pipeline / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(str(pipeline / "tokenizer"), local_files_only=True)
        check_tokenizer(tokenizer, text_encoder.config.vocab_size)
        length = tokenizer.model_max_length  # 1e30 where the folder names none
        if not isinstance(length, (int, float)) or not length >= LEAST_LENGTH:
            raise UserError(f"model_max_length={length}: must be a number of at least {LEAST_LENGTH}")
        tokenizer.model_max_length = int(min(length, text_encoder.config.max_position_embeddings))
        tokenizer("", padding="max_length")  # fails without a token for it
    encoder = LatentsAndText(vae, text_encoder, tokenizer)
    with blaming(pipeline / "text_encoder"):
        entries = encoder.embed([""]).shape[2]
        if isinstance(width, int) and entries != width:
            raise UserError(f"its embeddings have {entries} entries, the network's cross_attention_dim is {width}")
    with blaming(pipeline / "vae"):
        if encoder.image_channels not in CHANNELS:
            raise UserError(f"in_channels={encoder.image_channels}: images have 1 or 3 channels")
        side = 2 * latent_factor(pipeline)
        pixels = torch.zeros(1, encoder.image_channels, side, side, dtype=torch.uint8)
        decoded = encoder.decode(encoder.moments(pixels).chunk(2, dim=1)[0])
        if decoded.shape != pixels.shape:
            raise UserError(f"encodes and decodes {tuple(pixels.shape)} to {tuple(decoded.shape)}")
    return encoder


def _load_network(folder: Path, kind: Any, **dtype: torch.dtype) -> Any:
    """A part of this class, all of its tensors in its file and finite."""
    with blaming(folder):
        variant = None if has_full_precision(folder) else "fp16"
        options = {"use_safetensors": True, "output_loading_info": True, "local_files_only": True, **dtype}
        part, report = kind.from_pretrained(str(folder), variant=variant, **options)
        check_filled(report)
        for name, tensor in part.state_dict().items():
            if not tensor.isfinite().all():
                raise UserError(f"tensor {name} holds NaN or infinite values")
        return part


def check_filled(report: dict) -> None:
    """Check in diffusers' or transformers' report on a network that its file held every tensor."""
    if missing := [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]:
        raise UserError(f"weights and config.json do not fit each other ({', '.join(sorted(missing)[:3])} …)")


def check_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Check that a tokenizer has the tokens of the text encoder's vocabulary; transformers may make an empty one."""
    if not LEAST_VOCABULARY <= len(tokenizer) <= vocabulary:
        raise UserError(f"its tokenizer is missing or another model's: {len(tokenizer)} tokens, not {vocabulary}")


def try_out(denoiser: nn.Module, scheduler: DDPMScheduler, encoder: Encoder) -> None:
    """Predict once and take one step, so that parts that do not fit are found before anything is written."""
    channels, size = denoiser.config.in_channels, denoiser.config.sample_size
    check_settings(DENOISER, denoiser.config)  # it may have been made from settings, and not loaded
    check_settings("scheduler", scheduler.config)
    if channels != encoder.channels:
        raise UserError(f"in_channels={channels}: the encoder gives {encoder.channels}")
    condition = encoder.condition([""])  # load_encoder has tried it
    try:
        images = torch.zeros(1, channels, size, size)
        last = torch.tensor([scheduler.config.num_train_timesteps - 1])
        with torch.no_grad():
            prediction = denoiser(images, last, **condition).sample
        target = prediction_target(scheduler, images, images, last)
        if prediction.shape != target.shape:
            raise UserError(f"the network maps {tuple(target.shape)} to {tuple(prediction.shape)}")
        scheduler.step(prediction, int(last), images)
    except Exception as error:  # torch and diffusers raise anything
        raise UserError(one_line(error)) from None


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
        return self.encoder.condition([self.settings.negative_prompt])

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
