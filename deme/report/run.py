"""What the files of a run hold, read for its page."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.sections import GRADIENT_PASSES
from deme.config.trainings import BASELINES, CONTINUED, DISTILLED, NAMED_TRAININGS
from deme.errors import UserError, naming, one_line
from deme.job.files import checked, read_json
from deme.job.records import MERGED, read_record
from deme.measure.scores import CLEARLY, Score, load_scores
from deme.models.variants import MAKERS, ORDER, Searched, made_denoisers, read_searched, seconds_of
from deme.report.tables import NAMES, Table, number

RESULTS, TRAINING, MERGING, SEARCH = "Results", "Training", "Merging coefficients", "Search"  # titles of sections


@dataclass(frozen=True)
class TrainingLog:
    """A training run as it was logged."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    seconds: float  # wall time of all steps, without previews and checkpoints
    images: int  # seen in training

    def passes(self, config: Config) -> int:
        """UNet passes so far: those of a gradient for each image, and one of its teacher if it has one."""
        is_expert = self.name in config.timesteps.names
        has_teacher = self.name == DISTILLED or (is_expert and config.finetune.consistency_weight > 0)
        return self.images * (GRADIENT_PASSES + has_teacher)


@dataclass(frozen=True)
class LogLine:
    """What is read of a line of log.jsonl."""

    step: int
    loss: float | None  # None: not finite
    images_per_second: float


@dataclass(frozen=True)
class Provenance:
    """What is read of the provenance in a file."""

    processor: str | None = None
    git_commit: str | None = None
    versions: dict[str, str] | None = None  # of packages


@dataclass
class Run:
    """What the files of a run hold; None or empty for a file that is missing or unreadable."""

    config: Config
    logs: list[TrainingLog] = field(default_factory=list)
    features: str | None = None  # inception or classifier
    scores: list[Score] = field(default_factory=list)
    coefficients: dict[str, list[float]] | None = None  # of the merge
    search: Searched | None = None
    search_features: str | None = None
    search_scores: list[Score] = field(default_factory=list)
    search_seconds: float | None = None
    samples: list[Path] = field(default_factory=list)
    analyses: list[str] = field(default_factory=list)  # pictures analysis-NAME.png
    provenance: Provenance = Provenance()
    unreadable: dict[str, list[str]] = field(default_factory=dict)  # reasons by title of a section

    def read(self, section: str, file: Path, reader: Callable[[Path], Any]) -> Any:
        """What `reader` returns for a file, or None if it is missing or unreadable; the reason is noted."""
        try:
            return reader(file) if file.is_file() else None
        except UserError as error:
            self.unreadable.setdefault(section, []).append(str(error))
            return None


def read_run(config: Config) -> Run:
    """Read the files of a run that are there."""
    paths = config.paths
    run = Run(config)
    for name in [*config.timesteps.names, *NAMED_TRAININGS, *config.self_trained_names]:
        read = partial(read_log, name, batch_size=config.finetune.batch_size)
        log = run.read(TRAINING, paths.finetuning(name) / "log.jsonl", read)
        run.logs += [log] if log is not None else []
    run.features, run.scores = run.read(RESULTS, paths.results, load_scores) or (None, [])
    merge = paths.merged / MERGED.file
    run.coefficients = run.read(MERGING, merge, partial(read_merge, count=len(config.timesteps.ranges)))
    run.search = run.read(SEARCH, paths.best_coefficients, read_searched)
    run.search_features, run.search_scores = run.read(SEARCH, paths.search / "report.json", load_scores) or (None, [])
    run.search_seconds = seconds_of(paths.search)
    run.samples = [paths.all_samples / name for name in ORDER if (paths.all_samples / name).is_dir()]
    run.analyses = [file.stem.removeprefix("analysis-") for file in sorted(paths.plots.glob("analysis-*.png"))]
    if run.scores or run.coefficients is not None:
        made = (RESULTS, paths.results) if run.scores else (MERGING, merge)
        run.provenance = run.read(*made, read_provenance) or Provenance()
    return run


def read_provenance(file: Path) -> Provenance:
    """How a results.json or merge.yaml was made."""
    content = read_record(MERGED, file.parent).beside if file.name == MERGED.file else read_json(file)
    with naming(file):
        return checked(content, Provenance)


def read_merge(file: Path, count: int) -> dict[str, list[float]]:
    """The coefficients in a merge.yaml, by name pattern; `count` for each."""
    record = read_record(MERGED, file.parent)
    with naming(file):
        coefficients = checked(record.made_from.get("coefficients"), dict[str, list[float]], "coefficients")
        if not coefficients or any(len(values) != count for values in coefficients.values()):
            raise UserError(f"its coefficients are not those of timesteps.num_ranges={count}")
    return coefficients


def read_log(name: str, file: Path, batch_size: int) -> TrainingLog:
    """A run's log.jsonl."""
    steps, losses, seconds, before = [], [], 0.0, 0
    with naming(file), naming("not the log of a training run"):
        try:
            lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(one_line(error)) from None
        for place, content in enumerate(lines, 1):
            line = checked(content, LogLine, f"line {place}")
            if line.step <= before or line.images_per_second <= 0:
                raise UserError(f"line {place}: step {line.step} at {line.images_per_second} images per second")
            steps.append(line.step)
            losses.append(float("nan") if line.loss is None else line.loss)
            seconds += (line.step - before) * batch_size / line.images_per_second
            before = line.step
    return TrainingLog(name, steps, losses, seconds, before * batch_size)


def missing_stages(run: Run) -> Iterator[tuple[str, str]]:
    """Stages that have not run, and the commands that run them; not those whose files are unreadable."""
    trained = {log.name for log in run.logs}
    paths = run.config.paths
    for k, name in enumerate(run.config.timesteps.names):
        if name not in trained and not paths.experts[k].is_dir():
            yield f"the expert of timesteps {name}", f"finetune.py finetune.range={k}"
    for name in (CONTINUED, DISTILLED):
        if not made_denoisers(name, paths)[0].is_dir():
            yield name, MAKERS[name]
    if run.search is None and SEARCH not in run.unreadable:
        yield "the search for coefficients", "search.py"
    if run.coefficients is None and MERGING not in run.unreadable:
        yield "the merged network", MAKERS["merged"]
    for name in ORDER:
        if name not in BASELINES and paths.all_samples / name not in run.samples:
            yield f"samples of {name}", f"sample_ddp.py sample.model={name}"
    if not run.scores and RESULTS not in run.unreadable:
        yield "scores", "evaluate.py"
    if not run.analyses:
        yield "analyses", "analyze.py"


def verdict(scores: Sequence[Score], features: str) -> str:
    """What the scores say about merging, in a sentence or two; empty if there is nothing to compare."""
    by_name = {Path(row.samples).name: row.to_pretrained for row in scores if row.to_pretrained is not None}
    merged, control = by_name.get("merged"), by_name.get(CONTINUED)
    if merged is None:
        return ""
    error = merged.standard_error
    difference = number(merged.mean, error, "+.4f")
    distance = NAMES[features][0]
    text = f"The merged network differs from the pretrained one by {difference} in {distance} (lower is better)"
    if error is None:
        text += ", without a standard error."
    elif abs(merged.mean) <= CLEARLY * error:
        text += ": less than two standard errors."
    else:
        text += f": {'better' if merged.mean < 0 else 'worse'} by {abs(merged.mean) / error:.1f} of them."
    if control is not None:
        other = number(control.mean, control.standard_error, "+.4f")
        text += f" Plain training at the experts' cost: {other}."
    return text


def cost_table(run: Run) -> Table:
    """The cost of each stage, in images through the UNet and in minutes of training as logged."""
    rows = [[f"training {log.name}", f"{log.passes(run.config):,}", f"{log.seconds / 60:.1f}"] for log in run.logs]
    if run.search is not None and run.search.passes is not None:
        minutes = None if run.search_seconds is None else run.search_seconds / 60
        rows.append(["search, without its report", f"{run.search.passes:,}", number(minutes, form=".1f")])
    for row in run.scores:
        drawn = row.images * run.config.sample.num_inference_steps
        rows.append([f"drawing {Path(row.samples).name}", f"{drawn:,}", "-"])
    note = "A training step counts 3 passes for the trained network, forward and backward, and 1 for its teacher."
    return Table(["stage", "UNet passes", "minutes of its steps"], rows, note)
