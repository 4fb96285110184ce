"""Look at a run: gradient conflict, loss by timestep, task vectors, loss landscape, changed activations.

    accelerate launch analyze.py
    accelerate launch analyze.py "analyze.analyses=[gradient_conflict]"      # needs nothing but the pretrained network
    accelerate launch analyze.py "analyze.analyses=[landscape]" "analyze.landscape_ranges=[0,1]" \
        analyze.output=runs/digits/analysis-0-1

Writes arrays and tables to runs/<name>/analysis/, pictures to runs/<name>/plots/analysis-*.png. What is kept there is
not measured again; the same command again resumes what was interrupted. Networks that are not made yet are left out,
but for the pretrained one and the experts. docs/analysis.md says what to see in the pictures.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.sections import CONTINUED, DISTILLED, GRADIENT_PASSES, range_name
from deme.job.command import run_script
from deme.job.files import atomic_file, make_folder
from deme.method.coefficients import PUBLISHED
from deme.models.pipelines import denoiser_folder
from deme.models.searched import read_searched
from deme.models.variants import MAKERS, ModelFiles, find_finetuned, find_pretrained, made_denoisers
from deme.models.weights import has_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deme.job.arrays import Arrays, Keep
    from deme.measure.material import Material


def plan(config: Config) -> str:
    """What this command would do."""
    config.check_analyzed()
    lines = [f"  {name}: {passes:,} UNet passes" for name, passes in costs(config, len(found_later(config)[0])).items()]
    return "\n".join([f"analyze {config.paths.run} -> {config.paths.analysis}", *lines])


def main(config: Config) -> None:
    """Measure, draw, print."""
    # --- inputs
    config.check_analyzed()
    settings = config.analyze
    output = config.paths.analysis
    pretrained = find_pretrained(config.paths)
    networks = {"pretrained": denoiser_folder(pretrained)}
    left_out: list[str] = []
    if settings.chosen != ["gradient_conflict"]:
        experts = find_finetuned(config.paths)
        networks |= {range_name(edges): folder for edges, folder in zip(config.timesteps.ranges, experts, strict=True)}
        later, left_out = found_later(config)
        networks |= later
    inputs = ModelFiles(pretrained, list(networks.values()))
    inputs.check_fits(config)
    watched = inputs.watched()

    # --- torch is imported after what can be answered without it
    from deme.data.sources import data_hashes
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator
    from deme.measure.material import Material

    # --- what it is made from
    made_of = data_hashes(config.data, config.paths.image_cache, with_captions=True) | inputs.hashes()
    accelerator = make_accelerator("no", "analyze")
    material = Material(config, accelerator, pretrained, networks, made_of)
    watched.check()  # what was hashed was read

    # --- measure, and draw each analysis once it is there
    for line in left_out:
        accelerator.print(f"left out: {line}")
    for name, passes in costs(config, len(networks) - 1 - len(config.timesteps.ranges)).items():
        accelerator.print(f"{name}: {passes:,} UNet passes, less what is kept in {output}")
    analyses = (gradient_conflict, loss_by_timestep, task_vectors, landscape, activation_change)
    with locked_by_all(accelerator, output, "output_dir" if settings.output is None else "analyze.output"):
        in_main_process(accelerator, lambda: make_folder(output, "analyze.output"))
        in_main_process(accelerator, lambda: make_folder(config.paths.plots, "output_dir"))
        for analysis in analyses:
            if analysis.__name__ in settings.chosen:
                shown = analysis(material)
                in_main_process(accelerator, lambda name=analysis.__name__, shown=shown: show(config, name, *shown))


def found_later(config: Config) -> tuple[dict[str, Path], list[str]]:
    """The networks that were made of or beside the experts, by name, and lines that tell which are not there."""
    places = {name: made_denoisers(name, config.paths)[0] for name in (CONTINUED, "merged", DISTILLED)}
    found = {name: folder for name, folder in places.items() if has_weights(folder)}
    return found, [f"{name}, which {MAKERS[name]} makes" for name in places if name not in found]


def costs(config: Config, later: int) -> dict[str, int]:
    """Analysis → what it takes, in images through the UNet.

    Args:
        later: how many networks there are beside the pretrained one and the experts.
    """
    settings = config.analyze
    ranges = len(config.timesteps.ranges)
    passes = {
        "gradient_conflict": GRADIENT_PASSES * settings.timesteps * settings.images,
        "loss_by_timestep": (1 + ranges + later) * settings.timesteps * settings.images,
        "task_vectors": 0,
        "landscape": (settings.landscape_points**2 + 3) * settings.landscape_images,
        "activation_change": 2 * ranges * settings.images,
    }
    return {name: passes[name] for name in settings.chosen}


Shown = tuple[str, "dict[str, Callable[[], Figure]]"]  # a table in Markdown; names of pictures, and what draws them


def gradient_conflict(material: "Material") -> Shown:
    """Cosines of the loss's gradients at pairs of timesteps, of the pretrained network."""
    from deme.measure.conflict import gradient_conflict
    from deme.report import analysis_plots, analysis_tables

    settings = material.config.analyze
    timesteps = material.config.analyzed_timesteps

    def make(keep: "Keep") -> "Arrays":
        import numpy as np

        network = material.load("pretrained").requires_grad_(True)
        images = material.clean(material.data.training, 0)
        found = gradient_conflict(network, images, timesteps, settings.sketch, material.accelerator, keep)
        return found | {"images": np.array(images.count)}

    found = material.keep_parts("gradient_conflict", ["pretrained"], ("timesteps", "images", "sketch"), make)
    exact = "exact gradients" if found["exact"].all() else f"sketches of {settings.sketch:,} dimensions per block"
    note = f"{len(timesteps)} timesteps × {found['images']} training images in two halves, {exact}"
    return analysis_tables.gradient_conflict(found, timesteps, material.ranges, note), {
        "gradient-conflict": lambda: analysis_plots.conflict_map(found, timesteps, material.ranges, note),
        "gradient-densities": lambda: analysis_plots.conflict_densities(found, timesteps, material.ranges, note),
        "gradient-blocks": lambda: analysis_plots.conflict_by_block(found, timesteps, material.ranges, note),
    }


def loss_by_timestep(material: "Material") -> Shown:
    """The denoising loss of all networks, relative to the pretrained one's."""
    import numpy as np

    from deme.measure.loss_by_timestep import ensemble_losses, losses_by_timestep
    from deme.report import analysis_plots, analysis_tables

    timesteps = material.config.analyzed_timesteps
    drawn: list = []

    def make(name: str) -> "Arrays":
        if not drawn:
            drawn.append(material.clean(material.measured_images, 1))
        material.network.load_state_dict(material.tensors(name))
        return {"losses": losses_by_timestep(material.network, drawn[0], timesteps, material.accelerator)}

    keys = ("timesteps", "images")
    losses = {
        name: material.keep(f"loss_by_timestep-{name}", [name], keys, lambda name=name: make(name))["losses"]
        for name in material.networks
    }
    losses["ensemble"] = ensemble_losses([losses[name] for name in material.experts], timesteps, material.ranges)
    rows = [name for name in ("pretrained", CONTINUED, "ensemble", "merged", DISTILLED) if name in losses]
    models = {name: losses[name] for name in (*rows, *material.experts)}
    images = losses["pretrained"].shape[1]
    note = f"{len(timesteps)} timesteps × {images} {material.measured_on} images, the same noise for all networks"
    at = np.array(timesteps)
    return analysis_tables.loss_by_timestep(models, at, material.ranges, note), {
        "loss-by-timestep": lambda: analysis_plots.loss_by_timestep(models, at, material.ranges, material.experts, note)
    }


def task_vectors(material: "Material") -> Shown:
    """Norms, cosines, values and signs of what finetuning added to the weights."""
    from deme.job.processes import in_main_process
    from deme.measure.task_vector_statistics import task_vector_statistics
    from deme.report import analysis_plots, analysis_tables

    names = [name for name in material.networks if name != "pretrained"]

    def make() -> "Arrays":
        networks = {name: material.tensors(name) for name in names}
        return in_main_process(
            material.accelerator, lambda: task_vector_statistics(material.tensors("pretrained"), networks)
        )

    found = material.keep("task_vectors", ["pretrained", *names], (), make)
    note = f"all {found['sizes'].sum():,} parameters"
    return analysis_tables.task_vectors(found, names, note), {
        "task-vectors": lambda: analysis_plots.task_vectors(found, names, len(material.ranges), note),
        "task-cosines": lambda: analysis_plots.task_cosines(found, names, len(material.ranges), note),
        "task-values": lambda: analysis_plots.task_values(found, names, len(material.ranges), note),
    }


def landscape(material: "Material") -> Shown:
    """The loss on the plane through the pretrained network and two experts."""
    from deme.measure.landscape import landscape
    from deme.method.candidates import Candidates
    from deme.report import analysis_plots, analysis_tables

    settings = material.config.analyze
    count = len(material.ranges)
    if count < 2:
        return "### Loss landscape\n\nLeft out: a plane needs two experts, timesteps.num_ranges=1 has one.", {}
    pair = settings.landscape_ranges or [0, count - 1]
    names = [material.experts[number] for number in pair]

    def make(keep: "Keep") -> "Arrays":
        base = material.tensors("pretrained")
        finetuned = {name: material.tensors(name) for name in names}
        candidates = Candidates(base, finetuned, dict.fromkeys(base, 0), material.accelerator.device)
        batches = material.spread(settings.landscape_images, 3)
        shape = (count, settings.landscape_points)
        return landscape(material.network, candidates, batches, *shape, material.accelerator, keep)

    keys = ("landscape_points", "landscape_images", "landscape_ranges")
    found = material.keep_parts("landscape", ["pretrained", *names], keys, make)
    marks = {name: (row[pair[0]], row[pair[1]]) for name, row in coefficients(material).items()}
    note = f"{settings.landscape_points}² points, each on the same {settings.landscape_images} {material.measured_on} "
    note += "images, spread evenly over the timesteps"
    return analysis_tables.landscape(found, names, material.experts, note), {
        "landscape": lambda: analysis_plots.landscape(found, names, material.experts, marks, note)
    }


def coefficients(material: "Material") -> dict[str, list[float]]:
    """What merging coefficients there are to mark, one per range; those that differ between tensors can't be shown."""
    config = material.config
    count = len(material.ranges)
    found = {f"uniform 1/{count}": [1 / count] * count}
    total = config.timesteps.num_train_timesteps
    if [4 * edge for edges in material.ranges for edge in edges] == [k * total for k in (0, 1, 1, 2, 2, 3, 3, 4)]:
        found["published (LSUN-Church)"] = list(PUBLISHED)
    file = config.paths.best_coefficients
    if file.is_file():
        searched = read_searched(file)
        base, *experts = (material.hashes[name] for name in ("pretrained", *material.experts))
        if searched.is_of(base, experts):  # not those of other networks
            groups = searched.groups(config)
            if list(groups) == ["*"]:
                found["searched"] = groups["*"]
    return found


def activation_change(material: "Material") -> Shown:
    """How much finetuning changes activations across channels, against across positions; and the projections."""
    import numpy as np

    from deme.measure.activation_change import activation_change, blocks_of, projection_distances
    from deme.report import analysis_plots, analysis_tables

    settings = material.config.analyze
    count = len(material.ranges)

    def make() -> "Arrays":
        before = material.network
        before.load_state_dict(material.tensors("pretrained"))
        after = copy.deepcopy(before)
        batches = material.spread(count * settings.images, 4)
        changes, distances = [], []
        for number, name in enumerate(material.experts):
            tensors = material.tensors(name)
            after.load_state_dict(tensors)
            inside = (batch.part(batch.ranges == number) for batch in batches)
            changes.append(activation_change(before, after, inside, material.accelerator))
            of_block = projection_distances(tensors)
            distances.append([of_block.get(block, np.nan) for block in blocks_of(before)])
        return {
            "squares": np.stack([change["squares"] for change in changes], axis=1),
            "shapes": changes[0]["shapes"],
            "projections": np.array(distances).T,
            "blocks": np.array(list(blocks_of(before))),
        }

    found = material.keep("activation_change", ["pretrained", *material.experts], ("images",), make)
    note = f"{settings.images} {material.measured_on} images in each range, seen by pretrained network and expert"
    figures = {
        "activation-change": lambda: analysis_plots.activation_change(found, material.experts, note),
        "activation-shares": lambda: analysis_plots.change_parts(found, material.experts, note),
    }
    if np.isfinite(found["projections"]).any():
        figures["projections"] = lambda: analysis_plots.projections(found, material.experts)
    return analysis_tables.activation_change(found, material.experts, note), figures


def show(config: Config, name: str, table: str, figures: "dict[str, Callable[[], Figure]]") -> None:
    """Print a table and write it to NAME.md; write pictures to plots/."""
    from deme.report.analysis_plots import save_figures

    file = config.paths.analysis / f"{name}.md"
    with atomic_file(file) as temporary:
        temporary.write_text(f"{table}\n", encoding="utf-8")
    print(f"\n{table}\n", file, *save_figures(config.paths.plots, figures), sep="\n")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
