"""Pictures of a whole run: its scores, its training, its samples at equal seeds."""

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from deme.data.samples import read_images
from deme.errors import UserError
from deme.measure.scores import Score
from deme.report.figures import BLACK, BLUE, GREEN, ORANGE, PINK, SETTINGS, SKY, VERMILION, bars, check_own

COLOURS = (BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, BLACK)
STYLES = ("-", "--", "-.", ":")
LEAST_SIDE = 48  # pixels of an image in a strip
OF_SEED = re.compile(r"[0-9]+\.png")
MOST_COMPARED = 2_000  # images among which those that differ most are looked for


def results(scores: Sequence[Score], distance: str) -> Figure:
    """Paired differences to the pretrained network with two standard errors; without them, the distances."""
    paired = [row for row in scores if row.difference is not None]
    rows = paired or scores
    if paired:
        values = [row.difference for row in rows]
        errors = [2 * (row.difference_standard_error or 0) for row in rows]
        label = f"{distance} − the pretrained network's (± 2 standard errors; lower is better)"
    else:
        values = [row.pooled for row in rows]
        errors = [row.standard_deviation or 0 for row in rows]
        label = f"{distance} (± standard deviation of blocks; lower is better)"
    with matplotlib.rc_context(SETTINGS):
        return bars([Path(row.samples).name for row in rows], values, errors, "merged", label)


def training_curves(curves: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> Figure:
    """The training loss of all runs on one axis: name, steps, losses."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7, 3.8))
        axes = figure.subplots()
        for number, (name, steps, losses) in enumerate(curves):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}
            axes.plot(steps, losses, label=name, **style)
        axes.set(xlabel="optimizer steps", ylabel="training loss (mean squared error)", yscale="log")
        axes.legend(title="timesteps", fontsize=9, title_fontsize=9)
        return figure


def common_images(folders: Sequence[Path]) -> list[str]:
    """The names of the images that all folders hold, in seed order; files of other names are not ours."""
    names = [{path.name for path in folder.glob("*.png") if OF_SEED.fullmatch(path.name)} for folder in folders]
    return sorted(set.intersection(*names), key=lambda name: int(Path(name).stem)) if names else []


class Strips:
    """Images of the same seeds side by side.

    Args:
        run: the run's folder; a link to an image outside of it is not shown.
    """

    def __init__(self, run: Path):
        self.run = run
        self.left_out: dict[str, None] = {}  # which images are not shown, and why

    def pixels(self, file: Path) -> np.ndarray | None:
        """uint8 RGB, shape (H, W, 3); None where it can't be shown."""
        try:
            check_own(file, self.run)
            return read_images([file])[0].permute(1, 2, 0).numpy()
        except UserError as error:
            self.left_out[str(error)] = None
            return None

    def draw(self, folders: Sequence[Path], names: Sequence[str]) -> Figure:
        """A column per model, a row per seed.

        Args:
            folders: of the models, the pretrained network's first.
            names: of the images' files.
        """
        with matplotlib.rc_context(SETTINGS):
            figure = Figure(figsize=(1.15 * len(folders) + 0.7, 1.0 * len(names) + 0.5))
            grid = figure.subplots(len(names), len(folders), squeeze=False)
            for (row, column), axes in np.ndenumerate(grid):
                pixels = self.pixels(folders[column] / names[row])
                if pixels is not None:
                    axes.imshow(pixels, interpolation="nearest" if len(pixels) < LEAST_SIDE else "antialiased")
                axes.grid(False)
                axes.set_xticks([])
                axes.set_yticks([])
                if row == 0:
                    axes.set_title(folders[column].name, fontsize=9)
                if column == 0:
                    axes.set_ylabel(f"seed {int(Path(names[row]).stem)}", fontsize=9)
            return figure

    def most_different(self, first: Path, second: Path, names: Sequence[str], count: int) -> list[str]:
        """The images whose pixels differ most between two models, by mean square; those of one size alone."""
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
