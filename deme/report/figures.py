"""How all pictures look and are written: fonts, colours, PNG."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from deme.errors import UserError, one_line
from deme.job.files import atomic_file

matplotlib.use("agg")
SETTINGS = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}
SETTINGS["text.parse_math"] = False  # names may hold dollars
DPI = 110
# Okabe and Ito's palette, which colour-blind readers tell apart
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, GREY, BLACK = "#56B4E9", "#D55E00", "#999999", "#000000"


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def check_own(file: Path, folder: Path) -> None:
    """Make sure that a file can be shown: a PNG, and not a link to what lies outside of a folder."""
    if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{file} is a link to a file outside of the run")
    if not file.is_file():
        raise UserError(f"{file} is not a file")
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.verify()
    except Exception as error:  # Pillow raises whatever a damaged file leads to
        raise UserError(f"{file} is not a readable PNG ({one_line(error)})") from None


def bars(names: Sequence[str], values: Sequence[float], errors: Sequence[float], chosen: str, label: str) -> Figure:
    """A horizontal bar for each name, the first on top, with its error; the chosen one has another colour.

    Args:
        label: of the values.
    """
    figure = Figure(figsize=(6.5, 1.4 + 0.4 * len(names)))
    axes = figure.subplots()
    places = range(len(names))[::-1]
    colours = [VERMILION if name == chosen else BLUE for name in names]
    axes.barh(places, values, xerr=errors, color=colours, capsize=3)
    axes.set_yticks(places, names)
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set_xlabel(label)
    return figure
