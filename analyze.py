"""Look at a run: gradient conflict, loss by timestep, task vectors, loss landscape, changed activations.

    accelerate launch analyze.py
    accelerate launch analyze.py "analyze.analyses=[gradient_conflict]"      # needs nothing but the pretrained network
    accelerate launch analyze.py "analyze.analyses=[landscape]" "analyze.landscape_ranges=[0,1]" \
        analyze.output=runs/digits/analysis-0-1

Writes arrays and tables to runs/<name>/analysis/, pictures to runs/<name>/plots/analysis-*.png. Arrays that are up to
date are not measured again, and the same command again resumes after an interruption. The pretrained network and the
experts must be there; other networks that are not made yet are left out. docs/analysis.md explains the pictures.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from deme.config.experiment import Config
from deme.config.sections import ANALYSES
from deme.config.trainings import GRADIENT_PASSES
from deme.config.trainings import CONTINUED, DISTILLED, NEON
from deme.errors import UserError
from deme.job.command import run_script
from deme.job.files import make_folder, write_text
from deme.models.pipelines import denoiser_folder, labels_of
from deme.models.weights import has_weights
from deme.models.trained import check_predicts, check_trained, tell_other_bases
from deme.models.variants import MAKERS, ModelFiles, find_pretrained, made_denoisers

OF_RANGES = ("loss_by_timestep", "activation_change")  # analyses of the ranges' experts, whatever is merged


def plan(config: Config) -> str:
    """What this command would do."""
    config.check_analyzed()
    networks = 1 + len({*config.analyzed_experts, *made_later(config)[0]})
    lines = [f"  {name}: {passes:,} UNet passes" for name, passes in unet_passes(config, networks).items()]
    return "\n".join([f"analyze {config.paths.run_folder} -> {config.paths.analysis}", *lines])


def main(config: Config) -> None:
    """Measure, draw, print."""
    # --- inputs
    config.check_analyzed()
    settings, paths = config.analyze, config.paths
    pretrained = find_pretrained(paths)
    networks = {"pretrained": denoiser_folder(pretrained)}
    missing: list[str] = []
    if settings.analyses != ["gradient_conflict"]:
        experts = config.analyzed_experts
        networks |= dict(zip(experts, check_trained(pretrained, [*experts.values()]), strict=True))
        later, missing = made_later(config)
        networks |= later
    inputs = ModelFiles(pretrained, check_predicts(pretrained, list(networks.values())))
    inputs.check_fits(config)
    watched = inputs.watched()

    # --- torch is imported after what can be answered without it
    from deme.analysis import Material
    from deme.data.opening import data_hashes, open_source
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator

    source = open_source(config.data)
    made_of = data_hashes(source, paths.image_cache, labels_of(pretrained) > 0, with_captions=True)
    made_of |= inputs.hashes() | inputs.architecture()
    accelerator = make_accelerator("no", "analyze")
    material = Material(config, accelerator, pretrained, networks, source, made_of)
    watched.check()  # what was hashed was read
    tell_other_bases(networks["pretrained"], material.hashes["pretrained"], list(networks.values())[1:])

    # --- tell the cost
    for line in missing:
        accelerator.print(f"left out: {line}")
    passes = unet_passes(config, len(networks))
    for name, count in passes.items():
        accelerator.print(f"{name}: {count:,} UNet passes, less what is kept in {paths.analysis}")

    # --- measure, and draw each analysis as soon as it is measured
    key = "output_dir" if settings.output is None else "analyze.output"
    with locked_by_all(accelerator, paths.analysis, key):
        in_main_process(accelerator, lambda: make_folder(paths.analysis, "analyze.output"))
        in_main_process(accelerator, lambda: make_folder(paths.plots, "output_dir"))
        left_out = () if networks.keys() >= set(material.range_names) else OF_RANGES
        for name in [name for name in passes if name not in left_out]:
            analysis = import_module(f"deme.analysis.{name}")
            arrays = analysis.measure(material)
            in_main_process(accelerator, partial(show, analysis, arrays, material))


def unet_passes(config: Config, networks: int) -> dict[str, int]:
    """The chosen analyses, and what they cost for so many networks in images through the UNet."""
    settings, ranges = config.analyze, len(config.timesteps.ranges)
    passes = {
        "gradient_conflict": GRADIENT_PASSES * settings.timesteps * settings.images,
        "loss_by_timestep": networks * settings.timesteps * settings.images,
        "task_vectors": 0,
        "landscape": (settings.landscape_points**2 + 3) * settings.landscape_images,
        "activation_change": 2 * ranges * settings.images,
    }
    return {name: passes[name] for name in ANALYSES if settings.analyses is None or name in settings.analyses}


def made_later(config: Config) -> tuple[dict[str, Path], list[str]]:
    """UNet folders, by name, of networks that the analyses do without; which of them are missing."""
    places = {name: made_denoisers(name, config.paths)[0] for name in (CONTINUED, "merged", DISTILLED, NEON)}
    made = {name: folder for name, folder in places.items() if has_weights(folder)}
    missing = [f"{name}, which {MAKERS[name]} makes" for name in places if name not in made]
    with suppress(UserError):  # networks of other ranges are merged
        of_ranges = dict(zip(config.timesteps.names, config.paths.experts, strict=True))
        if all(map(has_weights, of_ranges.values())):
            return of_ranges | made, missing
    return made, [*missing, f"{', '.join(OF_RANGES)}: need the experts of all ranges"]


def show(analysis: ModuleType, arrays: dict[str, Any], material: Any) -> None:
    """Print a table, write it to NAME.md, and draw pictures."""
    from deme.report.figures import save_figure

    paths = material.config.paths
    table, figures = analysis.report(arrays, material)
    files = [paths.analysis / f"{analysis.__name__.rpartition('.')[2]}.md"]
    write_text(files[0], f"{table}\n")
    for name, figure in figures.items():
        files.append(paths.plots / f"analysis-{name}.png")
        save_figure(figure, files[-1])
    print(f"\n{table}\n", *files, sep="\n")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
