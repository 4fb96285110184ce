"""Pictures of a search for coefficients: what it cost, what it found, what mattered, what it is worth."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from deme.measure.scores import Score
from deme.report.figures import BLUE, SETTINGS, VERMILION, bars, save_figure

SHOWN_CELLS = 80  # of a heat map, up to which each has its number
MOST_BARS = 16
MOST_PAIRED = 5  # coefficients whose pairs are shown


@dataclass(frozen=True)
class Curve:
    """The candidates of one way of searching, in order."""

    way: str
    objective: str
    passes: Sequence[int]  # through the UNet since the search began
    values: Sequence[float]


def save_search_plots(
    place: Callable[[str], Path],
    logs: Path,
    curves: Sequence[Curve],
    coefficients: np.ndarray,
    patterns: Sequence[str],
    ranges: Sequence[str],
    tried: tuple[Sequence[str], np.ndarray, np.ndarray] | None,
    importance: dict[str, float],
    scores: Sequence[Score],
) -> list[Path]:
    """Write pictures of a search, and the same for TensorBoard.

    Args:
        place: name of a picture → its file.
        logs: TensorBoard's folder, which is written anew.
        coefficients: the best, shape (groups, ranges).
        tried: names of the coefficients, the candidates of a study (n, P), and their values (n,).
        importance: name of a coefficient → its share of the values' variance.
        scores: on fresh seeds, the pretrained network first.
    """
    with matplotlib.rc_context(SETTINGS):
        figures = {"cost": cost(curves), "coefficients": coefficient_map(coefficients, patterns, ranges)}
        if tried is not None and importance:
            figures["importance"] = importances(importance)
            figures["pairs"] = pairs(*tried, list(importance)[:MOST_PAIRED])
        if len(scores) > 1:
            figures["fresh"] = fresh_differences(scores)
        files = []
        for name, figure in figures.items():
            files.append(place(name))
            save_figure(figure, files[-1])
        shutil.rmtree(logs, ignore_errors=True)
        with SummaryWriter(logs) as writer:
            for curve in curves:
                for passes, value in zip(curve.passes, curve.values, strict=True):
                    writer.add_scalar(f"{curve.objective}/{curve.way}", value, passes)
            for name, figure in figures.items():
                writer.add_figure(f"search/{name}", figure)
    return files


def cost(curves: Sequence[Curve]) -> Figure:
    """Objective against UNet passes: each candidate, and the least so far."""
    figure = Figure(figsize=(4.2 * len(curves), 3.6))
    for axes, curve in zip(np.atleast_1d(figure.subplots(1, len(curves), squeeze=True)), curves, strict=True):
        finite = [value if np.isfinite(value) else np.nan for value in curve.values]
        axes.plot(curve.passes, finite, "o", color=BLUE, markersize=4, alpha=0.6, label="candidate")
        least = np.fmin.accumulate(finite)
        axes.step(curve.passes, least, where="post", color=VERMILION, label="least so far")
        axes.set(title=curve.way, xlabel="UNet passes since the start", ylabel=curve.objective)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axes.legend()
    return figure


def coefficient_map(coefficients: np.ndarray, patterns: Sequence[str], ranges: Sequence[str]) -> Figure:
    """The coefficients as a heat map, a row per group of tensors, a column per range."""
    groups = len(patterns)
    figure = Figure(figsize=(max(4.0, 1.3 * len(ranges)) + 2, min(12.0, 1.8 + 0.35 * groups)))
    axes = figure.subplots()
    limit = max(1e-9, float(np.abs(coefficients).max()))
    image = axes.imshow(coefficients, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(ranges)), ranges)
    if groups <= SHOWN_CELLS:
        axes.set_yticks(
            range(groups), ["all tensors" if pattern == "*" and groups == 1 else pattern for pattern in patterns]
        )
    axes.set(xlabel="timesteps of the expert", ylabel="tensors")
    if coefficients.size <= SHOWN_CELLS:
        for (row, column), value in np.ndenumerate(coefficients):
            dark = abs(value) > 0.6 * limit
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
    figure.colorbar(image, label="coefficient")
    return figure


def importances(importance: dict[str, float]) -> Figure:
    """How much of the objective's variance over the candidates each coefficient explains."""
    chosen = dict(list(importance.items())[:MOST_BARS])
    figure = Figure(figsize=(6.5, 1.4 + 0.3 * len(chosen)))
    axes = figure.subplots()
    axes.barh(list(chosen)[::-1], list(chosen.values())[::-1], color=BLUE)
    axes.set(xlabel="importance (share of the objective's variance)", ylabel="coefficient of")
    return figure


def pairs(names: Sequence[str], candidates: np.ndarray, values: np.ndarray, chosen: Sequence[str]) -> Figure:
    """The objective over each pair of the chosen coefficients: a dot per candidate, the best one ringed."""
    finite = np.isfinite(values)
    candidates, values = candidates[finite], values[finite]
    count = max(2, len(chosen))
    figure = Figure(figsize=(2.4 * (count - 1) + 1.4, 2.2 * (count - 1) + 0.6))
    grid = figure.subplots(count - 1, count - 1, squeeze=False, sharex="col", sharey="row")
    order = np.argsort(values)[::-1]  # the best on top
    best = candidates[order[-1]]
    upper = np.quantile(values, 0.9)  # a few bad ones would take all the colours
    dots = None
    for row in range(count - 1):
        for column in range(count - 1):
            axes = grid[row][column]
            if column > row or row + 1 >= len(chosen):
                axes.set_visible(False)
                continue
            x, y = names.index(chosen[column]), names.index(chosen[row + 1])
            points = (candidates[order, x], candidates[order, y])
            dots = axes.scatter(*points, c=values[order], cmap="viridis", vmax=upper, s=18)
            axes.plot(best[x], best[y], "o", color=VERMILION, markersize=11, fillstyle="none", markeredgewidth=2)
            if row == count - 2:
                axes.set_xlabel(chosen[column])
            if column == 0:
                axes.set_ylabel(chosen[row + 1])
    if dots is not None:
        figure.colorbar(dots, ax=grid, label="objective (the lower the better)", shrink=0.8)
    return figure


def fresh_differences(scores: Sequence[Score]) -> Figure:
    """Paired differences to the pretrained network on fresh seeds, with two standard errors."""
    rows = [row for row in scores if row.difference is not None]
    return bars(
        [row.samples for row in rows],
        [row.difference for row in rows],
        [2 * (row.difference_standard_error or 0) for row in rows],
        "best",
        "distance − the pretrained network's (fresh seeds; ± 2 standard errors)",
    )
