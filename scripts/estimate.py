"""Estimate the disk space below output_dir, a GPU's memory and the GPU hours of a benchmark before it starts.

    python scripts/estimate.py --config configs/lsun_church.yaml

Opens the pretrained pipeline and the data (a Hub id is downloaded) to count parameters, operations and images.
Environment variables: GPU_TFLOPS, the 10¹² operations per second that one GPU reaches on these networks; NUM_PROCESSES,
which must be able to share a step; MODELS, the models that are compared (default: "pretrained merged").
"""

import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deme.config.experiment import Config
from deme.config.networks import RANDOM, TRAJECTORY, makes_lora
from deme.config.schedules import other_schedules
from deme.config.sections import Sample
from deme.config.trainings import CONTINUED, DISTILLED, NEON, SELF, SOUP, Finetune
from deme.errors import UserError, naming
from deme.job.command import run_script
from deme.job.files import read_json
from deme.models.kinds import WAN, denoiser_class, is_xl, num_classes, text_width
from deme.models.pipelines import denoiser_folder, has_latents, labels_of, latent_factor, parts_of, takes_text
from deme.models.variants import find_pretrained

GPU_TFLOPS = 50.0  # a guess for an A100 in half precision
INCEPTION_FLOPS = 11.4e9  # per image
FLOAT = 4  # bytes
HALF = 2  # bytes, of latents that a GPU encodes
TOKENS = 77  # of a caption
SIZES = 6  # numbers with which Stable Diffusion XL describes a crop
PNG_SHARE = 0.75  # of the raw pixels
DISK_BLOCK = 4096  # bytes: the least that a file takes
REPORTED = 6  # models that a search's report compares, at most
ASPECT_RATIO = 4 / 3  # of photographs


def plan(config: Config) -> str:
    """What this command would do."""
    return f"estimate disk and GPU hours of {config.name}"


@dataclass(frozen=True)
class Size:
    """The sizes behind the estimate: networks, images and models."""

    parameters: int
    trained: int  # parameters of a training
    buffers: int  # numbers of the network that are no parameters, as embeddings of positions
    flops: int  # of a UNet pass per image
    channels: int  # of an image
    coding: float  # operations to encode or decode an image
    encoded: int  # bytes of an encoded image with its caption
    coders: int  # parameters of the VAE and the text encoders
    passes: Callable[[Sample], int]  # through the UNet for an image that is drawn
    images: int  # of the data
    models: list[str]


def main(config: Config) -> None:
    """Print the estimate."""
    from deme.data.opening import open_source

    rate = 1e12 * from_environment("GPU_TFLOPS", GPU_TFLOPS)
    config.finetune.check_shares(int(from_environment("NUM_PROCESSES", 1)))
    pretrained = find_pretrained(config.paths)
    size = Size(
        *unet_cost(
            read_json(denoiser_folder(pretrained) / "config.json"),
            config.finetune,
            config.data.resolution // latent_factor(pretrained),
        ),
        *encoder_cost(pretrained, config.data.resolution),
        passes=passes_through(pretrained),
        images=len(open_source(config.data)),
        models=os.environ.get("MODELS", "pretrained merged").split(),
    )
    print(f"{config.paths.pretrained}: {size.parameters:,} parameters; {config.data.name}: {size.images:,} images")

    disk = disk_space(config, size)
    for name, taken in disk.items():
        print(f"{taken / 1e9:9.1f} GB  {name}")
    folder = config.paths.run_folder
    existing = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    print(f"{sum(disk.values()) / 1e9:9.1f} GB  together; {free / 1e9:,.1f} GB are free at {config.output_dir}")
    for name, taken in gpu_memory(config.finetune, size, config.data.cache_latents).items():
        print(f"{taken / 1e9:9.1f} GB  of each GPU's memory: {name}")

    work = {name: flops / rate / 3600 for name, flops in operations(config, size).items() if flops > 0}
    for name, hours in work.items():
        print(f"{hours:9.2f} GPU hours  {name}")
    total = sum(work.values())
    print(f"{total:9.2f} GPU hours together, at a guessed {rate / 1e12:g} TFLOP/s (GPU_TFLOPS sets another rate)")


def own_networks(config: Config, size: Size) -> int:
    """The number of networks that are trained on own samples."""
    has_own = NEON in size.models or SELF in config.merge.experts
    return has_own * len(config.self_trained_names)


def control_and_soup(config: Config, size: Size) -> list[str]:
    """The trainings on all timesteps of the data."""
    has_control = CONTINUED in size.models or TRAJECTORY in config.merge.experts
    return [CONTINUED] * has_control + config.soup_names * (SOUP in config.merge.experts)


def disk_space(config: Config, size: Size) -> dict[str, float]:
    """Bytes of everything that is written."""
    data = config.data
    raw = size.channels * data.resolution**2
    is_cached = data.cache_gb < size.images * raw / 2**30 <= data.cache_disk_gb
    trained = [*config.timesteps.names, *control_and_soup(config, size), *[DISTILLED] * (DISTILLED in size.models)]
    trained += config.self_trained_names * (own_networks(config, size) > 0)
    images = len(size.models) * config.sample.num_images * len(config.schedule_names)
    images += (own_networks(config, size) > 0) * config.self_training.num_images
    network, trained_bytes, is_lora = FLOAT * size.parameters, FLOAT * size.trained, makes_lora(config)
    # at most: merge.lora_rank truncates it; the distilled LoRA is as large
    merged = min(network, trained_bytes * len(config.merged_names)) if is_lora else network
    written = sum(merged if name == DISTILLED else trained_bytes for name in trained)
    widths = len(config.search.ema_widths) + (config.merge.ema_width is not None)
    averages = len(config.finetune.ema_profiles) * network
    drawn = size.channels * (config.sample.size_on_disk or data.resolution) ** 2
    return {
        "decoded images": size.images * raw * ASPECT_RATIO * is_cached,
        "encoded images and captions": size.images * size.encoded * data.cached_views * data.cache_latents,
        "finetuned networks": written,
        "random directions": (RANDOM in config.merge.experts) * len(config.timesteps.ranges) * network,
        "their snapshots": sum(len(config.snapshots(name)) for name in trained) * (network // 2 + averages),
        # student, EMA, two moments
        "their checkpoints": config.finetune.checkpoints_kept * (4 * written + len(trained) * averages)
        + 4 * trained_bytes
        + averages,
        "networks of an EMA width": network * len(config.merged_names) * widths,
        "merged networks": merged * (1 + (NEON in size.models)),
        "samples": images * max(DISK_BLOCK, drawn * PNG_SHARE),
    }


def gpu_memory(settings: Finetune, size: Size, is_cached: bool) -> dict[str, float]:
    """Bytes that finetuning holds on each GPU beside activations, which depend on the micro-batch."""
    half = FLOAT if settings.mixed_precision == "no" else HALF
    is_lora = settings.lora_rank is not None
    base = is_lora * (size.parameters * (FLOAT if settings.base_precision is None else HALF) + FLOAT * size.buffers)
    teacher = 0 if is_lora or settings.consistency_weight == 0 else half * size.parameters  # a LoRA's is its base
    held = {
        "frozen weights": base + teacher,
        "trained weights, gradient, EMA and AdamW's two moments": 5 * FLOAT * size.trained,
        "VAE and text encoders" + ", while a preview is drawn" * is_cached: half * size.coders,
    }
    return {name: taken for name, taken in held.items() if taken > 0}


def operations(config: Config, size: Size) -> dict[str, float]:
    """Operations of every stage, 0 for those left out.

    A backward pass costs two forward passes, or one where the weights are frozen but for a LoRA; the teacher and
    gradient checkpointing cost one each.
    """
    settings, search, flops = config.finetune, config.search, size.flops
    gradient = settings.gradient_passes + settings.gradient_checkpointing
    steps = len(config.timesteps.ranges) * settings.max_steps
    seen = steps * settings.batch_size
    distilled = (DISTILLED in size.models) * config.distill.max_steps * settings.batch_size
    control = sum(map(config.steps_of, control_and_soup(config, size))) * settings.batch_size
    own = own_networks(config, size) * settings.max_steps * settings.batch_size
    coded = seen + control + distilled + own
    if config.data.cache_latents:
        coded = size.images * config.data.cached_views
    has_finals = search.method == "multi_fidelity"
    searched = search.control_images + search.trials * search.num_images
    searched += has_finals * search.finalists * search.finalist_images
    schedules = config.schedules_of(search)
    searched *= config.needs_search and (search.objective == "fd" or has_finals)  # others draw no images
    reported = config.needs_search * search.report_images * REPORTED
    others = 0
    for one in other_schedules(config):
        with suppress(UserError):  # a report leaves out what the noise schedule lacks
            others += size.passes(one)
    also = sum(map(size.passes, schedules)) + others if search.schedules or others else 0
    pairs = 2 * config.needs_search * search.report_images * also
    of_sample = config.schedules_of(config.sample)
    of_schedule = len(size.models) * config.sample.num_images
    drawn = of_schedule * len(of_sample)
    own_sample = replace(config.sample, num_inference_steps=config.own_sample_steps)
    image = size.passes(config.sample) * flops + size.coding
    candidate = sum(map(size.passes, schedules)) * flops + len(schedules) * size.coding
    expert = gradient + (settings.consistency_weight > 0)
    return {
        f"finetuning, {steps:,} steps of {settings.batch_size} images": seen * expert * flops,
        "training on all timesteps": control * gradient * flops,
        "distilling, each image through its expert": distilled * (gradient + 1) * flops,
        "drawing own samples": (own > 0) * config.self_training.num_images * size.passes(own_sample) * flops,
        "training on them": own * gradient * flops,
        "encoding images": coded * size.coding,
        f"searching, {searched:,} images of candidates": searched * candidate,
        f"reporting on the search, {reported:,} images": reported * image + pairs * flops,
        f"drawing {drawn:,} images": of_schedule * sum(map(size.passes, of_sample)) * flops + drawn * size.coding,
        "statistics and FID": (size.images + drawn + searched + reported) * INCEPTION_FLOPS,
    }


def from_environment(name: str, default: float) -> float:
    """A number in the environment."""
    try:
        value = float(os.environ.get(name, default))
    except ValueError:
        value = 0.0
    if value <= 0:
        raise UserError(f"{name}={os.environ[name]}: must be a number above 0")
    return value


def passes_through(pipeline: Path) -> Callable[[Sample], int]:
    """How many passes through a pipeline's network an image takes."""
    from deme.models.denoisers import load_scheduler
    from deme.models.drawing import passes_of

    scheduler, takes_condition = load_scheduler(pipeline), takes_text(pipeline) or labels_of(pipeline) > 0

    def passes(settings: Sample) -> int:
        with naming("sample.scheduler", settings.scheduler):
            return passes_of(settings, scheduler, takes_condition)

    return passes


def unet_cost(config: dict, finetune: Finetune, size: int | None = None) -> tuple[int, int, int, int]:
    """Parameters, those that are trained, buffers, and operations per image and pass of a network's configuration.

    `size` are the entries along a side that it works on, by default `sample_size`.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from deme.models.adapters import new_lora
    from deme.models.denoisers import make_denoiser

    with torch.device("meta"):
        unet = make_denoiser({"_class_name": "UNet2DModel"} | config)
        size = size or unet.config.sample_size
        condition = {
            name: torch.empty(1, *shape) for name, shape in condition_shapes({**unet.config, **config}).items()
        }
        if num_classes({**unet.config, **config}):
            condition["class_labels"] = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            unet(torch.empty(1, unet.config.in_channels, size, size), torch.zeros(1, dtype=torch.int64), **condition)
        student = unet if finetune.lora_rank is None else new_lora(unet, finetune)
    buffers = sum(buffer.numel() for buffer in unet.buffers())
    return unet.num_parameters(), student.num_parameters(only_trainable=True), buffers, counter.get_total_flops()


def condition_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's further arguments for an image, by name."""
    from deme.models.encoders import GEMMA, LENGTHS, T5, UMT5

    width = text_width(settings)
    if "joint_attention_dim" in settings:
        pooled = {"pooled_projections": (settings["pooled_projection_dim"],)}
        return {"encoder_hidden_states": (TOKENS + LENGTHS[T5], width)} | pooled
    if "caption_channels" in settings:
        length = LENGTHS[GEMMA]
        return {"encoder_hidden_states": (length, width), "encoder_attention_mask": (length,)}
    if "text_dim" in settings:
        return {"encoder_hidden_states": (LENGTHS[UMT5], width)}
    if is_xl(settings):
        pooled = settings["projection_class_embeddings_input_dim"] - SIZES * settings["addition_time_embed_dim"]
        return {"encoder_hidden_states": (TOKENS, width), "text_embeds": (pooled,), "time_ids": (SIZES,)}
    return {} if width is None else {"encoder_hidden_states": (TOKENS, width)}


def encoder_cost(pipeline: Path, resolution: int) -> tuple[int, float, int, int]:
    """Channels of an image, operations to encode or decode it, bytes of it encoded, with a caption, and parameters."""
    settings = read_json(denoiser_folder(pipeline) / "config.json")
    if not has_latents(pipeline):
        return settings["in_channels"], 0.0, 0, 0
    import diffusers
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    from deme.models.encoders import LENGTHS, T5

    parts = parts_of(pipeline, settings)
    with torch.device("meta"):
        vae = getattr(diffusers, parts["vae"]).from_config(read_json(pipeline / "vae" / "config.json"))
        texts = {part: getattr(transformers, kind) for part, kind in parts.items() if part.startswith("text_encoder")}
        texts = [kind(kind.config_class.from_pretrained(pipeline / part)) for part, kind in texts.items()]
        channels = vae.config.in_channels
        frames = [1] * (denoiser_class(settings) == WAN)  # a video's axis
        with FlopCounterMode(display=False) as counter:
            encoded = vae.encode(torch.empty(1, channels, *frames, resolution, resolution))
            latents = encoded.latent if "latent" in encoded else encoded.latent_dist.parameters
            vae.decode(latents if "latent" in encoded else encoded.latent_dist.mean)
    shapes = condition_shapes(settings)
    entries = latents.numel() + sum(map(math.prod, shapes.values()))
    if "pooled_projections" in shapes and "text_encoder_3" not in parts:
        entries -= LENGTHS[T5] * shapes["encoder_hidden_states"][1]  # zeros, which are not cached
    return channels, counter.get_total_flops() / 2, HALF * entries, sum(part.num_parameters() for part in (vae, *texts))


if __name__ == "__main__":
    run_script(__doc__, plan, main)
