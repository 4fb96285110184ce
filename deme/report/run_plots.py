"""Pictures of a whole run: its scores, its training, its samples at equal seeds."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from deme.data.samples import read_images
from deme.errors import UserError
from deme.measure.scores import Score
from deme.report.figures import COLOURS, DASHES, bars, check_own
from deme.report.run import TrainingLog

LEAST_SIDE = 48  # pixels of an image in a strip
OF_SEED = re.compile(r"[0-9]+\.png")
MOST_COMPARED = 2_000  # images that are searched for the most different ones


def results(scores: Sequence[Score], distance: str) -> Figure:
    """Paired differences to the pretrained network with two standard errors; without them, the distances."""
    rows = [row for row in scores if row.difference is not None]
    if rows:
        values = [row.difference for row in rows]
        errors = [2 * (row.difference_standard_error or 0) for row in rows]
        label = f"{distance} − the pretrained network's (± 2 standard errors; lower is better)"
    else:
        rows = scores
        values = [row.pooled for row in rows]
        errors = [row.standard_deviation or 0 for row in rows]
        label = f"{distance} (± standard deviation of blocks; lower is better)"
    return bars([Path(row.samples).name for row in rows], values, errors, "merged", label)


def training_curves(logs: Sequence[TrainingLog]) -> Figure:
    """The training loss of all runs on one axis."""
    figure = Figure(figsize=(7, 3.8))
    axes = figure.subplots()
    for k, log in enumerate(logs):
        style = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k // len(COLOURS) % len(DASHES)]}
        axes.plot(log.steps, log.losses, label=log.name, **style)
    axes.set(xlabel="optimizer steps", ylabel="training loss (mean squared error)", yscale="log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(LogFormatter())  # the default one writes math, which figures.py turns off
    axes.legend(title="timesteps", title_fontsize=9)
    return figure


def common_images(folders: Sequence[Path]) -> list[str]:
    """The names of the images in all folders, in the order of their seeds; other files are ignored."""
    names = [{path.name for path in folder.glob("*.png") if OF_SEED.fullmatch(path.name)} for folder in folders]
    return sorted(set.intersection(*names), key=lambda name: int(Path(name).stem)) if names else []


class Strips:
    """Images of the same seeds side by side.

    Args:
        run: the run's folder; a link to an image outside of it is not followed.
    """

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
        grid = figure.subplots(len(names), len(folders), squeeze=False)
        for (row, column), axes in np.ndenumerate(grid):
            pixels = self.pixels(folders[column] / names[row])
            if pixels is not None:
                axes.imshow(pixels, interpolation="nearest" if len(pixels) < LEAST_SIDE else "antialiased")
            axes.grid(False)
            axes.set(xticks=[], yticks=[])
        for axes, folder in zip(grid[0], folders, strict=True):
            axes.set_title(folder.name, fontsize=9)
        for axes, name in zip(grid[:, 0], names, strict=True):
            axes.set_ylabel(f"seed {int(Path(name).stem)}", fontsize=9)
        return figure

    def most_different(self, first: Path, second: Path, names: Sequence[str], count: int) -> list[str]:
        """The images that differ most between two models, by the mean square over pixels; those of one size alone."""
        distances = {}
        for name in names:
            one, other = (self.pixels(folder / name) for folder in (first, second))
            if one is None or other is None:
                continue
            if one.shape != other.shape:
                self.left_out[f"differences of images of other sizes in {first} and {second}"] = None
                continue
            distances[name] = float(np.square(one.astype(np.float64) - other).mean())
        return sorted(distances, key=distances.get, reverse=True)[:count]
