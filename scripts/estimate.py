"""What a benchmark will take before it starts: disk below output_dir, and roughly how many GPU hours.

    python scripts/estimate.py --config configs/lsun_church.yaml

Opens the pretrained pipeline and the data (a Hub id is downloaded first) to count parameters, operations and images.
In the environment GPU_TFLOPS is the rate that one GPU reaches on these networks in 10¹² operations per second, and
NUM_PROCESSES the number of processes, which must be able to share a step.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deme.config.experiment import Config
from deme.errors import UserError
from deme.job.command import run_script
from deme.job.files import read_json
from deme.models.pipelines import unet_folder
from deme.models.variants import find_pretrained

GPU_TFLOPS = 50.0  # a guess for an A100 in half precision
INCEPTION_FLOPS = 11.4e9  # per image
FLOAT = 4  # bytes
PNG_SHARE = 0.75  # of the raw pixels
DISK_BLOCK = 4096  # bytes: the least that a file takes
ASPECT_RATIO = 4 / 3  # of photographs


def plan(config: Config) -> str:
    """What this command would do."""
    return f"estimate disk and GPU hours of {config.name}"


def main(config: Config) -> None:
    """Print the estimate."""
    from deme.data.sources import count_images

    rate = 1e12 * from_environment("GPU_TFLOPS", GPU_TFLOPS)
    config.finetune.check_shares(int(from_environment("NUM_PROCESSES", 1)))
    pretrained = find_pretrained(config.paths)
    images = count_images(config.data)
    parameters, flops, channels = unet_cost(read_json(unet_folder(pretrained) / "config.json"))
    print(f"{config.paths.pretrained}: {parameters:,} parameters; {config.data.name}: {images:,} images")

    # --- disk
    ranges = len(config.timesteps.ranges)
    raw = channels * config.data.resolution**2
    is_cached = config.data.cache_gb < images * raw / 2**30 <= config.data.cache_disk_gb
    decoded = images * raw * ASPECT_RATIO if is_cached else 0
    checkpoint = 4 * FLOAT * parameters  # student, EMA, two moments
    disk = {
        "decoded images": decoded,
        "finetuned networks": ranges * FLOAT * parameters,
        "their checkpoints": (ranges * config.finetune.checkpoints_kept + 1) * checkpoint,
        "merged network": FLOAT * parameters,
        "samples": config.sample.num_images * max(DISK_BLOCK, raw * PNG_SHARE),
    }
    for name, size in disk.items():
        print(f"{size / 1e9:9.1f} GB  {name}")
    existing = next(folder for folder in (config.paths.run, *config.paths.run.resolve().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    print(f"{sum(disk.values()) / 1e9:9.1f} GB  together; {free / 1e9:,.1f} GB are free at {config.output_dir}")

    # --- GPU hours: a backward pass costs two forward passes, the teacher and gradient checkpointing one each
    passes = 3 + (config.finetune.consistency_weight > 0) + config.finetune.gradient_checkpointing
    steps = ranges * config.finetune.max_steps
    work = {
        f"finetuning, {steps:,} steps of {config.finetune.batch_size} images": (
            steps * config.finetune.batch_size * passes * flops
        ),
        f"drawing {config.sample.num_images:,} images": (
            config.sample.num_images * config.sample.num_inference_steps * flops
        ),
        "statistics and FID": (images + config.sample.num_images) * INCEPTION_FLOPS,
    }
    for name, operations in work.items():
        print(f"{operations / rate / 3600:9.2f} GPU hours  {name}")
    total = sum(work.values()) / rate / 3600
    print(f"{total:9.2f} GPU hours together, at a guessed {rate / 1e12:g} TFLOP/s (GPU_TFLOPS sets another rate)")


def from_environment(name: str, default: float) -> float:
    """A number in the environment.

    Raises:
        UserError: not a number above 0.
    """
    try:
        value = float(os.environ.get(name, default))
    except ValueError:
        value = 0.0
    if value <= 0:
        raise UserError(f"{name}={os.environ[name]}: must be a number above 0")
    return value


def unet_cost(config: dict) -> tuple[int, int, int]:
    """Parameters, operations per image and forward pass, and channels of a UNet of this configuration."""
    import torch
    from diffusers import UNet2DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = UNet2DModel.from_config(config)
        size = unet.config.sample_size
        channels = unet.config.in_channels
        with FlopCounterMode(display=False) as counter:
            unet(torch.empty(1, channels, size, size), torch.zeros(1, dtype=torch.int64))
    return unet.num_parameters(), counter.get_total_flops(), channels


if __name__ == "__main__":
    run_script(__doc__, plan, main)
