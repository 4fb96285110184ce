"""Distance against number of sampling steps, where images were drawn with several schedules."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import attrgetter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from deme.config.paths import sampler_and_steps, without_schedule
from deme.measure.scores import Score
from deme.report import tables
from deme.report.figures import COLOURS, DASHES, MARKERS, MODELS, noted

MARGIN = 1.2  # above and below the values


@dataclass(frozen=True)
class Point:
    """A row's distance with one schedule."""

    distance: str  # its name: FID, classifier FD, …
    sampler: str
    steps: int
    name: str  # of the row
    value: float
    half_width: float | None  # of the 95 % confidence interval of its paired difference to the pretrained network


def points_of(scores: Sequence[Score], features: str) -> list[Point]:
    """The scores of the folders that have a schedule in their names."""
    points = []
    for row in scores:
        model, schedule = without_schedule(Path(row.samples).name)
        error = None if row.to_pretrained is None else row.to_pretrained.half_width
        if schedule:
            points.append(Point(tables.distances(features)[0], *sampler_and_steps(schedule), model, row.pooled, error))
    return points


def distance_by_steps(points: Sequence[Point]) -> Figure:
    """A line for each row, in a panel for each sampler, with a row of panels for each distance."""
    parts = map(attrgetter, ("distance", "sampler", "name"))
    distances, samplers, names = (list(dict.fromkeys(map(part, points))) for part in parts)
    note = "bars: 95 % confidence interval of the difference to pretrained"
    figure = noted(max(6.0, 3.6 * len(samplers) + 0.8), 3.2 * len(distances) + 0.8, note)
    pictures = figure.subplots(len(distances), len(samplers), squeeze=False, sharex=True, sharey="row")
    ticks = sorted({one.steps for one in points})
    for (row, column), axes in np.ndenumerate(pictures):
        here = [one for one in points if (one.distance, one.sampler) == (distances[row], samplers[column])]
        for name, style in styles_of(names).items():
            line = sorted((one for one in here if one.name == name), key=attrgetter("steps"))
            values, errors = [one.value for one in line], [one.half_width or 0 for one in line]
            thin = {"capsize": 2, "elinewidth": 0.8, "markersize": 5}
            axes.errorbar([one.steps for one in line], values, errors, label=name, **thin, **style)
        axes.set(xscale="log", yscale="log", title=samplers[column], xlabel="sampling steps", ylabel=distances[row])
        axes.set_xticks(ticks, map(str, ticks))
        if heights := [one.value for one in points if one.distance == distances[row] and one.value > 0]:
            axes.set_ylim(min(heights) / MARGIN, max(heights) * MARGIN)  # not down to the ends of long bars
        axes.yaxis.set(major_locator=MaxNLocator(6), major_formatter="{x:g}", minor_locator=NullLocator())
        axes.xaxis.set(minor_locator=NullLocator())
        axes.label_outer()
    figure.legend(*pictures[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def styles_of(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Row → the style of its line: a model's own colour, undashed, and the colours and dashes that are left."""
    taken = [(MODELS[name], DASHES[0]) for name in names if name in MODELS]
    free = cycle((colour, dashes) for dashes in DASHES for colour in COLOURS if (colour, dashes) not in taken)
    styles = {}
    for name, marker in zip(names, cycle(MARKERS)):
        colour, dashes = (MODELS[name], DASHES[0]) if name in MODELS else next(free)
        styles[name] = {"color": colour, "marker": marker, "linestyle": dashes}
    return styles
