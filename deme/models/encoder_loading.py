"""Loads the encoder of a pipeline's folder, and tries it, and a network with it, before anything is written."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from deme.config.paths import UNET
from deme.errors import UserError, blaming, naming
from deme.method.process import Process
from deme.models import kinds
from deme.models.denoisers import settings_of
from deme.models.encoders import (
    CHANNELS,
    GEMMA,
    LENGTHS,
    Encoder,
    LabelledLatents,
    LabelledPixels,
    LatentsAndText,
    Pixels,
)
from deme.models.families import FramesAndText, LatentsAndInstructedText, LatentsAndThreeTexts, LatentsAndTwoTexts
from deme.models.pipelines import (
    STEMS,
    has_latents,
    latent_factor,
    names_of_classes,
    parts_of,
    takes_text,
    variant_of,
    zeros_for_empty_prompt,
)
from deme.models.weights import weights_files

LEAST_VOCABULARY = 256  # tokens: one for each byte
LEAST_LENGTH = 3  # tokens of a text: its start, its end, and one between


@torch.no_grad()
def load_encoder(pipeline: Path, denoiser: nn.Module) -> Encoder:
    """The encoder of a pipeline, each of its parts tried once."""
    encoder = _load_parts(pipeline, denoiser)
    if encoder.classes:
        encoder.id2label = names_of_classes(pipeline)
    return encoder


def _load_parts(pipeline: Path, denoiser: nn.Module) -> Encoder:
    config = settings_of(denoiser)
    width = kinds.text_width(config)
    if (width is not None) != takes_text(pipeline):
        wants = "takes no text" if width is None else "needs a text encoder, which the folder lacks"
        raise UserError(f"{pipeline}: its network, a {type(denoiser).__name__}, {wants}")
    if not has_latents(pipeline):
        return pixels_of(denoiser)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # errors are told below, in one line
    parts = parts_of(pipeline, config)
    vae = _load_network(pipeline / "vae", getattr(diffusers, parts["vae"]), torch_dtype=torch.float32)
    with naming(pipeline / "vae" / "config.json"):
        kinds.check_shift(config, vae.config)
    if classes := kinds.num_classes(config):
        return _tried(LabelledLatents(vae, classes), pipeline)
    texts = [_load_text(pipeline, part, parts) for part in parts if part.startswith("text_encoder")]
    encoder = _encoder_of(pipeline, config)(vae, *map(list, zip(*texts, strict=True)))
    with blaming(pipeline / "text_encoder"):
        entries = encoder.condition([""])["encoder_hidden_states"].shape[2]
        if isinstance(width, int) and entries != width:
            key = kinds.DENOISERS[kinds.denoiser_class(config)].text_width
            raise UserError(f"its embeddings have {entries} entries, the network's {key} is {width}")
    return _tried(encoder, pipeline)


def pixels_of(denoiser: nn.Module) -> Pixels:
    """The encoder of a network that works on pixels."""
    channels, classes = denoiser.config.in_channels, kinds.num_classes(settings_of(denoiser))
    return LabelledPixels(channels, classes) if classes else Pixels(channels)


def _tried(encoder: LatentsAndText, pipeline: Path) -> LatentsAndText:
    """The encoder, once its VAE has encoded and decoded an image."""
    with blaming(pipeline / "vae"):
        if encoder.image_channels not in CHANNELS:
            raise UserError(f"in_channels={encoder.image_channels}: images have 1 or 3 channels")
        side = 2 * encoder.factor
        pixels = torch.zeros(1, encoder.image_channels, side, side, dtype=torch.uint8)
        decoded = encoder.decode(encoder.moments(pixels)[:, : encoder.channels])
        if decoded.shape != pixels.shape:
            raise UserError(f"encodes and decodes {tuple(pixels.shape)} to {tuple(decoded.shape)}")
    return encoder


def _encoder_of(pipeline: Path, config: Mapping[str, Any]) -> Callable[..., LatentsAndText]:
    """What makes an encoder of a VAE, text encoders and tokenizers, by the denoiser's settings."""
    if kinds.is_xl(config):
        zeros = zeros_for_empty_prompt(pipeline)
        side = kinds.sample_size(config) * latent_factor(pipeline)
        return partial(LatentsAndTwoTexts, side=side, zeros_for_empty=zeros)
    if kinds.denoiser_class(config) == kinds.SD3:
        return partial(LatentsAndThreeTexts, width=kinds.text_width(config))
    if kinds.denoiser_class(config) == kinds.SANA:
        call = inspect.signature(diffusers.SanaPipeline.__call__)
        lines = call.parameters["complex_human_instruction"].default
        return partial(LatentsAndInstructedText, instruction="\n".join(lines))
    return FramesAndText if kinds.denoiser_class(config) == kinds.WAN else LatentsAndText


def _load_text(pipeline: Path, part: str, parts: Mapping[str, str]) -> tuple[nn.Module, Any]:
    """A text encoder, a part of the pipeline, and its tokenizer."""
    import transformers

    folder, kind = pipeline / part.replace("text_encoder", "tokenizer"), parts[part]
    text_encoder = _load_network(pipeline / part, getattr(transformers, kind), dtype=torch.float32)
    with blaming(folder):
        tokenizer = getattr(transformers, parts[folder.name]).from_pretrained(str(folder), local_files_only=True)
        if kind == GEMMA:
            tokenizer.padding_side = "right"  # as SanaPipeline sets it
        if tokenizer.padding_side != "right":
            raise UserError(f"padding_side={tokenizer.padding_side}: must be right, where texts are filled up")
        check_tokenizer(tokenizer, text_encoder.config.vocab_size)
        length = LENGTHS.get(kind, tokenizer.model_max_length)  # 1e30 where the folder names none
        if not isinstance(length, (int, float)) or not length >= LEAST_LENGTH:
            raise UserError(f"model_max_length={length}: must be a number of at least {LEAST_LENGTH}")
        most = length if kind in LENGTHS else text_encoder.config.max_position_embeddings
        tokenizer.model_max_length = int(min(length, most))
        tokenizer("", padding="max_length")  # fails without a token for it
    return text_encoder, tokenizer


def _load_network(folder: Path, kind: Any, **dtype: torch.dtype) -> Any:
    """A part of this class, all of its tensors in its file and finite."""
    with blaming(folder):
        variant = variant_of(weights_files(folder, STEMS[folder.name])[0])
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


def try_out(denoiser: nn.Module, process: Process, encoder: Encoder) -> None:
    """Predict once and take one step, so that parts that do not fit are found before anything is written."""
    channels = denoiser.config.in_channels
    settings = settings_of(denoiser)
    # it may have been made from settings, and not loaded
    kinds.check_settings(UNET, settings)
    kinds.check_settings("scheduler", process.scheduler.config)
    if channels != encoder.channels:
        raise UserError(f"in_channels={channels}: the encoder gives {encoder.channels}")
    condition = encoder.condition([""])  # load_encoder has tried it
    with blaming():
        size = kinds.sample_size(settings) or 2 * kinds.least_size(settings)
        images = torch.zeros(1, channels, size, size)
        last = torch.tensor([process.total - 1], dtype=process.dtype)
        with torch.no_grad():
            prediction = denoiser(images, last, **condition).sample
        target = process.target(images, images, last)
        if prediction.shape != target.shape:
            raise UserError(f"the network maps {tuple(target.shape)} to {tuple(prediction.shape)}")
        process.scheduler.step(prediction, process.scheduler.timesteps[0], images)
