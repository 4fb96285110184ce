"""What a benchmark will take before it starts: disk below output_dir, and roughly how many GPU hours.

    python scripts/estimate.py --config configs/lsun_church.yaml

Opens the pretrained pipeline and the data (a Hub id is downloaded first) to count parameters, operations and images.
In the environment GPU_TFLOPS is the rate that one GPU reaches on these networks in 10¹² operations per second, and
NUM_PROCESSES the number of processes, which must be able to share a step; MODELS the models that are compared
("pretrained merged").
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deme.config.experiment import Config
from deme.config.sections import CONTINUED, DISTILLED
from deme.errors import UserError
from deme.job.command import run_script
from deme.job.files import read_json
from deme.models.pipelines import denoiser_folder, takes_text
from deme.models.variants import find_pretrained

GPU_TFLOPS = 50.0  # a guess for an A100 in half precision
INCEPTION_FLOPS = 11.4e9  # per image
FLOAT = 4  # bytes
HALF = 2  # bytes, of latents that a GPU encodes
TOKENS = 77  # of a caption
PNG_SHARE = 0.75  # of the raw pixels
DISK_BLOCK = 4096  # bytes: the least that a file takes
REPORTED = 6  # models that a search's report compares, at most
ASPECT_RATIO = 4 / 3  # of photographs


def plan(config: Config) -> str:
    """What this command would do."""
    return f"estimate disk and GPU hours of {config.name}"


def main(config: Config) -> None:
    """Print the estimate."""
    from deme.data.opening import open_source

    rate = 1e12 * from_environment("GPU_TFLOPS", GPU_TFLOPS)
    config.finetune.check_shares(int(from_environment("NUM_PROCESSES", 1)))
    pretrained = find_pretrained(config.paths)
    images = len(open_source(config.data).rows)
    parameters, flops = unet_cost(read_json(denoiser_folder(pretrained) / "config.json"))
    channels, coding, encoded = encoder_cost(pretrained, config.data.resolution)
    print(f"{config.paths.pretrained}: {parameters:,} parameters; {config.data.name}: {images:,} images")

    # --- disk
    models = os.environ.get("MODELS", "pretrained merged").split()
    has_control, has_distilled = CONTINUED in models, DISTILLED in models
    ranges = len(config.timesteps.ranges)
    trained = ranges + has_control + has_distilled
    raw = channels * config.data.resolution**2
    is_cached = config.data.cache_gb < images * raw / 2**30 <= config.data.cache_disk_gb
    decoded = images * raw * ASPECT_RATIO if is_cached else 0
    checkpoint = 4 * FLOAT * parameters  # student, EMA, two moments
    drawn = channels * (config.sample.size_on_disk or config.data.resolution) ** 2
    disk = {
        "decoded images": decoded,
        "encoded images and captions": images * encoded * config.data.cached_views if config.data.cache_latents else 0,
        "finetuned networks": trained * FLOAT * parameters,
        "their checkpoints": (trained * config.finetune.checkpoints_kept + 1) * checkpoint,
        "merged network": FLOAT * parameters,
        "samples": len(models) * config.sample.num_images * max(DISK_BLOCK, drawn * PNG_SHARE),
    }
    for name, size in disk.items():
        print(f"{size / 1e9:9.1f} GB  {name}")
    existing = next(folder for folder in (config.paths.run, *config.paths.run.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    print(f"{sum(disk.values()) / 1e9:9.1f} GB  together; {free / 1e9:,.1f} GB are free at {config.output_dir}")

    # --- GPU hours: a backward pass costs two forward passes, the teacher and gradient checkpointing one each
    passes = 3 + (config.finetune.consistency_weight > 0) + config.finetune.gradient_checkpointing
    steps = ranges * config.finetune.max_steps
    seen = steps * config.finetune.batch_size
    per_step = 1 + (takes_text(pretrained) and config.sample.guidance_scale != 1)
    calls, in_search = (steps * per_step for steps in (config.sample.num_inference_steps, config.search_steps))
    searched, reported = searched_images(config)
    count = len(models) * config.sample.num_images
    distilled = has_distilled * config.distill.max_steps * config.finetune.batch_size
    coded = images * config.data.cached_views if config.data.cache_latents else seen * (1 + has_control) + distilled
    work = {
        f"finetuning, {steps:,} steps of {config.finetune.batch_size} images": seen * passes * flops,
        "the control, as many": seen * (3 + config.finetune.gradient_checkpointing) * flops * has_control,
        "distilling, each image through its expert": distilled * (4 + config.finetune.gradient_checkpointing) * flops,
        "encoding images": coded * coding,
        f"searching, {searched:,} images of candidates": searched * (in_search * flops + coding),
        f"reporting on the search, {reported:,} images": reported * (calls * flops + coding),
        f"drawing {count:,} images": count * (calls * flops + coding),
        "statistics and FID": (images + count + searched + reported) * INCEPTION_FLOPS,
    }
    work = {name: operations for name, operations in work.items() if operations > 0}
    for name, operations in work.items():
        print(f"{operations / rate / 3600:9.2f} GPU hours  {name}")
    total = sum(work.values()) / rate / 3600
    print(f"{total:9.2f} GPU hours together, at a guessed {rate / 1e12:g} TFLOP/s (GPU_TFLOPS sets another rate)")


def searched_images(config: Config) -> tuple[int, int]:
    """Images that search.py draws to find the coefficients, and those of its report."""
    search = config.search
    if not config.paths.searched:
        return 0, 0
    drawn = search.control_images + search.trials * search.num_images
    if search.method == "multi_fidelity":
        drawn += search.finalists * search.finalist_images
    elif search.objective != "fd":
        drawn = 0
    return drawn, search.report_images * REPORTED


def from_environment(name: str, default: float) -> float:
    """A number in the environment."""
    try:
        value = float(os.environ.get(name, default))
    except ValueError:
        value = 0.0
    if value <= 0:
        raise UserError(f"{name}={os.environ[name]}: must be a number above 0")
    return value


def unet_cost(config: dict) -> tuple[int, int]:
    """Parameters and operations per image and forward pass of a UNet of this configuration."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from deme.models.denoisers import DENOISER_CLASSES

    with torch.device("meta"):
        unet = DENOISER_CLASSES[config.get("_class_name", "UNet2DModel")].from_config(config)
        size = unet.config.sample_size
        width = unet.config.get("cross_attention_dim")
        condition = {} if width is None else {"encoder_hidden_states": torch.empty(1, TOKENS, width)}
        with FlopCounterMode(display=False) as counter:
            unet(torch.empty(1, unet.config.in_channels, size, size), torch.zeros(1, dtype=torch.int64), **condition)
    return unet.num_parameters(), counter.get_total_flops()


def encoder_cost(pipeline: Path, resolution: int) -> tuple[int, float, int]:
    """Channels of an image, operations to encode or decode it, and bytes of it encoded, with a caption."""
    unet = read_json(denoiser_folder(pipeline) / "config.json")
    if not takes_text(pipeline):
        return unet["in_channels"], 0.0, 0
    import torch
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(read_json(pipeline / "vae" / "config.json"))
        channels = vae.config.in_channels
        with FlopCounterMode(display=False) as counter:
            latents = vae.encode(torch.empty(1, channels, resolution, resolution)).latent_dist.parameters
            vae.decode(latents[:, : vae.config.latent_channels])
    size = HALF * (latents.numel() + TOKENS * unet["cross_attention_dim"])
    return channels, counter.get_total_flops() / 2, size


if __name__ == "__main__":
    run_script(__doc__, plan, main)
