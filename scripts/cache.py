"""Decode and encode the data once, before many jobs read it; finetune.py would otherwise do so first.

    accelerate launch scripts/cache.py --config configs/lsun_church.yaml

Fills image-cache/ (data.cache_disk_gb) or latent-cache/ (data.cache_latents) in output_dir; data that fits into memory
is only read. Also tells what finetune.py would refuse: a network or data that does not fit the configuration, or
processes that can't share a step.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deme.job.early  # noqa: F401  Ctrl-C may come while the rest is imported
from deme.config.experiment import Config
from deme.job.command import run_script
from deme.models.pipelines import denoiser_folder, labels_of
from deme.models.variants import ModelFiles, find_pretrained
from deme.training.session import Session


def plan(config: Config) -> str:
    """What this command would do."""
    return f"decode and encode {config.data.name} -> {config.paths.image_cache}, {config.paths.latent_cache}"


def main(config: Config) -> None:
    """Load the data as finetune.py does."""
    pipeline = find_pretrained(config.paths)
    inputs = ModelFiles(pipeline, [denoiser_folder(pipeline)])
    inputs.check_fits(config)

    from deme.training.state import load_networks
    from deme.training.trainer import open_training

    load = partial(load_networks, inputs, "model.pretrained", config.paths.pretrained, config.timesteps)
    session = Session(config, config.finetune)
    session.takes_labels = labels_of(pipeline) > 0
    accelerator, _, images = open_training(session, load, inputs.watched(), inputs.hashes())
    accelerator.print(f"{config.data.name}: {len(images.training):,} images")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
