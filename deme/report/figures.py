"""Figures: their style and common parts, and those of a search and of a run."""

import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogFormatter
from PIL import Image

from deme.config.experiment import Config
from deme.config.trainings import CONTINUED, DISTILLED, NEON
from deme.data.samples import read_images
from deme.errors import UserError, one_line
from deme.job.files import atomic_file
from deme.measure.scores import Score
from deme.report.run import TrainingLog
from deme.report.tables import distances

matplotlib.use("agg")
matplotlib.rcParams |= {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}
matplotlib.rcParams |= {"axes.titlesize": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9}
matplotlib.rcParams["text.parse_math"] = False  # names may hold dollars
DPI = 110
# Okabe and Ito's palette, which colour-blind readers tell apart
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, GREY, BLACK = "#56B4E9", "#D55E00", "#999999", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, GREY, BLACK)
MARKERS = "osD^vPX*"  # as many as colours
MODELS = {"pretrained": BLACK, CONTINUED: SKY, "ensemble": GREEN, "merged": VERMILION, DISTILLED: GREY}
MODELS[NEON] = PINK
DASHES = ("-", "--", "-.", ":")
UNKNOWN = "#bbbbbb"  # cells of a heat map that hold NaN
SEPARATOR = {"color": "black", "linewidth": 0.8, "linestyle": ":"}  # style of lines between ranges
MOST_CELLS = 150  # of a heat map with a number in each cell
MOST_GROUPS = 80  # of tensors that are named
MOST_BARS = 16
MOST_PAIRED = 5  # coefficients whose pairs are shown
LEAST_SIDE = 48  # pixels of an image in a strip
MOST_COMPARED = 2_000  # images that are searched for the most different ones


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def check_own(file: Path, folder: Path) -> None:
    """Check that a file is a readable PNG and not a link out of a folder."""
    if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{file} is a link to a file outside of the run")
    if not file.is_file():
        raise UserError(f"{file} is not a file")
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.verify()
    except Exception as error:  # Pillow raises whatever a damaged file leads to
        raise UserError(f"{file} is not a readable PNG ({one_line(error)})") from None


def model_style(name: str, number: int) -> dict[str, str]:
    """Colour and marker of a model: its own colour, or that of its place in the picture."""
    colour = MODELS.get(name, COLOURS[number % len(COLOURS)])
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)]}


def noted(width: float, height: float, note: str) -> Figure:
    """An empty figure with a note at its lower edge."""
    figure = Figure(figsize=(width, height))
    figure.supxlabel(note, fontsize=9, color="#444444")
    return figure


def grid(
    count: int, size: tuple[float, float], note: str, x: str, y: str, across: int = 4
) -> tuple[Figure, list[Axes]]:
    """`count` pictures of the same size and axes, at most `across` in a row, with labels at the outer ones."""
    columns = min(count, across)
    rows = -(-count // columns)
    figure = noted(size[0] * columns, size[1] * rows + 0.4, note)
    pictures = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for unused in pictures[count:]:
        unused.set_visible(False)
    for lowest in pictures[max(0, count - columns) : count]:  # also those above an empty place
        lowest.xaxis.set_tick_params(labelbottom=True)
        lowest.set_xlabel(x)
    for first in pictures[:count:columns]:
        first.set_ylabel(y)
    return figure, pictures[:count]


def name_rows(figure: Figure, axes: Axes, names: Sequence[str], columns: int) -> None:
    """Names at the y axis, the first on top, and this picture's legend above the figure, in so many columns."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def heat_map(
    axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], limit: float = 1.0, form: str = ".2f"
) -> AxesImage:
    """Values in [−limit, limit] as colours, with their numbers if there are few."""
    axes.set_facecolor(UNKNOWN)
    image = axes.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    if values.size <= MOST_CELLS:
        for (row, column), value in np.ndenumerate(values):
            text = f"{value:{form}}" if np.isfinite(value) else "?"
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    return image


# --- of a search


def save_search_plots(
    config: Config, coefficients: Mapping[str, Sequence[float]], result: Any, scores: Sequence[Score]
) -> list[Path]:
    """Write pictures of a search, and the same for TensorBoard.

    The coefficients are the best, by name pattern; the result is that of deme/search/ways.py; the scores, on fresh
    seeds, begin with the pretrained network's.
    """
    from torch.utils.tensorboard import SummaryWriter

    figures = {
        "cost": cost(result.evaluated),
        "coefficients": coefficient_map(coefficients, config, config.searches_scales),
    }
    importance = {} if result.study is None else result.study.importance()
    if importance:
        names, shares = list(importance), list(importance.values())
        label = "importance of each coefficient (share of the objective's variance)"
        figures["importance"] = bars(names[:MOST_BARS], shares[:MOST_BARS], None, label)
    if len(importance) > 1:
        figures["pairs"] = pairs(result.study.problem.names, result.study.rows(), names[:MOST_PAIRED])
    if len(scores) > 1:
        figures["fresh"] = score_bars(scores, config.evaluate.judges[0].name, "best")
    logs = config.paths.search / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    with SummaryWriter(logs) as writer:
        for row in result.evaluated:
            writer.add_scalar(f"{row.objective}/{row.way}", row.value, row.passes)
        for name, figure in figures.items():
            save_figure(figure, config.paths.search_picture(name))
            writer.add_figure(f"search/{name}", figure)
    return list(map(config.paths.search_picture, figures))


def cost(evaluated: Sequence[Any]) -> Figure:
    """Objective against UNet passes, per way: each candidate, and the least so far."""
    ways = [list(rows) for _, rows in groupby(evaluated, lambda row: row.way)]
    figure = Figure(figsize=(4.2 * len(ways), 3.6))
    for axes, rows in zip(figure.subplots(1, len(ways), squeeze=False)[0], ways, strict=True):
        passes = [row.passes for row in rows]
        finite = [row.value if np.isfinite(row.value) else np.nan for row in rows]
        axes.plot(passes, finite, "o", color=BLUE, markersize=4, alpha=0.6, label="candidate")
        axes.step(passes, np.fmin.accumulate(finite), where="post", color=VERMILION, label="least so far")
        axes.set(title=rows[0].way, xlabel="UNet passes since the start", ylabel=rows[0].objective)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axes.legend()
    return figure


def coefficient_map(
    coefficients: Mapping[str, Sequence[float]],
    config: Config,
    of_ranges: bool = False,
    label: str = "coefficient",
    form: str = ".2f",
) -> Figure:
    """The coefficients as a heat map, a row per group of tensors, a column per expert or timestep range."""
    values, experts = (
        np.array(list(coefficients.values())),
        config.timesteps.names if of_ranges else config.merged_names,
    )
    names = ["all tensors"] if list(coefficients) == ["*"] else list(coefficients)
    figure = Figure(figsize=(max(4.0, 1.3 * len(experts)) + 2, min(12.0, 1.8 + 0.35 * len(values))))
    axes = figure.subplots()
    limit = max(1e-9, float(np.abs(values).max()))
    image = heat_map(axes, values, names if len(names) <= MOST_GROUPS else [], experts, limit, form)
    axes.set_xticks(range(len(experts)), experts, rotation=0, ha="center")
    network = "timesteps of the expert" if config.merges_experts else "network"
    axes.set(xlabel="timesteps" if of_ranges else network, ylabel="tensors")
    figure.colorbar(image, label=label)
    return figure


def pairs(names: Sequence[str], rows: Sequence[Any], chosen: Sequence[str]) -> Figure:
    """The objective over each pair of the chosen coefficients: a dot per candidate, the best one ringed."""
    rows = sorted((row for row in rows if np.isfinite(row.value)), key=lambda row: -row.value)  # the best on top
    values = [row.value for row in rows]
    columns = [[row.coefficients.flat[names.index(name)] for row in rows] for name in chosen]
    upper = np.quantile(values, 0.9)  # a few bad ones would take all the colours
    size = len(chosen) - 1
    figure = Figure(figsize=(2.4 * size + 1.4, 2.2 * size + 0.6))
    pictures = figure.subplots(size, size, squeeze=False, sharex="col", sharey="row")
    for (row, column), axes in np.ndenumerate(pictures):
        if column > row:
            axes.set_visible(False)
            continue
        x, y = columns[column], columns[row + 1]
        dots = axes.scatter(x, y, c=values, cmap="viridis", vmax=upper, s=18)
        axes.plot(x[-1], y[-1], "o", color=VERMILION, markersize=11, fillstyle="none", markeredgewidth=2)
        axes.set(xlabel=chosen[column], ylabel=chosen[row + 1])
        axes.label_outer()
    figure.colorbar(dots, ax=pictures, label="objective (the lower the better)", shrink=0.8)
    return figure


# --- of a run


def score_bars(scores: Sequence[Score], features: str, chosen: str) -> Figure:
    """Paired differences to the pretrained network with 95 % confidence intervals; without them, the distances."""
    rows = [row for row in scores if row.to_pretrained is not None]
    if rows:
        values = [(row.to_pretrained.mean, row.to_pretrained.half_width or 0) for row in rows]
        label = "− the pretrained network's (95 % confidence intervals; lower is better)"
    else:
        rows, label = scores, "(± standard deviation of blocks; lower is better)"
        values = [(row.pooled, row.standard_deviation or 0) for row in rows]
    names = [Path(row.samples).name for row in rows]
    return bars(names, *zip(*values, strict=True), f"{distances(features)[0]} {label}", chosen)


def bars(
    names: Sequence[str], values: Sequence[float], errors: Sequence[float] | None, label: str, chosen: str = ""
) -> Figure:
    """A horizontal bar for each name, the first on top; the chosen one has another colour."""
    figure = Figure(figsize=(6.5, 1.4 + 0.4 * len(names)))
    axes = figure.subplots()
    places = range(len(names))[::-1]
    axes.barh(places, values, xerr=errors, color=[VERMILION if name == chosen else BLUE for name in names], capsize=3)
    axes.set_yticks(places, names)
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set_xlabel(label)
    return figure


def training_curves(logs: Sequence[TrainingLog]) -> Figure:
    """The training loss of all runs on one axis."""
    figure = Figure(figsize=(7, 3.8))
    axes = figure.subplots()
    for k, log in enumerate(logs):
        style = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k // len(COLOURS) % len(DASHES)]}
        axes.plot(log.steps, log.losses, label=log.name, **style)
    axes.set(xlabel="optimizer steps", ylabel="training loss (mean squared error)", yscale="log")
    # the default formatter writes math, which is turned off above
    axes.yaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
    axes.legend(title="timesteps", title_fontsize=9)
    return figure


def common_images(folders: Sequence[Path]) -> list[str]:
    """The names of the images in all folders, in the order of their seeds; other files are ignored."""
    names = [{path.name for path in folder.glob("*.png") if path.stem.isdecimal()} for folder in folders]
    return sorted(set.intersection(*names), key=lambda name: int(Path(name).stem)) if names else []


class Strips:
    """Images of the same seeds side by side; `run` is the run's folder, and no link out of it is followed."""

    def __init__(self, run: Path):
        self.run = run
        self.left_out: dict[str, None] = {}  # reasons, in order

    def pixels(self, file: Path) -> np.ndarray | None:
        """uint8 RGB, shape (H, W, 3); None if the image is left out."""
        try:
            check_own(file, self.run)
            return read_images([file])[0].permute(1, 2, 0).numpy()
        except UserError as error:
            self.left_out[str(error)] = None
            return None

    def draw(self, folders: Sequence[Path], names: Sequence[str]) -> Figure:
        """A column for each model's folder, a row for each image's name."""
        figure = Figure(figsize=(1.15 * len(folders) + 0.7, 1.0 * len(names) + 0.5))
        pictures = figure.subplots(len(names), len(folders), squeeze=False)
        for (row, column), axes in np.ndenumerate(pictures):
            pixels = self.pixels(folders[column] / names[row])
            if pixels is not None:
                axes.imshow(pixels, interpolation="nearest" if len(pixels) < LEAST_SIDE else "antialiased")
            axes.grid(False)
            axes.set(xticks=[], yticks=[])
        for axes, folder in zip(pictures[0], folders, strict=True):
            axes.set_title(folder.name, fontsize=9)
        for axes, name in zip(pictures[:, 0], names, strict=True):
            axes.set_ylabel(f"seed {int(Path(name).stem)}", fontsize=9)
        return figure

    def most_different(self, first: Path, second: Path, names: Sequence[str], count: int) -> list[str]:
        """The images that differ most between two models, by the mean square over pixels; those of one size alone."""
        distances = {}
        for name in names:
            one, other = (self.pixels(folder / name) for folder in (first, second))
            if one is None or other is None:
                continue
            if one.shape == other.shape:
                distances[name] = float(np.square(one.astype(np.float64) - other).mean())
            else:
                self.left_out[f"differences of images of other sizes in {first} and {second}"] = None
        return sorted(distances, key=distances.get, reverse=True)[:count]
