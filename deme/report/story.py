"""What a run's page tells, gathered from the run's files: sections of texts, tables and pictures."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.sections import BASELINES, CONTINUED, DISTILLED, GRADIENT_PASSES, NAMED_TRAININGS, range_name
from deme.errors import UserError, naming, one_line
from deme.job.checked import checked
from deme.job.files import read_json
from deme.job.records import MERGED, read_record
from deme.measure.scores import CLEARLY, Score, load_scores
from deme.models.searched import Searched, read_searched, seconds_of
from deme.models.variants import MAKERS, ORDER, made_denoisers
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


RESULTS, TRAINING, MERGING, SEARCH = "Results", "Training", "Merging coefficients", "Search"  # titles of sections


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
class Provenance:
    """What files say of how they were made; older ones may say less."""

    processor: str | None
    git_commit: str | None
    versions: dict[str, str] | None  # of packages


@dataclass(frozen=True)
class Merge:
    """What a merge.yaml says that is told."""

    coefficients: dict[str, list[float]]  # by name pattern, one per range


@dataclass
class Run:
    """What the files of a run hold. None and nothing: it is not there, or unreadable, which `unreadable` tells."""

    config: Config
    options: str  # the configuration's file and the overrides
    curves: list[Curve] = field(default_factory=list)
    features: str | None = None  # inception or classifier
    scores: list[Score] = field(default_factory=list)
    coefficients: dict[str, list[float]] | None = None  # of the merge
    search: Searched | None = None
    search_features: str | None = None
    search_scores: list[Score] = field(default_factory=list)
    search_seconds: float | None = None
    samples: list[Path] = field(default_factory=list)
    analyses: list[Path] = field(default_factory=list)
    provenance: Provenance = Provenance(None, None, None)
    unreadable: dict[str, list[str]] = field(default_factory=dict)  # title of a section → which files, and why

    def read(self, section: str, file: Path, reader: Callable[[Path], Any]) -> Any:
        """What a reader gives of a file; None where there is none, or where it is unreadable, which is noted."""
        try:
            return reader(file) if file.is_file() else None
        except UserError as error:
            self.unreadable.setdefault(section, []).append(str(error))
            return None


def read_run(config: Config, options: str) -> Run:
    """Read what there is of a run; a stage that has not run leaves nothing, an unreadable file its reason."""
    paths = config.paths
    run = Run(config, options)
    for name in [*map(range_name, config.timesteps.ranges), *NAMED_TRAININGS]:
        read = partial(read_curve, name, batch_size=config.finetune.batch_size)
        curve = run.read(TRAINING, paths.finetuning(name) / "log.jsonl", read)
        run.curves += [curve] if curve is not None else []
    run.features, run.scores = run.read(RESULTS, paths.results, load_scores) or (None, [])
    merge = paths.merged / MERGED.file
    run.coefficients = run.read(MERGING, merge, partial(read_merge, config=config))
    run.search = run.read(SEARCH, paths.best_coefficients, read_searched)
    run.search_features, run.search_scores = run.read(SEARCH, paths.search / "report.json", load_scores) or (None, [])
    run.search_seconds = seconds_of(paths.search)
    run.samples = [paths.all_samples / name for name in ORDER if (paths.all_samples / name).is_dir()]
    run.analyses = sorted(paths.plots.glob("analysis-*.png"))
    if run.scores:
        run.provenance = run.read(RESULTS, paths.results, lambda file: provenance_of(file, read_json(file)))
    elif run.coefficients is not None:
        beside = read_record(MERGED, paths.merged).beside
        run.provenance = run.read(MERGING, merge, lambda file: provenance_of(file, beside))
    run.provenance = run.provenance or Provenance(None, None, None)
    return run


def provenance_of(file: Path, content: dict[str, Any]) -> Provenance:
    """What a file's content says of how it was made."""
    with naming(file):
        return checked(content, Provenance)


def read_merge(file: Path, config: Config) -> dict[str, list[float]]:
    """The coefficients in a merge.yaml, by name pattern."""
    record = read_record(MERGED, file.parent)
    with naming(file):
        found = checked(record.made_from, Merge).coefficients
        count = len(config.timesteps.ranges)
        if not found or any(len(values) != count for values in found.values()):
            raise UserError(f"its coefficients are not those of timesteps.num_ranges={count}")
    return found


@dataclass(frozen=True)
class LogLine:
    """What is read of a line of a log."""

    step: int
    loss: float | None  # None: it was not finite
    images_per_second: float


def read_curve(name: str, file: Path, batch_size: int) -> Curve:
    """A run's log.jsonl."""
    steps, losses, seconds, before = [], [], 0.0, 0
    with naming(file), naming("not the log of a training run"):
        try:
            lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(one_line(error)) from None
        for number, content in enumerate(lines, 1):
            line = checked(content, LogLine, f"line {number}")
            if line.step <= before or line.images_per_second <= 0:
                raise UserError(f"line {number}: step {line.step} at {line.images_per_second} images per second")
            steps.append(line.step)
            losses.append(float("nan") if line.loss is None else line.loss)
            seconds += (line.step - before) * batch_size / line.images_per_second
            before = line.step
    return Curve(name, steps, losses, seconds, before * batch_size)


def missing_stages(run: Run) -> Iterator[Missing]:
    """What has not run, with the command that does; what is unreadable is told in its place."""
    trained = {curve.name for curve in run.curves}
    paths = run.config.paths
    for k, timestep_range in enumerate(run.config.timesteps.ranges):
        if range_name(timestep_range) not in trained and not paths.finetuned[k].is_dir():
            yield Missing(f"the expert of timesteps {range_name(timestep_range)}", f"finetune.py finetune.range={k}")
    for name in (CONTINUED, DISTILLED):
        if not made_denoisers(name, paths)[0].is_dir():
            yield Missing(name, MAKERS[name])
    if run.search is None and SEARCH not in run.unreadable:
        yield Missing("the search for coefficients", "search.py")
    if run.coefficients is None and MERGING not in run.unreadable:
        yield Missing("the merged network", MAKERS["merged"])
    for name in ORDER:
        if name not in BASELINES and paths.all_samples / name not in run.samples:
            yield Missing(f"samples of {name}", f"sample_ddp.py sample.model={name}")
    if not run.scores and RESULTS not in run.unreadable:
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
    if run.search is not None and run.search.passes is not None:
        minutes = "-" if run.search_seconds is None else f"{run.search_seconds / 60:.1f}"
        rows.append(["search, without its report", f"{run.search.passes:,}", minutes])
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
