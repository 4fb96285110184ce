"""What a run's page tells, gathered from the run's files: sections of texts, tables and pictures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.sections import BASELINES, CONTINUED, DISTILLED, GRADIENT_PASSES, NAMED_TRAININGS, range_name
from deme.errors import UserError
from deme.job.files import read_json, read_yaml
from deme.measure.scores import CLEARLY, Score, load_scores
from deme.models.searched import seconds_of
from deme.models.variants import MAKERS, ORDER, made_unets
from deme.report.tables import NAMES, number, score_lines


@dataclass(frozen=True)
class Table:
    """Its first column is text, the others are numbers."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A file, and what it shows."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: Sequence[str]


@dataclass
class Section:
    """Under one title; strings are paragraphs."""

    title: str
    parts: list[str | Table | Picture | Commands] = field(default_factory=list)


@dataclass(frozen=True)
class Missing:
    """A stage that has not run."""

    stage: str
    command: str


@dataclass(frozen=True)
class Curve:
    """A training run as it was logged."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    seconds: float  # wall time of all steps, without what stands between them
    images: int  # seen in training

    def passes(self, config: Config) -> int:
        """UNet passes of the training so far: a gradient's for each image, and one of its teacher where it has one."""
        is_expert = self.name in map(range_name, config.timesteps.ranges)
        has_teacher = self.name == DISTILLED or (is_expert and config.finetune.consistency_weight > 0)
        return self.images * (GRADIENT_PASSES + has_teacher)


@dataclass
class Story:
    """All that a page tells."""

    name: str
    sections: list[Section]
    missing: list[Missing]


@dataclass(frozen=True)
class Run:
    """What the files of a run hold."""

    config: Config
    options: str  # the configuration's file and the overrides
    curves: list[Curve]
    features: str | None  # inception or classifier
    scores: list[Score]
    coefficients: dict[str, list[float]] | None  # of the merge
    search: dict[str, Any] | None  # best.yaml
    search_scores: list[Score]
    search_passes: int | None
    search_seconds: float | None
    samples: list[Path]
    analyses: list[Path]
    provenance: dict[str, Any]


def read_run(config: Config, options: str) -> Run:
    """Read what there is of a run; a stage that has not run leaves nothing.

    Raises:
        UserError: a damaged file; names it.
    """
    paths = config.paths
    names = [*map(range_name, config.timesteps.ranges), *NAMED_TRAININGS]
    logs = {name: paths.finetuning(name) / "log.jsonl" for name in names}
    curves = [read_curve(name, file, config.finetune.batch_size) for name, file in logs.items() if file.is_file()]
    features, scores = load_scores(paths.results) if paths.results.is_file() else (None, [])
    merge = paths.merged / "merge.yaml"
    merged = read_yaml(merge) if merge.is_file() else {}
    best = read_yaml(paths.best_coefficients) if paths.best_coefficients.is_file() else None
    report = paths.search / "report.json"
    fresh = load_scores(report)[1] if report.is_file() else []
    samples = [paths.all_samples / name for name in ORDER if (paths.all_samples / name).is_dir()]
    analyses = sorted(paths.plots.glob("analysis-*.png"))
    provenance = read_json(paths.results) if scores else merged
    return Run(
        config,
        options,
        curves,
        features,
        scores,
        merged.get("coefficients"),
        best,
        fresh,
        None if best is None else best.get("passes"),
        seconds_of(paths.search),
        samples,
        analyses,
        provenance,
    )


def read_curve(name: str, file: Path, batch_size: int) -> Curve:
    """A run's log.jsonl.

    Raises:
        UserError: it is damaged.
    """
    steps, losses, seconds, before = [], [], 0.0, 0
    try:
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            steps.append(int(line["step"]))
            losses.append(float("nan") if line["loss"] is None else float(line["loss"]))
            seconds += (steps[-1] - before) * batch_size / line["images_per_second"]
            before = steps[-1]
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{file}: not the log of a training run: {error}") from None
    return Curve(name, steps, losses, seconds, before * batch_size)


def missing_stages(run: Run) -> Iterator[Missing]:
    """What has not run, with the command that does."""
    trained = {curve.name for curve in run.curves}
    paths = run.config.paths
    for k, timestep_range in enumerate(run.config.timesteps.ranges):
        if range_name(timestep_range) not in trained and not paths.finetuned[k].is_dir():
            yield Missing(f"the expert of timesteps {range_name(timestep_range)}", f"finetune.py finetune.range={k}")
    for name in (CONTINUED, DISTILLED):
        if not made_unets(name, paths)[0].is_dir():
            yield Missing(name, MAKERS[name])
    if run.search is None:
        yield Missing("the search for coefficients", "search.py")
    if run.coefficients is None:
        yield Missing("the merged network", MAKERS["merged"])
    for name in ORDER:
        if name not in BASELINES and paths.all_samples / name not in run.samples:
            yield Missing(f"samples of {name}", f"sample_ddp.py sample.model={name}")
    if not run.scores:
        yield Missing("scores", "evaluate.py")
    if not run.analyses:
        yield Missing("analyses", "analyze.py")


def verdict(scores: Sequence[Score], features: str) -> str:
    """What the table says of merging, in a sentence or two."""
    by_name = {Path(row.samples).name: row for row in scores}
    merged = by_name.get("merged")
    if merged is None or merged.difference is None:
        return ""
    distance = NAMES[features][0]
    shown = number(merged.difference, merged.difference_standard_error, "+.4f")
    said = f"The merged network differs from the pretrained one by {shown} in {distance} (lower is better)"
    error = merged.difference_standard_error
    if error is None:
        said += ", without a standard error."
    elif abs(merged.difference) <= CLEARLY * error:
        said += ": less than two standard errors."
    else:
        said += f": {'better' if merged.difference < 0 else 'worse'} by {abs(merged.difference) / error:.1f} of them."
    control = by_name.get(CONTINUED)
    if control is not None and control.difference is not None:
        other = number(control.difference, control.difference_standard_error, "+.4f")
        said += f" Plain training at the experts' cost: {other}."
    return said


def passes_of(run: Run) -> Table:
    """The cost of each stage, in images through the UNet and in hours of training as logged."""
    config = run.config
    rows = [
        [f"training {curve.name}", f"{curve.passes(config):,}", f"{curve.seconds / 60:.1f}"] for curve in run.curves
    ]
    if run.search_passes is not None:
        minutes = "-" if run.search_seconds is None else f"{run.search_seconds / 60:.1f}"
        rows.append(["search, without its report", f"{run.search_passes:,}", minutes])
    for row in run.scores:
        drawn = row.images * config.sample.num_inference_steps
        rows.append([f"drawing {Path(row.samples).name}", f"{drawn:,}", "-"])
    note = "A training step counts 3 passes for the trained network, forward and backward, and 1 for its teacher."
    return Table(["stage", "UNet passes", "minutes of its steps"], rows, note)


def coefficient_table(run: Run) -> Table:
    """The merge's coefficients."""
    ranges = list(map(range_name, run.config.timesteps.ranges))
    rows = [[pattern, *(f"{w:.4g}" for w in values)] for pattern, values in run.coefficients.items()]
    return Table(["tensors", *ranges], rows)


def score_part(scores: Sequence[Score], features: str) -> Table:
    """The table of scores."""
    titles, rows, note = score_lines(scores, features)
    return Table(titles, rows, note)
