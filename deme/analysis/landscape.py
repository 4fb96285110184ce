"""Loss landscape: the denoising loss on the plane through the pretrained network and two experts (figures 4, 6a)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import nn

from deme.analysis.material import Material
from deme.job.processes import Processes
from deme.job.records import Arrays, Keep
from deme.measure.noisy import Batch
from deme.method.candidates import Candidates
from deme.method.coefficients import PUBLISHED
from deme.models.searched import read_searched
from deme.report.figures import COLOURS, MARKERS, grid, legend_above
from deme.report.tables import headed_table, number

AXIS = (-0.2, 1.2)  # of both coefficients
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))  # pretrained, and the two experts


def measure(material: Material) -> Arrays:
    """Losses on the plane; nothing if there is a single expert."""
    if len(material.ranges) < 2:
        return {}
    experts = _experts(material)

    def make(keep: Keep) -> Arrays:
        base = material.tensors("pretrained")
        finetuned = {name: material.tensors(name) for name in experts}
        candidates = Candidates(base, finetuned, dict.fromkeys(base, 0), material.processes.device)
        batches = material.spread(material.settings.landscape_images, 3)
        shape = (len(material.ranges), material.settings.landscape_points)
        return plane_losses(material.network, candidates, batches, *shape, material.processes, keep)

    keys = ("landscape_points", "landscape_images", "landscape_ranges")
    return material.keep("landscape", ["pretrained", *experts], keys, make)


def axis(points: int) -> np.ndarray:
    """The coefficients along one side of the plane: shape (points,)."""
    return np.linspace(*AXIS, points).round(9)  # so that 0 and 1 are exact where they are on the grid


def plane_losses(
    network: nn.Module,
    candidates: Candidates,
    batches: Sequence[Batch],
    num_ranges: int,
    points: int,
    processes: Processes,
    keep: Keep,
) -> Arrays:
    """Losses at pretrained + w₁ τ₁ + w₂ τ₂, on the same noisy images at every point, kept row by row.

    Args:
        network: gets each point's weights.
        candidates: of one group and two experts.

    Returns:
        losses: mean over the images of each range, float64, shape (points, points, ranges): by w₁, then w₂.
        corners: those of the pretrained network and the two experts, not formed but loaded, shape (3, ranges).
        errors: standard errors over the images of the experts' losses relative to the pretrained one's, (2, ranges).
    """

    def mean(values: Sequence[torch.Tensor]) -> np.ndarray:
        return range_sums(values, batches, num_ranges, processes) / counts

    def at(*coefficients: float) -> list[torch.Tensor]:
        if coefficients in CORNERS:  # that network's own weights, bit for bit
            network.load_state_dict([candidates.pretrained, *candidates.finetuned][CORNERS.index(coefficients)])
        else:
            candidates.form(network, [coefficients])
        return image_losses(network, batches)

    def at_corners() -> Arrays:
        pretrained, *experts = (at(*corner) for corner in CORNERS)
        differences = [[a - b for a, b in zip(expert, pretrained, strict=True)] for expert in experts]
        squares = np.stack([mean([d.square() for d in difference]) for difference in differences])
        variances = squares - np.stack([mean(difference) for difference in differences]) ** 2
        errors = np.sqrt(variances.clip(0) / np.maximum(1, counts - 1)) / mean(pretrained)
        return {"corners": np.stack([mean(values) for values in (pretrained, *experts)]), "errors": errors}

    def along_row(first: float) -> Arrays:
        return {"losses": np.stack([mean(at(first, second)) for second in side])}

    counts = range_sums([torch.ones_like(batch.weights) for batch in batches], batches, num_ranges, processes)
    side = axis(points).tolist()
    corners = keep("corners", at_corners)
    rows = [keep(f"row-{row:03d}", partial(along_row, first))["losses"] for row, first in enumerate(side)]
    return {"losses": np.stack(rows)} | corners


@torch.no_grad()
def image_losses(network: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The denoising loss of each noisy image, by batch."""
    return [batch.losses(network) if len(batch.ranges) > 0 else batch.weights for batch in batches]


def range_sums(
    values: Sequence[torch.Tensor], batches: Sequence[Batch], num_ranges: int, processes: Processes
) -> np.ndarray:
    """Sums over the images of each range, of a value per image: float64, shape (ranges,), the same in every process."""
    totals = torch.zeros(num_ranges, dtype=torch.float64, device=processes.device)
    for value, batch in zip(values, batches, strict=True):
        totals.index_add_(0, batch.ranges, value.double())
    return processes.reduce(totals, "sum").cpu().numpy()


def _experts(material: Material) -> list[str]:
    """The two experts that span the plane: the chosen ones, or those of the lowest and the highest range."""
    return [material.range_names[k] for k in material.settings.landscape_ranges or (0, -1)]


def marks(material: Material) -> dict[str, tuple[float, float]]:
    """Both coefficients of the merges to mark; searched ones only if all tensors share them."""
    config, count = material.config, len(material.ranges)
    by_name = {f"uniform 1/{count}": [1 / count] * count}
    total = config.timesteps.num_train_timesteps
    if [4 * low for low, _ in material.ranges] == [0, total, 2 * total, 3 * total]:
        by_name["published (LSUN-Church)"] = list(PUBLISHED)
    if config.paths.best_coefficients.is_file():
        searched = read_searched(config.paths.best_coefficients)
        pretrained, *experts = (material.hashes[name] for name in ("pretrained", *material.range_names))
        groups = searched.groups(config) if searched.is_of(pretrained, experts) else {}
        if list(groups) == ["*"]:
            by_name["searched"] = groups["*"]
    first, second = map(material.range_names.index, _experts(material))
    return {name: (values[first], values[second]) for name, values in by_name.items()}


def table(arrays: Arrays, material: Material) -> str:
    """Where on the plane the loss is least, overall and in each range."""
    if not arrays:
        return "### Loss landscape\n\nLeft out: a plane needs two experts, timesteps.num_ranges=1 has one."
    names = _experts(material)
    side = axis(len(arrays["losses"]))
    pretrained, *experts = arrays["corners"]
    plane, experts = (_with_mean(100 * (losses / pretrained - 1)) for losses in (arrays["losses"], np.stack(experts)))
    errors = 100 * arrays["errors"]
    errors = np.concatenate([np.sqrt((errors**2).sum(-1, keepdims=True)) / len(material.ranges), errors], axis=-1)
    rows = []
    for k, name in enumerate(["mean over the ranges", *material.range_names]):
        first, second = np.unravel_index(np.nanargmin(plane[..., k]), plane.shape[:2])
        row = [name, f"{side[first]:.2f}, {side[second]:.2f}", f"{plane[..., k].min():+.2f}"]
        rows.append([*row, *(number(*pair, "+.2f") for pair in zip(experts[:, k], errors[:, k], strict=True))])
    titles = ["loss at timesteps", f"least at the coefficients of {', '.join(names)}", "there, % above pretrained"]
    titles += [f"expert {name}, % above pretrained ± s.e." for name in names]
    return headed_table("Loss landscape", _note(material), titles, rows)


def plot(arrays: Arrays, material: Material) -> dict[str, Figure]:
    """Contours of the loss, in per cent of the pretrained network's, over all timesteps and in each range."""
    if not arrays:
        return {}
    first, second = _experts(material)
    side = axis(len(arrays["losses"]))
    changes = _with_mean(100 * (arrays["losses"] / arrays["corners"][0] - 1))
    note = "loss in % above the pretrained network's; other experts' coefficients are 0 on this plane\n"
    labels = (f"coefficient of {first}", f"coefficient of {second}")
    figure, pictures = grid(1 + len(material.ranges), (3.7, 3.5), note + _note(material), *labels, across=3)
    points = dict(zip(("pretrained", f"expert {first}", f"expert {second}"), CORNERS, strict=True)) | marks(material)
    for k, (axes, title) in enumerate(zip(pictures, ["mean over the ranges", *material.range_names], strict=True)):
        values = changes[..., k].T  # w₁ to the right
        steep = max(abs(np.quantile(values, 0.9)), abs(values.min()), 1e-6)
        colours = {"cmap": "PuOr_r", "norm": TwoSlopeNorm(0, vmin=-steep, vmax=steep), "extend": "both"}
        axes.contourf(side, side, values, levels=np.linspace(-steep, steep, 21), **colours)
        # dense around the least value, up to the steep slopes
        levels = values.min() + (steep - values.min()) * np.array([0.02, 0.08, 0.18, 0.32, 0.5, 0.75, 1])
        lines = axes.contour(side, side, values, levels=np.unique(levels.round(6)), colors="black", linewidths=0.7)
        axes.clabel(lines, fmt=lambda value: f"{value:+.2g}", fontsize=9)
        for place, (label, point) in enumerate(points.items()):
            style = {"markeredgecolor": "white", "markersize": 9, "color": COLOURS[(place + 5) % len(COLOURS)]}
            axes.plot(*point, MARKERS[place % len(MARKERS)], label=label, clip_on=False, linestyle="", **style)
        axes.set(title=title, aspect="equal")
        axes.grid(False)
    legend_above(figure, pictures[0], 3)
    return {"landscape": figure}


def _with_mean(by_range: np.ndarray) -> np.ndarray:
    """Values of each range, shape (…, ranges), after their mean: shape (…, 1 + ranges)."""
    return np.concatenate([by_range.mean(axis=-1, keepdims=True), by_range], axis=-1)


def _note(material: Material) -> str:
    settings = material.settings
    images = f"{settings.landscape_images} {material.measured_on} images, spread evenly over the timesteps"
    return f"{settings.landscape_points}² points, each on the same {images}"
