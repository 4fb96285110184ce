"""The table of a comparison: each row's distance to the pretrained network over trainings, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deme.compare.comparison import PRETRAINED, ComparedRun
from deme.config.sections import CONTINUED, DISTILLED, NAMED_TRAININGS, range_name
from deme.errors import UserError
from deme.measure.scores import Score, load_scores, mean_and_deviation
from deme.models.searched import read_searched, seconds_of
from deme.report.story import Curve, read_curve
from deme.report.tables import NAMES, markdown_table, number


@dataclass(frozen=True)
class Row:
    """A model of a variation, over the trainings that there are."""

    name: str
    seeds: list[int]
    pooled: float  # the distance of all images, mean over the trainings
    to_pretrained: list[list[float]]  # difference of each block of images, per training
    to_continued: list[list[float]] | None  # to the control of the same seed, where there is one
    passes: int  # through the UNet, of all that makes the model; mean over the trainings
    hours: float | None  # None: not known of its search

    @property
    def deviation(self) -> float | None:
        """Between the trainings."""
        return mean_and_deviation(np.mean(self.to_pretrained, axis=1))[1]


def difference(blocks: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """The mean of differences and its standard error, of the images' noise and of the trainings' together.

    The first is had from the blocks, whose images are the same for all trainings, the second from the trainings.

    Args:
        blocks: per training the difference of each block of images.
    """
    values = np.asarray(blocks)
    mean, between = mean_and_deviation(values.mean(axis=1))
    _, within = mean_and_deviation(values.mean(axis=0))
    if within is None:
        return mean, None
    variance = within**2 / values.shape[1] + (0.0 if between is None else between**2 / len(values))
    return mean, variance**0.5


def differences(rows: Sequence[Score], others: Sequence[Score]) -> list[list[float]]:
    """Of each row's blocks to those of its counterpart."""
    for row, other in zip(rows, others, strict=True):
        if len(row.blocks) != len(other.blocks):
            raise UserError(f"{row.samples}: {len(row.blocks)} blocks, {other.samples} has {len(other.blocks)}")
    return [np.subtract(row.blocks, other.blocks).tolist() for row, other in zip(rows, others, strict=True)]


def compared_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """A row for each model of each variation that has images and scores.

    Args:
        runs: the base first.
    """
    scores = {(run.name, run.seed): scores_of(run) for run in runs}
    base = runs[0]
    pretrained = scores[base.name, base.seed].get(PRETRAINED)
    if pretrained is None:  # its images could not be drawn
        return []
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        of_name = [run for run in runs if run.name == name]
        for model in dict.fromkeys(model for run in of_name for model in run.models):
            there = [run for run in of_name if model in run.models and model in scores[name, run.seed]]
            if not there:
                continue
            found = [scores[name, run.seed][model] for run in there]
            controls = [scores.get((base.name, run.seed), {}).get(CONTINUED) for run in there]
            passes, seconds = zip(*[cost(run, model) for run in there], strict=True)
            has_control = all(controls) and model not in (PRETRAINED, CONTINUED)
            rows.append(
                Row(
                    name=model if name == base.name else f"{name}, {model}",
                    seeds=[run.seed for run in there],
                    pooled=float(np.mean([row.pooled for row in found])),
                    to_pretrained=differences(found, [pretrained] * len(found)),
                    to_continued=differences(found, controls) if has_control else None,
                    passes=round(np.mean(passes)),
                    hours=None if None in seconds else float(np.mean(seconds)) / 3600,
                )
            )
    return rows


def scores_of(run: ComparedRun) -> dict[str, Score]:
    """The scores of a run's models, by name, of those that it compares."""
    file = run.config.paths.results
    rows = load_scores(file)[1] if file.is_file() else []
    return {Path(row.samples).name: row for row in rows if Path(row.samples).name in run.models}


def cost(run: ComparedRun, model: str) -> tuple[int, float | None]:
    """UNet passes and seconds of all that makes a model, as trainings and the search have noted them."""
    config = run.config
    parts: list[str] = []
    if model in ("ensemble", "merged", DISTILLED):
        parts += map(range_name, config.timesteps.ranges)
    if model in NAMED_TRAININGS:
        parts.append(model)
    curves = [curve_of(run, name) for name in parts]
    passes = sum(curve.passes(config) for curve in curves)
    seconds = sum(curve.seconds for curve in curves)
    if model in ("merged", DISTILLED) and config.paths.searched:
        passes += read_searched(config.paths.best_coefficients).passes or 0
        searched = seconds_of(config.paths.search)
        seconds = None if searched is None else seconds + searched
    return passes, seconds


def curve_of(run: ComparedRun, name: str) -> Curve:
    """The log of a training."""
    return read_curve(name, run.config.paths.finetuning(name) / "log.jsonl", run.config.finetune.batch_size)


def comparison_table(rows: Sequence[Row], features: str) -> str:
    """The rows as Markdown."""
    distance = NAMES[features][0]
    several = any(len(row.seeds) > 1 for row in rows)
    with_control = any(row.to_continued for row in rows)
    titles = ["model", *(["trainings"] if several else []), f"{distance}, all images"]
    titles += ["difference to pretrained ± s.e.", *(["s.d. between trainings"] if several else [])]
    titles += ["to continued ± s.e."] if with_control else []
    titles += ["UNet passes to make it", "hours"]
    lines = []
    for row in rows:
        is_first = row.name == PRETRAINED
        line = [row.name, *([str(len(row.seeds)) if not is_first else "-"] if several else []), number(row.pooled)]
        line.append("-" if is_first else number(*difference(row.to_pretrained), "+.4f"))
        line += ["-" if is_first else number(row.deviation)] if several else []
        if with_control:
            line.append(number(*difference(row.to_continued), "+.4f") if row.to_continued else "-")
        line += ["-", "-"] if is_first else [f"{row.passes:,}", number(row.hours, form=".2f")]
        lines.append(line)
    return markdown_table(titles, lines)
