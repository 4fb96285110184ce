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
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme.config.experiment import Config
from deme.config.sections import CONTINUED, DISTILLED, range_name
from deme.errors import UserError, naming
from deme.job.command import run_script
from deme.job.files import Watched, atomic_file, make_folder, read_yaml, sha256
from deme.job.records import ANALYSIS, DATA, ENCODER, SCHEDULE, Record
from deme.models.pipelines import (
    SCHEDULER_CONFIG,
    encoder_files,
    encoders_hash,
    num_train_timesteps,
    sample_size,
    scheduler_folder,
    unet_folder,
)
from deme.models.variants import find_finetuned, find_pretrained
from deme.models.weights import WEIGHTS, load_tensors, weights_files, weights_hash

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from matplotlib.figure import Figure
    from torch import nn

    from deme.data.images import Examples, TrainingImages
    from deme.job.arrays import Arrays, Keep
    from deme.measure.noisy import Batch, CleanImages
    from deme.method.task_vectors import Tensors
    from deme.models.encoders import Encoder

STREAM = 4  # of this script's random draws, beside those of training and of the search
BACKWARD = 2  # passes that a gradient costs beside its forward pass
# of the data, beside what its fingerprint tells
DATA_KEYS = ("resolution", "center_crop", "random_flip", "held_out_images", "cache_latents", "cached_views")
PUBLISHED = (0.1, 0.1, 0.2, 0.5)  # the paper's coefficients for LSUN-Church, of four equal ranges


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
    networks = {"pretrained": unet_folder(pretrained)}
    left_out: list[str] = []
    if settings.chosen != ["gradient_conflict"]:
        experts = find_finetuned(config.paths)
        networks |= {range_name(edges): folder for edges, folder in zip(config.timesteps.ranges, experts, strict=True)}
        later, left_out = found_later(config)
        networks |= later
    sizes = {folder: sample_size(folder, pretrained) for folder in networks.values()}
    config.check_fits(sizes, scheduler_folder(pretrained), num_train_timesteps(pretrained))
    schedule = scheduler_folder(pretrained) / SCHEDULER_CONFIG
    files = [file for folder in networks.values() for file in weights_files(folder)]
    watched = Watched([*files, schedule, *encoder_files(pretrained).values()])

    # --- torch is imported after what can be answered without it
    from deme.data.sources import data_fingerprint
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator

    # --- what it is made from
    made_of = {DATA: data_fingerprint(config.data, with_captions=True), SCHEDULE: sha256(schedule)}
    if encoder_files(pretrained):
        made_of[ENCODER] = encoders_hash(pretrained)
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
    places = {
        CONTINUED: (config.paths.continued, f"finetune.py finetune.range={CONTINUED}"),
        "merged": (config.paths.merged / "unet", "merge.py"),
        DISTILLED: (config.paths.distilled, f"finetune.py finetune.range={DISTILLED}"),
    }
    found = {name: folder for name, (folder, _) in places.items() if (folder / WEIGHTS).is_file()}
    return found, [f"{name}, which {maker} makes" for name, (_, maker) in places.items() if name not in found]


def costs(config: Config, later: int) -> dict[str, int]:
    """Analysis → what it takes, in images through the UNet.

    Args:
        later: how many networks there are beside the pretrained one and the experts.
    """
    settings = config.analyze
    ranges = len(config.timesteps.ranges)
    passes = {
        "gradient_conflict": (1 + BACKWARD) * settings.timesteps * settings.images,
        "loss_by_timestep": (1 + ranges + later) * settings.timesteps * settings.images,
        "task_vectors": 0,
        "landscape": (settings.landscape_points**2 + 3) * settings.landscape_images,
        "activation_change": 2 * ranges * settings.images,
    }
    return {name: passes[name] for name in settings.chosen}


class Material:
    """What the analyses work on. It is loaded when it is first asked for: what is kept already needs none of it.

    Args:
        pretrained: pipeline folder.
        networks: name → UNet folder: pretrained, the experts by their ranges, and others.
        made_of: what tells data, noise schedule and encoders from others.
    """

    def __init__(
        self,
        config: Config,
        accelerator: "Accelerator",
        pretrained: Path,
        networks: dict[str, Path],
        made_of: dict[str, str],
    ):
        self.config = config
        self.accelerator = accelerator
        self.pretrained = pretrained
        self.networks = networks
        self.made_of = made_of
        self.hashes = {name: weights_hash(folder) for name, folder in networks.items()}
        self.ranges = config.timesteps.ranges
        self.experts = [name for name in map(range_name, self.ranges) if name in networks]
        self.batch_size = config.analyze.batch_size

    def keep(self, name: str, networks: list[str], keys: tuple[str, ...], make: "Callable[[], Arrays]") -> "Arrays":
        """What `make` gives, kept in NAME.npz.

        Args:
            networks: that it is made from.
            keys: of the section analyze that determine it.
        """
        from deme.job.arrays import kept

        config = self.config
        made_from: dict[str, Any] = {"seed": config.seed, "ranges": self.ranges}
        made_from |= {f"analyze.{key}": getattr(config.analyze, key) for key in keys}
        made_from |= {f"data.{key}": getattr(config.data, key) for key in DATA_KEYS}
        made_from |= {"finetune.caption_dropout": config.finetune.caption_dropout}
        made_from |= {"weights": [self.hashes[network] for network in networks]} | self.made_of
        return kept(self.accelerator, config.paths.analysis / f"{name}.npz", Record(ANALYSIS, made_from), make)

    def keep_parts(
        self, name: str, networks: list[str], keys: tuple[str, ...], make: "Callable[[Keep], Arrays]"
    ) -> "Arrays":
        """The same of what is made in parts, each of which is kept in a folder NAME until the whole is there."""

        def keep_part(part: str, make_part: "Callable[[], Arrays]") -> "Arrays":
            return self.keep(f"{name}/{part}", networks, keys, make_part)

        found = self.keep(name, networks, keys, lambda: make(keep_part))
        if self.accelerator.is_main_process:
            shutil.rmtree(self.config.paths.analysis / name, ignore_errors=True)
        return found

    def tensors(self, name: str) -> "Tensors":
        """A network's weights, with identity projections where only the experts have some.

        Raises:
            UserError: they do not fit the experts', or are not finite.
        """
        from deme.method.projection import with_identity_projections
        from deme.method.task_vectors import check_compatible

        folder = self.networks[name]
        like = load_tensors(self.networks[self.experts[0]])
        tensors = with_identity_projections(load_tensors(folder), like)
        with naming(folder):
            check_compatible(like, tensors, name)
            for key, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise UserError(f"tensor {key} holds NaN or infinite values")
        return tensors

    def load(self, name: str) -> "nn.Module":
        """A network as it is, on the device, ready to predict."""
        from deme.models.inference import freeze
        from deme.models.networks import load_unet

        return freeze(load_unet(self.networks[name]), self.accelerator.device, "no", may_pack=False)

    @cached_property
    def network(self) -> "nn.Module":
        """One of the experts' architecture, whose weights change from use to use."""
        return self.load(self.experts[0])

    @cached_property
    def scheduler(self) -> "DDPMScheduler":
        """The pretrained noise schedule."""
        from deme.models.networks import load_scheduler

        return load_scheduler(self.pretrained)

    @cached_property
    def encoder(self) -> "Encoder":
        """What stands between images and networks."""
        from deme.models.encoders import load_encoder
        from deme.models.networks import load_unet, try_out

        network = load_unet(unet_folder(self.pretrained))
        encoder = load_encoder(self.pretrained, network)
        try_out(network, self.scheduler, encoder)
        encoder.prepare(self.accelerator.device, "no")
        return encoder

    @cached_property
    def data(self) -> "TrainingImages":
        """The images that training sees, and those that it does not."""
        from deme.training.examples import load_examples

        config = self.config
        return load_examples(config, config.finetune, self.encoder, self.made_of, self.accelerator)

    @property
    def measured_on(self) -> str:
        """Which images losses are measured on."""
        return "held-out" if self.config.data.held_out_images > 0 else "training"

    @property
    def measured_images(self) -> "Examples":
        """Those images."""
        return self.data.held_out if self.measured_on == "held-out" else self.data.training

    def clean(self, images: "Examples", number: int) -> "CleanImages":
        """As many as are asked for, or as there are.

        Args:
            number: keeps the random draws of different analyses apart.
        """
        from deme.measure.noisy import draw_clean

        count = min(self.config.analyze.images, len(images) // 2 * 2)
        if count == 0:
            raise UserError(f"data.name={self.config.data.name}: {len(images)} image, an analysis needs at least 2")
        stream = (self.config.seed, STREAM, number)
        return draw_clean(images, self.encoder, self.scheduler, stream, count, self.batch_size, self.accelerator)

    def spread(self, count: int, number: int) -> "list[Batch]":
        """This process's share of `count` noisy images, spread evenly over the timesteps, in batches."""
        from deme.measure.noisy import ENCODED_AT_ONCE, draw_probes, regrouped

        stream = (self.config.seed, STREAM, number)
        drawn = (self.ranges, stream, range(count), ENCODED_AT_ONCE, self.accelerator)
        return regrouped(draw_probes(self.measured_images, self.encoder, self.scheduler, *drawn), self.batch_size)


Shown = tuple[str, "dict[str, Callable[[], Figure]]"]  # a table in Markdown; names of pictures, and what draws them


def gradient_conflict(material: Material) -> Shown:
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


def loss_by_timestep(material: Material) -> Shown:
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


def task_vectors(material: Material) -> Shown:
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


def landscape(material: Material) -> Shown:
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


def coefficients(material: Material) -> dict[str, list[float]]:
    """What merging coefficients there are to mark, one per range; those that differ between tensors can't be shown."""
    config = material.config
    count = len(material.ranges)
    found = {f"uniform 1/{count}": [1 / count] * count}
    total = config.timesteps.num_train_timesteps
    if [4 * edge for edges in material.ranges for edge in edges] == [k * total for k in (0, 1, 1, 2, 2, 3, 3, 4)]:
        found["published (LSUN-Church)"] = list(PUBLISHED)
    file = config.paths.best_coefficients
    if file.is_file():
        best = read_yaml(file)
        base, *experts = (material.hashes[name] for name in ("pretrained", *material.experts))
        if (best.get("pretrained"), best.get("finetuned")) == (base, experts):  # not those of other networks
            with naming(file):
                rows = replace(config, merge=replace(config.merge, coefficients=best.get("coefficients")))
            if list(rows.coefficient_groups) == ["*"]:
                found["searched"] = rows.coefficient_groups["*"]
    return found


def activation_change(material: Material) -> Shown:
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
