"""The table of a comparison: each row's distance to the pretrained network, and its cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deme.compare.comparison import PRETRAINED, ComparedRun
from deme.config.networks import of_word
from deme.config.paths import sampler_and_steps, with_schedule
from deme.config.trainings import CONTINUED, DISTILLED, NAMED_TRAININGS, NEON, SELF
from deme.job.records import drawing_passes
from deme.measure.scores import Difference, Score, load_spaces, mean_and_deviation
from deme.models.searched import read_searched
from deme.models.variants import seconds_in
from deme.report.run import read_log
from deme.report.steps import Point
from deme.report.tables import Table, distances, number, signed

CLEAR = "*: the 95 % confidence interval, by Student's t, does not hold 0."


@dataclass(frozen=True)
class Row:
    """A model of a variation, over its trainings."""

    name: str
    seeds: list[int]
    pooled: float  # distance of all images, mean over the trainings
    to_pretrained: list[list[float]]  # difference of each block of images, per training
    to_continued: list[list[float]] | None  # to the control of the same seed, if there is one
    passes: int | None  # UNet passes to make the model, mean over the trainings; None: unknown, of folders as given
    hours: float | None  # None: unknown, as its search or the drawing of own samples took no notes
    widths: list[float | None]  # of the EMA of the merged networks, per training; None: the training's own
    schedule: str = ""  # of the images, if there are several


def difference(blocks: Sequence[Sequence[float]]) -> Difference:
    """The mean of the differences of each block of images, per training, and its standard error.

    The error has two parts. The images' noise is estimated from the blocks, as all trainings have the same images; the
    trainings' noise from the trainings. Welch and Satterthwaite give the degrees of freedom of their sum.
    """
    values = np.asarray(blocks)
    mean, between = mean_and_deviation(values.mean(axis=1))
    _, within = mean_and_deviation(values.mean(axis=0))
    if within is None:
        return Difference(mean, None)
    parts = [(deviation, count) for deviation, count in zip((between, within), values.shape, strict=True) if deviation]
    variance = sum(deviation**2 / count for deviation, count in parts)
    spread = sum((deviation**2 / count) ** 2 / (count - 1) for deviation, count in parts)
    return Difference(mean, variance**0.5, variance**2 / spread if parts else values.shape[1] - 1)


def compared_rows(runs: Sequence[ComparedRun], features: str) -> list[Row]:
    """A row for each model of each variation that has scores in these features, schedule by schedule.

    `runs` begins with the base.
    """
    return [row for schedule in runs[0].config.schedule_names for row in _rows_of(runs, features, schedule)]


def _rows_of(runs: Sequence[ComparedRun], features: str, schedule: str) -> list[Row]:
    trained: dict[tuple[str, str], list[tuple[ComparedRun, Score]]] = {}  # by variation and model
    for run in runs:
        file = run.config.paths.results
        found = load_spaces(file).get(features, []) if file.is_file() else []
        scores = {Path(score.samples).name: score for score in found}
        for model in run.models:
            if score := scores.get(with_schedule(model, schedule)):
                trained.setdefault((run.name, model), []).append((run, score))
    base = runs[0].name
    if (base, PRETRAINED) not in trained:  # its images could not be drawn
        return []
    [(_, pretrained)] = trained[base, PRETRAINED]
    controls = {run.config.seed: score for run, score in trained.get((base, CONTINUED), [])}
    rows = []
    for (name, model), pairs in trained.items():
        blocks = [score.blocks for _, score in pairs]
        seeds = [run.config.seed for run, _ in pairs]
        has_control = set(seeds) <= controls.keys() and model not in (PRETRAINED, CONTINUED)
        others = [controls[seed].blocks for seed in seeds] if has_control else None
        passes, seconds = zip(*[cost(run, model) for run, _ in pairs], strict=True)
        rows.append(
            Row(
                name=model if name == base else f"{name}, {model}",
                seeds=seeds,
                pooled=float(np.mean([score.pooled for _, score in pairs])),
                to_pretrained=np.subtract(blocks, pretrained.blocks).tolist(),
                to_continued=np.subtract(blocks, others).tolist() if has_control else None,
                passes=None if None in passes else round(np.mean(passes)),
                hours=None if None in seconds else float(np.mean(seconds)) / 3600,
                widths=[ema_width(run, model) for run, _ in pairs],
                schedule=schedule,
            )
        )
    return rows


def points_of_rows(rows: Sequence[Row], features: str) -> list[Point]:
    """The rows' distances, for the picture of them against the number of steps."""
    distance = distances(features)[0]
    errors = [difference(row.to_pretrained).half_width for row in rows]
    return [
        Point(distance, *sampler_and_steps(row.schedule), row.name, row.pooled, error)
        for row, error in zip(rows, errors, strict=True)
    ]


def ema_width(run: ComparedRun, model: str) -> float | None:
    """The EMA width of the networks that were merged to a model, as it was set or searched."""
    config = run.config
    if model == "merged" and config.needs_search and config.search.ema_widths:
        return read_searched(config.paths.best_coefficients).ema_width
    return config.merge.ema_width if model == "merged" else None


def cost(run: ComparedRun, model: str) -> tuple[int | None, float | None]:
    """UNet passes and seconds of the trainings, the search and the own samples that make a model, from their logs."""
    config = run.config
    is_merged = model in ("merged", DISTILLED)
    networks = config.merged_networks if is_merged else []
    networks += config.experts if model in ("ensemble", DISTILLED) else []
    networks += of_word(config, SELF) if model == NEON else []
    if any(network.word is None for network in networks):
        return None, None
    folders = [network.training for network in networks]
    folders += [config.paths.finetuning(model)] if model in NAMED_TRAININGS else []
    logs = [read_log(folder / "log.jsonl", config) for folder in dict.fromkeys(folders)]
    passes, noted = [log.passes for log in logs], [log.seconds for log in logs]
    for folder in [network.training.parent for network in networks if network.word == SELF][:1]:  # of one run
        passes.append(drawing_passes(folder.with_name(config.paths.own_samples.name)))
        noted.append(seconds_in(folder.with_name(config.paths.own_seconds.name)))
    if (is_merged and config.needs_search) or config.sample.prediction_scale == "search":
        passes.append(read_searched(config.paths.best_coefficients, None).passes or 0)
        noted.append(seconds_in(config.paths.search_seconds))
    return tuple(None if None in parts else sum(parts) for parts in (passes, noted))


def comparison_table(rows: Sequence[Row], features: str) -> str:
    """The rows as Markdown, without columns that would be empty."""

    def change(blocks: Sequence[Sequence[float]] | None) -> str:
        found = difference(blocks) if blocks else None
        return signed(found) + (" *" if found is not None and found.is_clear else "")

    pooled = f"{distances(features)[0]}, all images"
    several, has_control = any(len(row.seeds) > 1 for row in rows), any(row.to_continued for row in rows)
    columns: dict[str, Callable[[Row], str]] = {"model": lambda row: row.name}
    columns |= {"schedule": lambda row: row.schedule} if any(row.schedule for row in rows) else {}
    columns |= {"trainings": lambda row: str(len(row.seeds))} if several else {}
    columns[pooled] = lambda row: number(row.pooled)
    columns["difference to pretrained ± s.e."] = lambda row: change(row.to_pretrained)
    if several:
        spread = "s.d. between trainings"
        columns[spread] = lambda row: number(mean_and_deviation(np.mean(row.to_pretrained, axis=1))[1])
    columns |= {"to continued ± s.e.": lambda row: change(row.to_continued)} if has_control else {}
    if any(width for row in rows for width in row.widths):
        columns["EMA width"] = lambda row: ", ".join("own" if width is None else f"{width:g}" for width in row.widths)
    columns["UNet passes to make it"] = lambda row: "-" if row.passes is None else f"{row.passes:,}"
    columns["hours"] = lambda row: number(row.hours, form=".2f")

    def cell(row: Row, title: str) -> str:
        return "-" if row.name == PRETRAINED and title not in ("model", "schedule", pooled) else columns[title](row)

    cells = [[cell(row, title) for title in columns] for row in rows]
    return str(Table(list(columns), cells, CLEAR if any("*" in text for line in cells for text in line) else ""))
