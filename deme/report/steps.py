"""Distance against number of sampling steps, where images were drawn with several schedules."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from operator import attrgetter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from deme.config.paths import sampler_and_steps, without_schedule
from deme.measure.scores import Score
from deme.report import tables
from deme.report.figures import COLOURS, DASHES, MARKERS, MODELS, noted

MARGIN = 1.1  # above and below the values
SPREAD = 1.1  # factor of the steps within which the lines lie side by side


@dataclass(frozen=True)
class Point:
    """A row's distance with one schedule."""

    distance: str  # its name: FID, classifier FD, …
    sampler: str
    steps: int
    name: str  # of the row
    value: float
    half_width: float | None  # of the 95 % confidence interval of its paired difference to the pretrained network

    @property
    def schedule(self) -> tuple[str, str, int]:
        """What the points of one distance and schedule have in common."""
        return self.distance, self.sampler, self.steps

    def over(self, whole: float) -> "Point":
        """The point as a part of a whole."""
        return replace(self, value=self.value / whole, half_width=self.half_width and self.half_width / whole)


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
    """A line for each row, in a panel for each sampler, with a row of panels for each distance.

    Where the pretrained network has a point with every schedule, distances are relative to its own, which stand below
    the numbers of steps.
    """
    parts = map(attrgetter, ("distance", "sampler", "name"))
    distances, samplers, names = (list(dict.fromkeys(map(part, points))) for part in parts)
    whole = {one.schedule: one.value for one in points if one.name == "pretrained" and one.value > 0}
    if is_relative := all(one.schedule in whole for one in points):
        points = [one.over(whole[one.schedule]) for one in points]
    note = "bars: 95 % confidence interval of the difference to pretrained"
    note += "; below the steps: its own distance" * is_relative
    figure = noted(max(6.0, 3.6 * len(samplers) + 0.8), (3 + 0.06 * len(names)) * len(distances) + 1.2, note)
    widths = [1 + len({one.steps for one in points if one.sampler == sampler}) for sampler in samplers]
    shape = {"squeeze": False, "sharey": "row", "width_ratios": widths}
    pictures = figure.subplots(len(distances), len(samplers), **shape)
    for (row, column), axes in np.ndenumerate(pictures):
        distance = distances[row]
        here = [one for one in points if (one.distance, one.sampler) == (distance, samplers[column])]
        draw_lines(axes, here, names)
        label = distance + ", relative to pretrained" * is_relative
        axes.set(title=samplers[column], xlabel="sampling steps", ylabel=label if column == 0 else "")
        own = {one.steps: f"\n{whole[one.schedule]:.3g}" if is_relative else "" for one in here}
        axes.set_xticks(list(own), [f"{steps}{value}" for steps, value in own.items()])
        axes.set_yscale("linear" if is_relative else "log")
        if heights := [one.value for one in points if one.distance == distance and one.value > 0]:
            axes.set_ylim(min(heights) / MARGIN, max(heights) * MARGIN)  # not down to the ends of long bars
        axes.yaxis.set(major_locator=MaxNLocator(6), major_formatter="{x:g}", minor_locator=NullLocator())
    figure.legend(*pictures[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def draw_lines(axes: Axes, points: Sequence[Point], names: Sequence[str]) -> None:
    """A line for each name, over a logarithm of the steps; the lines lie side by side, so that their bars do."""
    thin = {"capsize": 2, "elinewidth": 0.8, "markersize": 5, "linewidth": 1}
    asides = SPREAD ** (np.linspace(-1, 1, len(names)) if len(names) > 1 else [0])
    axes.set_xscale("log")
    axes.xaxis.set(minor_locator=NullLocator())
    for (name, style), aside in zip(styles_of(names).items(), asides, strict=True):
        line = sorted((one for one in points if one.name == name), key=attrgetter("steps"))
        values, errors = [one.value for one in line], [one.half_width or 0 for one in line]
        axes.errorbar([one.steps * aside for one in line], values, errors, label=name, **thin, **style)


def styles_of(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Row → the style of its line: a model's own colour, undashed, and the colours and dashes that are left."""
    taken = [(MODELS[name], DASHES[0]) for name in names if name in MODELS]
    free = cycle((colour, dashes) for dashes in DASHES for colour in COLOURS if (colour, dashes) not in taken)
    styles = {}
    for name, marker in zip(names, cycle(MARKERS)):
        colour, dashes = (MODELS[name], DASHES[0]) if name in MODELS else next(free)
        styles[name] = {"color": colour, "marker": marker, "linestyle": dashes}
    return styles
