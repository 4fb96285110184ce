"""How long a published benchmark takes on so many GPUs: computed, from its network's size and stated rates."""

import json
import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.unets import CHURCH
from deme.config.experiment import Config
from deme.config.reading import load_config
from deme.config.sections import GRADIENT_PASSES
from deme.report.tables import markdown_table
from scripts.estimate import FLOAT, GPU_TFLOPS, INCEPTION_FLOPS, searched_images, unet_cost

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "configs" / "lsun_church.yaml"
NUM_GPUS = (8, 64, 512)
CHURCH_IMAGES = 126_227  # of LSUN-Church
MODELS = ("pretrained", "continued", "ensemble", "merged")  # which are drawn from


class Cluster(NamedTuple):
    """What is assumed of one."""

    rate: float = 1e12 * GPU_TFLOPS  # operations per second that a GPU reaches on these networks
    node: int = 8  # GPUs
    inside: float = 200e9  # bytes per second and direction that GPUs of a node exchange: NVLink
    between: float = 25e9  # bytes per second and direction that a node exchanges: a link of 200 Gbit/s
    start: float = 60.0  # seconds before a job computes
    least_images: int = 4  # per GPU and pass, below which it would not reach its rate


class Training(NamedTuple):
    """One, or several alike side by side."""

    count: int
    steps: int
    batch_size: int  # images per optimizer step, of each
    image_flops: float  # that a step costs for each image
    gradient_bytes: int

    @property
    def flops(self) -> float:
        """Operations of all of them."""
        return self.count * self.steps * self.batch_size * self.image_flops


class Part(NamedTuple):
    """A stage on so many GPUs."""

    gpus: int
    hours: float
    computing: float  # GPU hours that it would take on a single GPU

    @property
    def efficiency(self) -> float:
        return self.computing / (self.gpus * self.hours)


def sent_by_each(size: float, processes: int) -> float:
    """Bytes that each of n processes sends where a ring sums `size` bytes: 2 (n − 1) / n of them."""
    return 2 * (processes - 1) / processes * size


def all_reduce_seconds(size: float, gpus: int, cluster: Cluster) -> float:
    """How long a ring sums `size` bytes, at the speed of the slowest of its links."""
    return sent_by_each(size, gpus) / (cluster.inside if gpus <= cluster.node else cluster.between)


def step_seconds(training: Training, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """An optimizer step's computation and its exchange of gradients, the one after the other.

    DDP lets them overlap in a step's last backward pass: together they are the most that it takes.
    """
    computation = training.batch_size * training.image_flops / gpus / cluster.rate
    return computation, all_reduce_seconds(training.gradient_bytes, gpus, cluster)


def trained(training: Training, share: int, cluster: Cluster) -> Part:
    """Trainings on `share` GPUs each."""
    seconds = training.steps * sum(step_seconds(training, share, cluster)) + cluster.start
    return Part(training.count * share, seconds / 3600, training.flops / cluster.rate / 3600)


def best_shares(trainings: Sequence[Training], gpus: int, cluster: Cluster) -> tuple[int, ...]:
    """How many GPUs each gets, all side by side: the last one then ends first; of such shares the fewest.

    Raises:
        ValueError: there are fewer GPUs than trainings.
    """

    def possible(training: Training) -> list[int]:
        most = training.batch_size // cluster.least_images
        return [share for share in range(1, most + 1) if training.batch_size % share == 0]

    def outcome(shares: tuple[int, ...]) -> tuple[float, int]:
        parts = [trained(training, share, cluster) for training, share in zip(trainings, shares, strict=True)]
        return max(part.hours for part in parts), sum(part.gpus for part in parts)

    fitting = [shares for shares in product(*map(possible, trainings)) if outcome(shares)[1] <= gpus]
    return min(fitting, key=outcome)


def shared_out(flops: float, gpus: int, cluster: Cluster) -> Part:
    """Work of which each GPU does its part without the others, as drawing images."""
    return Part(gpus, (flops / gpus / cluster.rate + cluster.start) / 3600, flops / cluster.rate / 3600)


def trainings_of(config: Config) -> tuple[Training, Training]:
    """The ranges, and the control, which takes as many steps as all of them together; Church's network."""
    parameters, student = unet_cost(CHURCH | {"_class_name": "ProjectedUNet2DModel"})
    _, teacher = unet_cost(CHURCH)
    settings, count = config.finetune, len(config.timesteps.ranges)
    ranges = Training(
        count, settings.max_steps, settings.batch_size, GRADIENT_PASSES * student + teacher, FLOAT * parameters
    )
    return ranges, ranges._replace(count=1, steps=count * ranges.steps, image_flops=GRADIENT_PASSES * student)


def plan(
    trainings: tuple[Training, Training], config: Config, searching: Config, gpus: int, cluster: Cluster
) -> dict[str, Part]:
    """The benchmark's stages that compute on GPUs.

    Args:
        trainings: the ranges, and the control.
        searching: the configuration with a search for coefficients.
    """
    ranges, control = trainings
    shares = best_shares(trainings, gpus, cluster)
    pass_flops = control.image_flops / GRADIENT_PASSES
    images = len(MODELS) * config.sample.num_images
    candidates, reported = searched_images(searching)
    searched = candidates * searching.search_steps + reported * config.sample.num_inference_steps
    return {
        "ranges": trained(ranges, shares[0], cluster),
        "control": trained(control, shares[1], cluster),
        "images": shared_out(images * config.sample.num_inference_steps * pass_flops, gpus, cluster),
        "scores": shared_out((images + CHURCH_IMAGES) * INCEPTION_FLOPS, gpus, cluster),
        "search": shared_out(searched * pass_flops, min(gpus, cluster.node), cluster),
    }


def total(parts: dict[str, Part], gpus: int, waiting: float) -> Part:
    """All that the benchmark needs, its trainings side by side and the rest one after another.

    Args:
        waiting: hours in which no GPU computes.
    """
    hours = max(parts["ranges"].hours, parts["control"].hours) + parts["images"].hours + parts["scores"].hours
    return Part(gpus, hours + waiting, sum(part.computing for name, part in parts.items() if name != "search"))


def measured(benchmark: str, key: str, **wanted: object) -> float:
    """What a benchmark has found on the CPU, the median where it was repeated."""
    rows = json.loads((REPOSITORY / "benchmarks" / "results" / f"{benchmark}-cpu.json").read_text())["rows"]
    [value] = [row[key] for row in rows if wanted.items() <= row.items()]
    return median(value) if isinstance(value, list) else value


def tables() -> str:
    """What docs/clusters.md shows: the assumptions, a step's exchange, the benchmark."""
    cluster = Cluster()
    config = load_config(CONFIG, [])
    searching = load_config(CONFIG, ["merge.coefficients=search"])
    decoded_per_second = measured("data", "first_pass", name="mapped file", data="JPEGs of 384×288 at 256×256")
    decoding = (CHURCH_IMAGES / decoded_per_second + cluster.start) / 3600
    merging = measured("merging", "command_seconds", network="Church", name="merge.py", experts=4)
    merging = (merging + cluster.start) / 3600
    trainings = trainings_of(config)
    ranges = trainings[0]
    plans = {gpus: plan(trainings, config, searching, gpus, cluster) for gpus in NUM_GPUS}
    read = f"""
        Read from the network: {ranges.gradient_bytes / FLOAT / 1e6:.1f} M parameters with projections, so
        {ranges.gradient_bytes / 1e6:.0f} MB of float32 gradients per step; {ranges.image_flops / 1e12:.2f} TFLOP per
        image and step. Measured, on two cores: decoding {decoded_per_second:.0f} images/s, merging.
    """
    said = filled(f"**Computed, not measured**, for {CONFIG.name}: {', '.join(MODELS)}. {assumed(cluster)} {read}")
    return "\n\n".join([said, step_table(ranges, cluster), stage_table(config, plans, decoding, merging)])


def assumed(cluster: Cluster) -> str:
    """What the table rests on that nobody measured."""
    return f"""
        Assumed: a GPU reaches {cluster.rate / 1e12:g} TFLOP/s where it has {cluster.least_images} images or more per
        pass; the {cluster.node} GPUs of a node exchange {cluster.inside / 1e9:g} GB/s each way (NVLink), nodes
        {cluster.between / 1e9:g} GB/s (one link of 200 Gbit/s); a ring sums the gradients, for which each of n GPUs
        sends 2 (n − 1) / n of their bytes, after the computation (DDP overlaps a part of it); a job takes
        {cluster.start:g} s to start, and waits in no queue.
    """


def filled(text: str) -> str:
    """Its words in lines."""
    return textwrap.fill(" ".join(text.split()), 118)


def step_table(training: Training, cluster: Cluster) -> str:
    """Computation and exchange in one step of one training."""
    titles = ["one training on", "images per GPU", "computation, s/step", "all-reduce, s/step", "efficiency"]
    rows = []
    share = 1
    while training.batch_size // share >= cluster.least_images:
        computation, exchange = step_seconds(training, share, cluster)
        efficiency = computation / (computation + exchange)
        label = f"{share} GPU{'s' * (share > 1)}"
        row = [label, f"{training.batch_size // share}", f"{computation:.3f}", f"{exchange:.3f}", f"{efficiency:.0%}"]
        rows.append(row)
        share *= 2
    return markdown_table(titles, rows)


def stage_table(config: Config, plans: dict[int, dict[str, Part]], decoding: float, merging: float) -> str:
    """Hours of every stage on different numbers of GPUs.

    Args:
        plans: of each number of GPUs.
        decoding: hours until the images are decoded.
        merging: hours of the merge.
    """
    count = len(config.timesteps.ranges)
    images = len(MODELS) * config.sample.num_images

    def row(name: str, waits: str, key: str, count: int = 1) -> list[str]:
        return [name, waits, *(cell(parts[key], count) for parts in plans.values())]

    nothing = "no other GPU"
    rows = [
        ["decoding", "all wait for one job", *[f"{decoding:.2f} h"] * len(plans)],
        row(f"{count} ranges, side by side", "gradients, within each", "ranges", count),
        row(f"control, {count * config.finetune.max_steps:,} steps", "gradients", "control"),
        ["merge", "all wait for one job", *[f"{merging:.2f} h"] * len(plans)],
        row(f"{images:,} images", nothing, "images"),
        row("statistics, FID", nothing, "scores"),
    ]
    totals = [total(plans[gpus], gpus, decoding + merging) for gpus in plans]
    rows.append(["**all**", "", *(f"**{part.hours:.1f} h, {part.efficiency:.0%}**" for part in totals)])
    rows.append(row("search, where asked for", "the candidate before", "search"))
    return markdown_table(["stage", "what a GPU waits for", *(f"{gpus} GPUs" for gpus in plans)], rows)


def cell(part: Part, count: int) -> str:
    """GPUs, hours and efficiency."""
    gpus = f"{count} × {part.gpus // count}" if count > 1 else f"{part.gpus}"
    return f"{gpus}: {part.hours:.2f} h, {part.efficiency:.0%}"
