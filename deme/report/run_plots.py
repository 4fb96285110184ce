"""Pictures of a whole run: its scores, its training, its samples at equal seeds."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from deme.measure.scores import Score
from deme.report.figures import BLACK, BLUE, GREEN, ORANGE, PINK, SETTINGS, SKY, VERMILION, bars

COLOURS = (BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, BLACK)
STYLES = ("-", "--", "-.", ":")
LEAST_SIDE = 48  # pixels of an image in a strip
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


def sample_strip(folders: Sequence[Path], names: Sequence[str]) -> Figure:
    """Images of the same seeds side by side: a column per model, a row per seed.

    Args:
        folders: of the models, the pretrained network's first.
        names: of the images' files.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(1.15 * len(folders) + 0.7, 1.0 * len(names) + 0.5))
        grid = figure.subplots(len(names), len(folders), squeeze=False)
        for row, name in enumerate(names):
            for column, folder in enumerate(folders):
                axes = grid[row][column]
                with Image.open(folder / name) as image:
                    pixels = np.array(image.convert("RGB"))
                axes.imshow(pixels, interpolation="nearest" if len(pixels) < LEAST_SIDE else "antialiased")
                axes.grid(False)
                axes.set_xticks([])
                axes.set_yticks([])
                if row == 0:
                    axes.set_title(folder.name, fontsize=9)
                if column == 0:
                    axes.set_ylabel(f"seed {int(Path(name).stem)}", fontsize=9)
        return figure


def common_images(folders: Sequence[Path]) -> list[str]:
    """The names of the images that all folders hold, in seed order."""
    names = [{path.name for path in folder.glob("[0-9]*.png")} for folder in folders]
    return sorted(set.intersection(*names), key=lambda name: int(Path(name).stem)) if names else []


def most_different(first: Path, second: Path, names: Sequence[str], count: int) -> list[str]:
    """Of the first MOST_COMPARED images, those whose pixels differ most between two models, by mean square."""

    def distance(name: str) -> float:
        pixels = []
        for folder in (first, second):
            with Image.open(folder / name) as image:
                pixels.append(np.asarray(image.convert("RGB"), dtype=np.float64))
        return float(np.square(pixels[0] - pixels[1]).mean())

    return sorted(names[:MOST_COMPARED], key=distance, reverse=True)[:count]
