"""Decode and encode the data once, before many jobs read it: what finetune.py does first where that is not done yet.

    accelerate launch scripts/cache.py --config configs/lsun_church.yaml

Fills image-cache/ (data.cache_disk_gb) or latent-cache/ (data.cache_latents) in output_dir; data that fits into memory
is only read. Also tells what finetune.py would refuse: a network or data that does not fit the configuration, or
processes that can't share a step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deme.job.early  # noqa: F401  Ctrl-C may come while the rest is imported
from deme.config.experiment import Config
from deme.errors import naming
from deme.job.command import run_script
from deme.job.records import DATA
from deme.models.inputs import Inputs
from deme.models.pipelines import unet_folder
from deme.models.variants import find_pretrained


def plan(config: Config) -> str:
    """What this command would do."""
    return f"decode and encode {config.data.name} -> {config.paths.image_cache}, {config.paths.latent_cache}"


def main(config: Config) -> None:
    """Load the data as finetune.py does."""
    pipeline = find_pretrained(config.paths)
    inputs = Inputs(pipeline, [unet_folder(pipeline)])
    inputs.check_fits(config)

    from deme.data.examples import load_examples
    from deme.data.sources import data_fingerprint
    from deme.job.processes import make_accelerator
    from deme.models.encoders import load_encoder
    from deme.models.networks import load_unet

    accelerator = make_accelerator(config.finetune.mixed_precision, "finetune.mixed_precision")
    config.finetune.check_shares(accelerator.num_processes)
    with naming("model.pretrained", config.paths.pretrained):
        encoder = load_encoder(pipeline, load_unet(inputs.unets[0]))
    made_of = {DATA: data_fingerprint(config.data, with_captions=True), **inputs.hashes()}
    images = load_examples(config, config.finetune, encoder, made_of, accelerator).training
    accelerator.print(f"{config.data.name}: {len(images):,} images")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
