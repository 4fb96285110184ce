"""Measure what the merge methods fisher and regmean need of each network in merge.experts, on training images.

    accelerate launch scripts/merge_statistics.py
    python merge.py merge.method=regmean merge.output=runs/digits/merged-regmean

Writes a file for each network to runs/<name>/finetuned/merge-statistics/. The expert of a range sees search.images
images at timesteps of its range, other networks at all timesteps. A file that is up to date is not measured again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import json
from functools import partial
from typing import Any

from deme.config.experiment import Config
from deme.job.command import run_script
from deme.job.files import atomic_file, make_folder
from deme.models.averages import merged_folders
from deme.models.pipelines import denoiser_folder, labels_of
from deme.models.variants import ModelFiles, find_pretrained
from deme.models.weights import save_tensors

STREAM = 8  # of the draws, apart from those of trainings and analyses
Range = tuple[int, int]  # [low, high) of timesteps


def plan(config: Config) -> str:
    """What this command would do."""
    names = "\n".join(f"  {network.name}" for network in config.merged_networks)
    return f"measure statistics of the following -> {config.paths.merge_statistics}\n{names}"


def main(config: Config) -> None:
    """Measure each network, unless it is done."""
    # --- inputs
    pretrained = find_pretrained(config.paths)
    folders = merged_folders(config, pretrained, config.merge.ema_width)
    inputs = ModelFiles(pretrained, [denoiser_folder(pretrained), *folders])
    inputs.check_fits(config)
    watched = inputs.watched()

    from deme.analysis import Material
    from deme.data.opening import data_hashes, open_source
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator
    from deme.method.merging._statistics import MADE_FROM, statistics_file
    from deme.models.lora import read_header

    source = open_source(config.data)
    made_of = data_hashes(source, config.paths.image_cache, labels_of(pretrained) > 0, True)
    made_of |= inputs.hashes() | inputs.architecture()
    accelerator = make_accelerator("no", "search")
    networks = dict(zip(["pretrained", *config.merged_names], inputs.denoisers, strict=True))
    material = Material(config, accelerator, pretrained, networks, source, made_of)
    watched.check()  # what was hashed was read

    # --- each network
    whole = (0, config.timesteps.num_train_timesteps)
    with locked_by_all(accelerator, config.paths.merge_statistics, "output_dir", wait=True):
        in_main_process(accelerator, partial(make_folder, config.paths.merge_statistics, "output_dir"))
        for network in config.merged_networks:
            file = statistics_file(config.paths.merge_statistics, material.hashes[network.name])
            edges = network.timesteps or whole
            header = {MADE_FROM: json.dumps(made_from(config, material.hashes[network.name], edges, made_of))}
            if in_main_process(accelerator, lambda file=file: file.is_file() and read_header(file)) == header:
                accelerator.print(f"{file} is complete")
                continue
            tensors = measured(material, network.name, edges)
            in_main_process(accelerator, partial(write, file, tensors, header))


def made_from(config: Config, weights: str, edges: Range, made_of: dict[str, str]) -> dict[str, Any]:
    """What statistics depend on."""
    examples = {f"data.{key}": value for key, value in config.data.tagged("examples").items()}
    dropout = {f"finetune.{key}": value for key, value in config.finetune.tagged("examples").items()}
    settings = {"seed": config.seed, "timesteps": edges, "search.images": config.search.images}
    return {"weights": weights, **settings, **examples, **dropout, **made_of}


def measured(material: Any, name: str, edges: Range) -> dict[str, Any]:
    """The tensors of a network's file."""
    from deme.measure.merge_statistics import measure_statistics
    from deme.measure.noisy import ENCODED_AT_ONCE, draw_probes
    from deme.method.merging._statistics import FISHER, PRODUCTS

    noiser, config = material.noisers["training"], material.config
    count = min(config.search.images, len(noiser.images))
    images = draw_probes(noiser, [edges], (config.seed, STREAM), range(count), ENCODED_AT_ONCE)
    material.network.load_state_dict(material.tensors(name))
    squares, products = measure_statistics(material.network, images, count, material.processes)
    named = {FISHER: squares, PRODUCTS: products}
    return {f"{kind}{key}": tensor.cpu() for kind, found in named.items() for key, tensor in found.items()}


def write(file: Path, tensors: dict[str, Any], header: dict[str, str]) -> None:
    """Write a network's file."""
    with atomic_file(file) as temporary:
        save_tensors(tensors, temporary, header)
    print(f"wrote {file}")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
