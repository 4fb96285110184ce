"""Pictures of a search for coefficients: what it cost, what it found, what mattered, what it is worth."""

import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from deme.config.experiment import Config
from deme.config.sections import range_name
from deme.measure.scores import Score
from deme.report.figures import BLUE, SETTINGS, VERMILION, bars, save_figure

SHOWN_CELLS = 80  # of a heat map, up to which each has its number
MOST_BARS = 16
MOST_PAIRED = 5  # coefficients whose pairs are shown


def save_search_plots(
    config: Config,
    coefficients: dict[str, list[float]],
    evaluated: Sequence[Any],
    study: Any | None,
    scores: Sequence[Score],
) -> list[Path]:
    """Write pictures of a search, and the same for TensorBoard.

    Args:
        coefficients: the best, by name pattern.
        evaluated: the candidates in order, each with its way, objective, passes and value.
        study: gives the rows of its candidates, and the importance of each coefficient.
        scores: on fresh seeds, the pretrained network first.
    """
    place, logs = config.paths.search_picture, config.paths.search / "logs"
    patterns, ranges = list(coefficients), list(map(range_name, config.timesteps.ranges))
    with matplotlib.rc_context(SETTINGS):
        figures = {
            "cost": cost(evaluated),
            "coefficients": coefficient_map(np.array(list(coefficients.values())), patterns, ranges),
        }
        importance = study.importance() if study is not None else {}
        if importance:
            figures["importance"] = importances(importance)
            figures["pairs"] = pairs(study.problem.names, study.rows(), list(importance)[:MOST_PAIRED])
        if len(scores) > 1:
            figures["fresh"] = fresh_differences(scores)
        files = {name: place(name) for name in figures}
        for name, figure in figures.items():
            save_figure(figure, files[name])
        shutil.rmtree(logs, ignore_errors=True)
        with SummaryWriter(logs) as writer:
            for row in evaluated:
                writer.add_scalar(f"{row.objective}/{row.way}", row.value, row.passes)
            for name, figure in figures.items():
                writer.add_figure(f"search/{name}", figure)
    return list(files.values())


def cost(evaluated: Sequence[Any]) -> Figure:
    """Objective against UNet passes, per way: each candidate, and the least so far."""
    ways = [list(rows) for _, rows in groupby(evaluated, lambda row: row.way)]
    figure = Figure(figsize=(4.2 * len(ways), 3.6))
    for axes, rows in zip(np.atleast_1d(figure.subplots(1, len(ways))), ways, strict=True):
        passes = [row.passes for row in rows]
        finite = [row.value if np.isfinite(row.value) else np.nan for row in rows]
        axes.plot(passes, finite, "o", color=BLUE, markersize=4, alpha=0.6, label="candidate")
        axes.step(passes, np.fmin.accumulate(finite), where="post", color=VERMILION, label="least so far")
        axes.set(title=rows[0].way, xlabel="UNet passes since the start", ylabel=rows[0].objective)
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
        axes.set_yticks(range(groups), ["all tensors"] if list(patterns) == ["*"] else patterns)
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


def pairs(names: Sequence[str], rows: Sequence[Any], chosen: Sequence[str]) -> Figure:
    """The objective over each pair of the chosen coefficients: a dot per candidate, the best one ringed."""
    rows = sorted((row for row in rows if np.isfinite(row.value)), key=lambda row: -row.value)  # the best on top
    values = [row.value for row in rows]
    columns = [[row.coefficients.flat[names.index(name)] for row in rows] for name in chosen]
    upper = np.quantile(values, 0.9)  # a few bad ones would take all the colours
    size = max(1, len(chosen) - 1)
    figure = Figure(figsize=(2.4 * size + 1.4, 2.2 * size + 0.6))
    grid = figure.subplots(size, size, squeeze=False, sharex="col", sharey="row")
    for row, column in np.ndindex(size, size):
        axes = grid[row][column]
        if column > row or row + 1 >= len(chosen):
            axes.set_visible(False)
            continue
        x, y = columns[column], columns[row + 1]
        dots = axes.scatter(x, y, c=values, cmap="viridis", vmax=upper, s=18)
        axes.plot(x[-1], y[-1], "o", color=VERMILION, markersize=11, fillstyle="none", markeredgewidth=2)
        if row == size - 1:
            axes.set_xlabel(chosen[column])
        if column == 0:
            axes.set_ylabel(chosen[row + 1])
    if len(chosen) > 1:
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
