"""Pictures of what analyze.py measures: each function takes results and gives a figure; nothing is measured here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from deme.config.sections import CONTINUED, DISTILLED, range_name
from deme.measure.activation_change import PARTS, change_shares, relative_change
from deme.measure.conflict import corrected_cosines, measured_cosines, pairs_within, products_of_ranges
from deme.measure.landscape import CORNERS, axis
from deme.measure.loss_by_timestep import relative_loss
from deme.measure.task_vector_statistics import cosines, norms, opposed_shares
from deme.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, save_figure
from deme.report.figures import SETTINGS as COMMON

SETTINGS = COMMON | {"axes.titlesize": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9}
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, GREY, BLACK)  # lines and markers differ, too
MARKERS = "osD^vPX*"
MODELS = {"pretrained": BLACK, CONTINUED: SKY, "ensemble": GREEN, "merged": VERMILION, DISTILLED: GREY}
UNKNOWN = "#bbbbbb"  # cells of a heat map that can't be told from noise
MOST_COLUMNS = 4  # of small pictures side by side
FARTHEST = 1.5  # from 0, that a noise-corrected cosine is shown; most are in [−1, 1]
FEWEST_PAIRS = 8  # of timesteps that a density is drawn of
MOST_CELLS = 150  # of a heat map, up to which each has its number
PAIRS = "pairs of timesteps"
Range = tuple[int, int]
Arrays = Mapping[str, np.ndarray]


def save_figures(folder: Path, figures: Mapping[str, Callable[[], Figure]]) -> list[Path]:
    """Draw figures and write them to analysis-NAME.png."""
    files = []
    with matplotlib.rc_context(SETTINGS):
        for name, draw in figures.items():
            files.append(folder / f"analysis-{name}.png")
            save_figure(draw(), files[-1])
    return files


def _noted(width: float, height: float, note: str) -> Figure:
    """A figure that says below its pictures what was measured on what."""
    figure = Figure(figsize=(width, height))
    figure.supxlabel(note, fontsize=9, color="#444444")
    return figure


def _grid(count: int, width: float, height: float, note: str, across: int = MOST_COLUMNS) -> tuple[Figure, list[Axes]]:
    """So many small pictures of a size with common axes, `across` in a row."""
    columns = min(count, across)
    rows = -(-count // columns)
    figure = _noted(width * columns, height * rows + 0.4, note)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    for lowest in axes[max(0, count - columns) : count]:  # also where an empty place is below
        lowest.xaxis.set_tick_params(labelbottom=True)
    return figure, axes[:count]


def _label_outer(pictures: Sequence[Axes], x: str, y: str, across: int = MOST_COLUMNS) -> None:
    """Labels at the outer pictures of a grid."""
    columns = min(len(pictures), across)
    for axes in pictures[max(0, len(pictures) - columns) :]:
        axes.set_xlabel(x)
    for axes in pictures[::columns]:
        axes.set_ylabel(y)


# --- gradient conflict


def _both_cosines(products: np.ndarray) -> dict[str, np.ndarray]:
    return {"as measured": measured_cosines(products), "noise-corrected": corrected_cosines(products)}


def conflict_map(found: Arrays, timesteps: Sequence[int], ranges: Sequence[Range], note: str) -> Figure:
    """Cosines of the gradients at all pairs of timesteps, as measured and noise-corrected; lines part the ranges."""
    figure = _noted(9.2, 4.6, f"{note}; grey: not told from noise")
    total = max(high for _, high in ranges)
    image = None
    pictures = figure.subplots(1, 2, sharey=True)
    for axes, (name, values) in zip(pictures, _both_cosines(found["products"].sum(axis=0)).items(), strict=True):
        axes.set_facecolor(UNKNOWN)
        image = axes.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1, origin="lower", extent=(0, total, 0, total))
        axes.grid(False)
        for low, _ in ranges[1:]:
            axes.axhline(low, color="black", linewidth=0.8, linestyle=":")
            axes.axvline(low, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=f"{name}, {len(timesteps)}² timesteps", xlabel="timestep")
    pictures[0].set_ylabel("timestep")
    figure.colorbar(image, ax=pictures, label="cosine of the loss's gradients", shrink=0.85)
    return figure


def conflict_densities(found: Arrays, timesteps: Sequence[int], ranges: Sequence[Range], note: str) -> Figure:
    """How the cosines are distributed over all pairs of different timesteps, and over those within each range."""
    figure = _noted(9.2, 4.2, note)
    at = np.array(timesteps)
    total = max(high for _, high in ranges)
    groups = {"all pairs": pairs_within(at, 0, total)} | {range_name(r): pairs_within(at, *r) for r in ranges}
    pictures = figure.subplots(1, 2, sharey=True)
    for axes, (name, values) in zip(pictures, _both_cosines(found["products"].sum(axis=0)).items(), strict=True):
        for number, (group, pairs) in enumerate(groups.items()):
            cosine = values[pairs][np.isfinite(values[pairs])]
            if len(cosine) < FEWEST_PAIRS or cosine.std() < 1e-6:
                continue
            grid = np.linspace(-FARTHEST, FARTHEST, 300)
            style = {"color": "black", "linewidth": 2.2} if number == 0 else {"color": _colour(number - 1)}
            density = gaussian_kde(cosine)(grid)
            axes.plot(grid, density, label=f"{group}, {len(cosine):,} pairs", linestyle=_dashes(number), **style)
        axes.axvline(0, color="black", linewidth=0.8)
        farthest = 1 if name == "as measured" else FARTHEST
        axes.set(title=name, xlabel="cosine of the loss's gradients", xlim=(-farthest, farthest))
        if axes.lines[:-1]:
            axes.legend(loc="upper left")
    pictures[0].set_ylabel(f"density over {PAIRS}")
    return figure


def conflict_by_block(found: Arrays, timesteps: Sequence[int], ranges: Sequence[Range], note: str) -> Figure:
    """Noise-corrected cosines of the ranges' gradients: of the whole network, and of each block of layers."""
    by_range = products_of_ranges(found["products"], np.array(timesteps), ranges)
    whole = corrected_cosines(by_range.sum(axis=0))
    by_block = np.array([corrected_cosines(products) for products in by_range])
    by_block[np.abs(by_block) > FARTHEST] = np.nan
    names = list(map(range_name, ranges))
    label = "noise-corrected cosine of the ranges' gradients"
    note = f"{note}; grey: not told from noise"
    return _cosine_maps(whole, names, by_block, found["groups"].tolist(), names, label, note)


# --- loss by timestep


def loss_by_timestep(
    losses: Mapping[str, np.ndarray], timesteps: np.ndarray, ranges: Sequence[Range], experts: Sequence[str], note: str
) -> Figure:
    """The loss relative to the pretrained network's: whole models, and each expert in and out of its range."""
    figure = _noted(9.2, 7.6, f"{note}; bands: ± 2 standard errors over blocks of images")
    upper, lower = figure.subplots(2, 1, sharex=True)
    base = losses["pretrained"]
    for number, name in enumerate(name for name in losses if name not in experts):
        found = relative_loss(losses[name], base)
        colour = MODELS.get(name, _colour(number))
        upper.plot(timesteps, found.mean, color=colour, label=name, marker=MARKERS[number], markersize=3.5)
        band = 2 * np.nan_to_num(found.error)
        upper.fill_between(timesteps, found.mean - band, found.mean + band, color=colour, alpha=0.2, linewidth=0)
    for number, (name, (low, high)) in enumerate(zip(experts, ranges, strict=True)):
        mean = relative_loss(losses[name], base).mean
        inside = (timesteps >= low) & (timesteps < high)
        colour = _colour(number)
        lower.plot(timesteps, mean, color=colour, linewidth=1, linestyle="--")
        style = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 3.5, "linewidth": 2}
        lower.plot(timesteps[inside], mean[inside], label=f"expert of {name}", **style)
    lower.axhline(1, color="black", linewidth=0.8)
    for axes, title in ((upper, "whole models"), (lower, "experts: thick in their range, dashed outside of it")):
        for low, _ in ranges[1:]:
            axes.axvline(low, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=title, ylabel="denoising loss / pretrained's")
        axes.legend(ncols=3)
    lower.set_xlabel("timestep")
    return figure


# --- task vectors


def task_vectors(found: Arrays, names: Sequence[str], experts: int, note: str) -> Figure:
    """By block: norms relative to the pretrained weights', and how often two experts' signs are opposed."""
    blocks = [*found["groups"].tolist(), "all"]
    with_all = {key: _with_total(found[key]) for key in ("products", "squares", "opposed", "moved")}
    relative = norms(with_all["products"]) / np.sqrt(with_all["squares"])[:, None]
    opposed = opposed_shares(with_all["opposed"], with_all["moved"])
    figure = _noted(9.2, 2.3 + 0.36 * len(blocks), note)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(names):
        style = {"color": _colour_of(name, number), "label": name}
        left.plot(100 * relative[:, number], range(len(blocks)), MARKERS[number % len(MARKERS)], alpha=0.85, **style)
    first, second = np.triu_indices(experts, k=1)
    shares = opposed[:, first, second]
    if shares.shape[1]:
        right.boxplot(100 * shares.T, orientation="horizontal", positions=range(len(blocks)), whis=(0, 100), widths=0.5)
    right.axvline(50, color="black", linewidth=0.8, linestyle=":")
    right.set(title="opposed signs", xlabel=f"% of parameters, {shares.shape[1]} pairs of experts; dotted: chance")
    left.set(title="norm of the task vector", xlabel="% of the pretrained weights' norm", ylabel="block of layers")
    left.set_xlim(left=0)
    left.set_yticks(range(len(blocks)), blocks)
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def task_cosines(found: Arrays, names: Sequence[str], experts: int, note: str) -> Figure:
    """Cosines of pairs of task vectors: of whole networks, and of pairs of experts in each block."""
    whole, by_block = cosines(found["products"].sum(axis=0)), cosines(found["products"])
    label = "cosine of the task vectors"
    return _cosine_maps(whole, names, by_block, found["groups"].tolist(), names[:experts], label, note)


def task_values(found: Arrays, names: Sequence[str], experts: int, note: str) -> Figure:
    """Box plots of the task vectors' values, by block and range."""
    blocks = found["groups"].tolist()
    figure = _noted(9.2, 1.9 + 0.22 * experts * len(blocks), f"{note}; boxes: quartiles; whiskers: 5 and 95 %")
    axes = figure.subplots()
    height = 0.8 / experts
    handles = []
    for number in range(experts):
        boxes = []
        for quantiles in 1e3 * found["quantiles"][:, number]:
            low, first, median, third, high = quantiles
            boxes.append({"whislo": low, "q1": first, "med": median, "q3": third, "whishi": high})
        places = np.arange(len(blocks)) + (number - (experts - 1) / 2) * height
        style = {"boxprops": {"facecolor": _colour(number)}, "medianprops": {"color": "black"}}
        drawn = axes.bxp(
            boxes, places, widths=0.8 * height, orientation="horizontal", showfliers=False, patch_artist=True, **style
        )
        handles.append(drawn["boxes"][0])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set(xlabel="finetuned − pretrained weights × 10³", ylabel="block of layers")
    figure.legend(handles, names[:experts], loc="outside upper center", ncols=4)
    return figure


# --- loss landscape


def landscape(
    found: Arrays,
    names: Sequence[str],
    ranges: Sequence[str],
    marks: Mapping[str, tuple[float, float]],
    note: str,
) -> Figure:
    """Contours of the loss, in per cent of the pretrained network's, over all timesteps and in each range.

    Args:
        names: of the two experts that span the plane.
        marks: name → the coefficients of these two of a merged network.
    """
    side = axis(len(found["losses"]))
    note = f"loss in % above the pretrained network's; other experts' coefficients are 0 on this plane\n{note}"
    figure, pictures = _grid(1 + len(ranges), 3.7, 3.5, note, across=3)
    points = dict(zip(("pretrained", *(f"expert {name}" for name in names)), CORNERS, strict=True)) | dict(marks)
    for number, (axes, title) in enumerate(zip(pictures, ["mean over the ranges", *ranges], strict=True)):
        changes = 100 * (found["losses"] / found["corners"][0] - 1)
        values = (changes.mean(axis=-1) if number == 0 else changes[..., number - 1]).T  # w₁ to the right
        steep = max(abs(np.quantile(values, 0.9)), abs(values.min()), 1e-6)
        colours = {"cmap": "PuOr_r", "norm": TwoSlopeNorm(0, vmin=-steep, vmax=steep), "extend": "both"}
        axes.contourf(side, side, values, levels=np.linspace(-steep, steep, 21), **colours)
        lines = axes.contour(side, side, values, levels=_levels(values, steep), colors="black", linewidths=0.7)
        axes.clabel(lines, fmt=lambda value: f"{value:+.2g}", fontsize=9)
        for place, (label, (first, second)) in enumerate(points.items()):
            style = {"markeredgecolor": "white", "markersize": 9, "color": COLOURS[(place + 5) % len(COLOURS)]}
            axes.plot(first, second, MARKERS[place % len(MARKERS)], label=label, clip_on=False, linestyle="", **style)
        axes.set(title=title, aspect="equal")
        axes.grid(False)
    _label_outer(pictures, f"coefficient of {names[0]}", f"coefficient of {names[1]}", across=3)
    figure.legend(*pictures[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _levels(values: np.ndarray, steep: float) -> np.ndarray:
    """Seven contours that are dense around the least value and reach the steep slopes."""
    least = values.min()
    return np.unique(np.round(least + (steep - least) * np.array([0.02, 0.08, 0.18, 0.32, 0.5, 0.75, 1]), 6))


# --- activations and projections


def activation_change(found: Arrays, ranges: Sequence[str], note: str) -> Figure:
    """By how much of itself each block's channel profile and position profile changed."""
    blocks = found["blocks"].tolist()
    figure, pictures = _grid(len(ranges), 2.9, 1.6 + 0.3 * len(blocks), note)
    labels = {"channels": "channel profile", "positions": "position profile"}
    for number, (axes, name) in enumerate(zip(pictures, ranges, strict=True)):
        for place, (part, label) in enumerate(labels.items()):
            change = 100 * relative_change(found["squares"][:, number], part)
            axes.plot(change, range(len(blocks)), MARKERS[place], color=_colour(3 * place), label=label, markersize=7)
        axes.set_title(f"expert of {name}")
    pictures[0].set_yticks(range(len(blocks)), blocks)
    pictures[0].invert_yaxis()
    pictures[0].set_xlim(left=0)
    _label_outer(pictures, "change, % of the profile", "activations behind")
    figure.legend(*pictures[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def change_parts(found: Arrays, ranges: Sequence[str], note: str) -> Figure:
    """What the change of each block's activations is made of, and what white noise would be made of."""
    blocks = found["blocks"].tolist()
    figure, pictures = _grid(len(ranges), 2.9, 1.6 + 0.3 * len(blocks), note)
    labels = {"mean": "one number", "channels": "channels", "positions": "positions", "both": "neither alone"}
    channels, positions = found["shapes"].T
    chance = 100 * (1 + channels - 1) / (channels * positions)
    for number, (axes, name) in enumerate(zip(pictures, ranges, strict=True)):
        shares = 100 * np.nan_to_num(change_shares(found["squares"][:, number]))
        start = np.zeros(len(blocks))
        for place, part in enumerate(PARTS):
            colour = ("#999999", "#0072B2", "#CC79A7", "#dddddd")[place]
            axes.barh(range(len(blocks)), shares[:, place], left=start, color=colour, label=labels[part])
            start = start + shares[:, place]
        label = "one number and channels in white noise"
        axes.plot(chance, range(len(blocks)), "|", color="black", markersize=16, markeredgewidth=2, label=label)
        axes.set_title(f"expert of {name}")
    pictures[0].set_xlim(0, 100)
    pictures[0].set_yticks(range(len(blocks)), blocks)
    pictures[0].invert_yaxis()
    _label_outer(pictures, "% of the squared change", "activations behind")
    figure.legend(*pictures[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def projections(found: Arrays, ranges: Sequence[str]) -> Figure:
    """How far each trained projection is from the identity that it began as."""
    blocks = found["blocks"].tolist()
    figure = _noted(6.5, 1.9 + 0.3 * len(blocks), "P: the 1×1 convolution behind a block, I: the identity")
    axes = figure.subplots()
    for number, name in enumerate(ranges):
        values = 100 * found["projections"][:, number]
        style = {"color": _colour(number), "label": name, "markersize": 7}
        axes.plot(values, range(len(blocks)), MARKERS[number % len(MARKERS)], **style)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set(xlabel="‖P − I‖ / ‖I‖, %", ylabel="projection behind")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


# --- what they share


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _colour_of(name: str, number: int) -> str:
    """A model's own colour, or that of its place."""
    return MODELS.get(name, _colour(number))


def _dashes(number: int) -> str:
    return ("-", "--", "-.", ":", "-")[number % 5]


def _with_total(values: np.ndarray) -> np.ndarray:
    """Groups, and their sum as one more."""
    return np.concatenate([values, values.sum(axis=0, keepdims=True)])


def _cosine_maps(
    whole: np.ndarray,
    names: Sequence[str],
    by_block: np.ndarray,
    blocks: Sequence[str],
    experts: Sequence[str],
    label: str,
    note: str,
) -> Figure:
    """Cosines of whole networks, shape (N, N), and those of pairs of experts in each block, shape (G, N, N)."""
    pairs = [(i, j) for i in range(len(experts)) for j in range(i + 1, len(experts))]
    figure = _noted(max(9.6, 5 + 0.75 * len(pairs)), max(5.2, 3.2 + 0.3 * len(blocks)), note)
    left, right = figure.subplots(1, 2)
    _heat_map(left, whole, names, names)
    left.set_title("all layers")
    values = np.array([[of_block[i, j] for i, j in pairs] for of_block in by_block]).reshape(len(blocks), len(pairs))
    image = _heat_map(right, values, blocks, [f"{experts[i]}\nand {experts[j]}" for i, j in pairs])
    right.set_title("pairs of ranges, by block of layers")
    figure.colorbar(image, ax=[left, right], label=label, shrink=0.85)
    return figure


def _heat_map(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]):
    """Values in [−1, 1] as colours, with their numbers where there are few."""
    axes.set_facecolor(UNKNOWN)
    image = axes.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    if values.size <= MOST_CELLS:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(
                column,
                row,
                f"{value:.2f}" if np.isfinite(value) else "?",
                ha="center",
                va="center",
                fontsize=9,
                color=colour,
            )
    return image
