"""How pictures look: fonts, colours, grids, heat maps, PNG files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from deme.config.trainings import CONTINUED, DISTILLED
from deme.errors import UserError, one_line
from deme.job.files import atomic_file

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
DASHES = ("-", "--", "-.", ":")
UNKNOWN = "#bbbbbb"  # cells of a heat map that hold NaN
SEPARATOR = {"color": "black", "linewidth": 0.8, "linestyle": ":"}  # style of lines between ranges
MOST_CELLS = 150  # of a heat map with a number in each cell


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


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names at the y axis, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def legend_above(figure: Figure, axes: Axes, columns: int) -> None:
    """The legend of one of a figure's pictures above all of them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def heat_map(
    axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], limit: float = 1.0
) -> AxesImage:
    """Values in [−limit, limit] as colours, with their numbers if there are few."""
    axes.set_facecolor(UNKNOWN)
    image = axes.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    if values.size <= MOST_CELLS:
        for (row, column), value in np.ndenumerate(values):
            text = f"{value:.2f}" if np.isfinite(value) else "?"
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    return image


def cosine_maps(
    whole: np.ndarray, names: Sequence[str], by_block: np.ndarray, blocks: Sequence[str], label: str, note: str
) -> Figure:
    """Cosines of whole networks, shape (N, N), beside those of all pairs of the first E in each block, (G, E, E)."""
    experts = names[: by_block.shape[1]]
    first, second = np.triu_indices(len(experts), k=1)
    pairs = [f"{experts[i]}\nand {experts[j]}" for i, j in zip(first, second, strict=True)]
    figure = noted(max(9.6, 5 + 0.75 * len(pairs)), max(5.2, 3.2 + 0.3 * len(blocks)), note)
    left, right = figure.subplots(1, 2)
    heat_map(left, whole, names, names)
    left.set_title("all layers")
    image = heat_map(right, by_block[:, first, second], blocks, pairs)
    right.set_title("pairs of ranges, by block of layers")
    figure.colorbar(image, ax=[left, right], label=label, shrink=0.85)
    return figure
