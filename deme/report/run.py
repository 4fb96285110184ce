"""What the files of a run hold, read for its page."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.networks import RANGES, of_word
from deme.config.paths import with_schedule
from deme.config.trainings import BASELINES, CONTINUED, DISTILLED, NAMED_TRAININGS, NEON, SELF, SOUP
from deme.errors import UserError, blaming, naming
from deme.job.files import checked, read_json, read_yaml
from deme.job.records import MERGED, MOVED, SAMPLES, drawing_passes
from deme.measure.scores import Score, load_scores, load_spaces
from deme.models.searched import read_searched
from deme.models.variants import MAKERS, ORDER, made_denoisers, seconds_in
from deme.report.tables import Table, distances, number, signed

RESULTS, TRAINING, MERGING, SEARCH = "Results", "Training", "Merging coefficients", "Search"  # titles of sections


@dataclass(frozen=True)
class TrainingLog:
    """A training run as it was logged."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    seconds: float  # wall time of all steps, without previews and checkpoints
    passes: int  # through the UNet: those of a gradient for each image, and one of its teacher if it has one


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


class Run:
    """What the files of a run hold; None or empty for a file that is missing or unreadable."""

    def __init__(self, config: Config):
        self.config, paths = config, config.paths
        self.unreadable: dict[str, list[str]] = {}  # reasons by title of a section
        ranges, *others = ([network.training for network in of_word(config, word)] for word in (RANGES, SELF, SOUP))
        trainings = [*ranges, *map(paths.finetuning, NAMED_TRAININGS), *chain(*others)]
        logs = [self._read(TRAINING, read_log, folder / "log.jsonl", config) for folder in trainings]
        self.logs = [log for log in logs if log is not None]
        self.spaces = self._read(RESULTS, load_spaces, paths.results) or {}  # scores by feature space
        self.features, self.scores = next(iter(self.spaces.items()), (None, []))  # of the first judge
        merge, report = paths.merged / MERGED.file, paths.search / "report.json"
        self.coefficients = self._read(MERGING, read_merge, merge, config)
        self.moved = {} if self.coefficients is None else self._read(MERGING, read_merge, merge, config, MOVED) or {}
        self.search = self._read(SEARCH, read_searched, paths.best_coefficients, None)
        self.search_features, self.search_scores = self._read(SEARCH, load_scores, report) or (None, [])
        self.search_seconds = seconds_in(paths.search_seconds)
        self.schedule = config.schedule_names[0]  # of the samples that are shown, and told of in words
        folders = [paths.all_samples / with_schedule(name, self.schedule) for name in ORDER]
        self.samples = [folder for folder in folders if folder.is_dir()]
        self.analyses = [file.stem.removeprefix("analysis-") for file in sorted(paths.plots.glob("analysis-*.png"))]
        provenance = None
        if self.scores:
            provenance = self._read(RESULTS, read_provenance, paths.results, read_json)
        elif self.coefficients is not None:
            provenance = self._read(MERGING, read_provenance, merge, read_yaml)
        self.provenance = provenance or Provenance()

    def _read(self, section: str, reader: Callable[..., Any], file: Path, *more: Any) -> Any:
        """What `reader` returns for a file, or None if it is missing or unreadable; the reason is noted."""
        try:
            return reader(file, *more) if os.path.isfile(file) else None  # false where a name is too long
        except UserError as error:
            self.unreadable.setdefault(section, []).append(str(error))
            return None

    def passes_to_draw(self, folder: Path) -> str:
        """The UNet passes that drew a sample folder, by its record."""
        passes = self._read(RESULTS, lambda file: drawing_passes(file.parent), folder / SAMPLES.file)
        return "-" if passes is None else f"{passes:,}"


def read_provenance(file: Path, read: Callable[[Path], dict]) -> Provenance:
    """How a results.json or merge.yaml was made."""
    with naming(file):
        return checked(read(file), Provenance)


def read_merge(file: Path, config: Config, key: str = "coefficients") -> dict[str, list[float]]:
    """The coefficients in a merge.yaml, by name pattern, one for each network that is merged; or what each moved."""
    content, count = read_yaml(file), len(config.merged_names)
    with naming(file):
        if key == MOVED and key not in content:  # of an older version
            return {}
        given = checked(content.get(key), dict[str, list[float]], key)
        if not given or any(len(values) != count for values in given.values()):
            experts = ", ".join(map(str, config.merge.experts))
            wanted = f"timesteps.num_ranges={len(config.timesteps.ranges)} and merge.experts=[{experts}]"
            raise UserError(f"its {key} are not those of {wanted}")
    return given


def read_log(file: Path, config: Config) -> TrainingLog:
    """A training's log.jsonl."""
    name, batch_size = file.parent.name, config.finetune.batch_size
    steps, losses, seconds, before = [], [], 0.0, 0
    with blaming(f"{file}: not the log of a training run"):
        lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
        for place, content in enumerate(lines, 1):
            line = checked(content, LogLine, f"line {place}")
            if line.step <= before or line.images_per_second <= 0:
                raise UserError(f"line {place}: step {line.step} at {line.images_per_second} images per second")
            steps.append(line.step)
            losses.append(float("nan") if line.loss is None else line.loss)
            seconds += (line.step - before) * batch_size / line.images_per_second
            before = line.step
    is_expert = name in config.timesteps.names
    has_teacher = name == DISTILLED or (is_expert and config.finetune.consistency_weight > 0)
    return TrainingLog(
        name, steps, losses, seconds, before * batch_size * (config.finetune.gradient_passes + has_teacher)
    )


def missing_stages(run: Run) -> Iterator[tuple[str, str]]:
    """Stages that have not run, and the commands that run them; not those whose files are unreadable."""
    trained = {log.name for log in run.logs}
    paths = run.config.paths
    with suppress(UserError):  # networks of other ranges are merged
        for k, (name, folder) in enumerate(zip(run.config.timesteps.names, paths.experts, strict=True)):
            if name not in trained and not folder.exists():
                yield f"the expert of timesteps {name}", f"finetune.py finetune.range={k}"
    for name in (CONTINUED, DISTILLED, NEON):
        if not made_denoisers(name, paths)[0].exists():
            yield name, MAKERS[name]
    if run.search is None and SEARCH not in run.unreadable:
        yield "the search for coefficients", "search.py"
    if run.coefficients is None and MERGING not in run.unreadable:
        yield "the merged network", MAKERS["merged"]
    for name in ORDER:
        if name not in BASELINES and paths.all_samples / with_schedule(name, run.schedule) not in run.samples:
            yield f"samples of {name}", f"sample_ddp.py sample.model={name}"
    if not run.scores and RESULTS not in run.unreadable:
        yield "scores", "evaluate.py"
    if not run.analyses:
        yield "analyses", "analyze.py"


def verdict(scores: Sequence[Score], features: str, schedule: str = "") -> str:
    """What the scores say about merging, in a sentence or two; empty if there is nothing to compare.

    Of several schedules they are those of one.
    """
    by_name = {Path(row.samples).name: row.to_pretrained for row in scores}
    merged, control, neon = (by_name.get(with_schedule(name, schedule)) for name in ("merged", CONTINUED, NEON))
    if merged is None:
        return ""
    distance = distances(features)[0]
    text = f"By {schedule} the" if schedule else "The"
    text += f" merged network differs from the pretrained one by {signed(merged)} in {distance} (lower is better)"
    if merged.half_width is None:
        text += ", without a standard error."
    elif not merged.is_clear:
        text += f": nothing clear, its 95 % confidence interval of ± {merged.half_width:.4f} holds 0."
    else:
        word = "better" if merged.mean < 0 else "worse"
        text += f": clearly {word}, with a 95 % confidence interval of ± {merged.half_width:.4f}."
    text += "" if control is None else f" Plain training at the experts' cost: {signed(control)}."
    return text if neon is None else f"{text} Self-training, subtracted ({NEON}): {signed(neon)}."


def cost_table(run: Run) -> Table:
    """The cost of each stage, in images through the UNet and in minutes of training as logged."""
    rows = [[f"training {log.name}", f"{log.passes:,}", f"{log.seconds / 60:.1f}"] for log in run.logs]
    if any(log.name in run.config.self_trained_names for log in run.logs):
        minutes = number(seconds_in(run.config.paths.own_seconds), form=".1f", scale=1 / 60)
        rows.append(["drawing the own samples", run.passes_to_draw(run.config.paths.own_samples), minutes])
    if run.search is not None and run.search.passes is not None:
        minutes = number(run.search_seconds, form=".1f", scale=1 / 60)
        rows.append(["search, without its report", f"{run.search.passes:,}", minutes])
    for row in run.scores:
        rows.append([f"drawing {Path(row.samples).name}", run.passes_to_draw(Path(row.samples)), "-"])
    note = "A training step counts 3 passes for the trained network, forward and backward, and 1 for its teacher."
    return Table(["stage", "UNet passes", "minutes of its steps"], rows, note)
