"""Loss landscape: the denoising loss on the plane through the pretrained network and two experts (figures 4, 6a)."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from deme.analysis import Material
from deme.config.networks import RANGES
from deme.job.records import Arrays, Keep
from deme.method.task_vectors import PUBLISHED, Candidates
from deme.models.searched import read_searched
from deme.report.figures import COLOURS, MARKERS, grid
from deme.report.tables import headed_table, number

AXIS = (-0.2, 1.2)  # of both coefficients
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))  # pretrained, and the two experts


def measure(material: Material) -> Arrays:
    """Losses at pretrained + w₁ τ₁ + w₂ τ₂, on the same noisy images at every point; nothing for a single expert.

    Returns:
        losses: mean over the images of each range, float64, shape (points, points, ranges): by w₁, then w₂.
        corners: those of the pretrained network and the two experts, not formed but loaded, shape (3, ranges).
        errors: standard errors over the images of the experts' losses relative to the pretrained one's, (2, ranges).
    """
    if len(material.experts) < 2:
        return {}
    return material.keep("landscape", ["pretrained", *_experts(material)], partial(plane_losses, material))


def _experts(material: Material) -> list[str]:
    """The two experts that span the plane: the chosen ones, or the first and the last."""
    return [material.experts[k] for k in material.settings.landscape_ranges or (0, -1)]


def axis(points: int) -> np.ndarray:
    """The coefficients along one side of the plane: shape (points,)."""
    return np.linspace(*AXIS, points).round(9)  # so that 0 and 1 are exact where they are on the grid


@torch.no_grad()
def plane_losses(material: Material, keep: Keep) -> Arrays:
    """What `measure` returns; the corners and each row of points are kept."""
    network, processes = material.network, material.processes
    base = material.tensors("pretrained")
    finetuned = {name: material.tensors(name) for name in _experts(material)}
    candidates = Candidates(base, finetuned, dict.fromkeys(base, 0), processes.device)
    corners = dict(zip(CORNERS, [candidates.pretrained, *candidates.finetuned], strict=True))
    batches = material.spread(material.settings.landscape_images, 3)

    def total(values: torch.Tensor) -> np.ndarray:
        sums = torch.zeros(len(material.ranges), dtype=torch.float64, device=processes.device)
        return processes.reduce(sums.index_add_(0, ranges, values.double()), "sum").cpu().numpy()

    def at(*coefficients: float) -> torch.Tensor:
        if coefficients in corners:  # that network's own weights, bit for bit
            network.load_state_dict(corners[coefficients])
        else:
            candidates.form(network, [coefficients])
        return torch.cat([batch.losses(network) if len(batch.ranges) > 0 else batch.weights for batch in batches])

    def at_corners() -> Arrays:
        pretrained, *experts = values = [at(*corner) for corner in CORNERS]
        squares = np.stack([total((expert - pretrained).square()) for expert in experts]) / counts
        variances = squares - (np.stack([total(expert - pretrained) for expert in experts]) / counts) ** 2
        errors = np.sqrt(variances.clip(0) / np.maximum(1, counts - 1)) / (total(pretrained) / counts)
        return {"corners": np.stack(list(map(total, values))) / counts, "errors": errors}

    def row(first: float) -> Arrays:
        return {"losses": np.stack([total(at(first, second)) for second in side]) / counts}

    ranges = torch.cat([batch.ranges for batch in batches])
    counts, side = total(torch.ones_like(ranges)), axis(material.settings.landscape_points).tolist()
    at_networks = keep("corners", at_corners)
    rows = [keep(f"row-{k:03d}", partial(row, first))["losses"] for k, first in enumerate(side)]
    return {"losses": np.stack(rows)} | at_networks


def report(arrays: Arrays, material: Material) -> tuple[str, dict[str, Figure]]:
    """Contours of the loss, over all timesteps and in each range, and where it is least."""
    if not arrays:
        return "### Loss landscape\n\nLeft out: a plane needs two experts, this run has one.", {}

    def excess(losses: np.ndarray) -> np.ndarray:
        """In % above the pretrained network's: the mean over the ranges, then each range."""
        by_range = 100 * (losses / arrays["corners"][0] - 1)
        return np.concatenate([by_range.mean(axis=-1, keepdims=True), by_range], axis=-1)

    settings, names = material.settings, ["mean over the ranges", *material.range_names]
    images = f"{settings.landscape_images} {material.measured_on} images, spread evenly over the timesteps"
    note = f"{settings.landscape_points}² points, each on the same {images}"
    first, second = _experts(material)
    side, plane, experts = axis(len(arrays["losses"])), excess(arrays["losses"]), excess(arrays["corners"][1:])
    errors = 100 * arrays["errors"]
    errors = np.concatenate([np.sqrt((errors**2).sum(-1, keepdims=True)) / len(material.ranges), errors], axis=-1)
    rows = []
    for k, name in enumerate(names):
        x, y = np.unravel_index(np.nanargmin(plane[..., k]), plane.shape[:2])
        row = [name, f"{side[x]:.2f}, {side[y]:.2f}", f"{plane[..., k].min():+.2f}"]
        rows.append([*row, *(number(*pair, "+.2f") for pair in zip(experts[:, k], errors[:, k], strict=True))])
    titles = ["loss at timesteps", f"least at the coefficients of {first}, {second}", "there, % above pretrained"]
    titles += [f"expert {name}, % above pretrained ± s.e." for name in (first, second)]
    table = headed_table("Loss landscape", note, titles, rows)

    note = f"loss in % above the pretrained network's; other experts' coefficients are 0 on this plane\n{note}"
    labels = (f"coefficient of {name}" for name in (first, second))
    figure, pictures = grid(len(names), (3.7, 3.5), note, *labels, across=3)
    points = dict(zip(("pretrained", f"expert {first}", f"expert {second}"), CORNERS, strict=True)) | marks(material)
    for k, (axes, title) in enumerate(zip(pictures, names, strict=True)):
        _draw_contours(axes, side, plane[..., k].T, points)  # w₁ to the right
        axes.set(title=title, aspect="equal")
        axes.grid(False)
    figure.legend(*pictures[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return table, {"landscape": figure}


def marks(material: Material) -> dict[str, tuple[float, float]]:
    """Both coefficients of the merges to mark; searched ones only if all tensors share them."""
    config, experts, count = material.config, material.experts, len(material.experts)
    are_of_ranges = experts == material.range_names
    by_name = {f"uniform 1/{count}": [1 / count] * count}
    total = config.timesteps.num_train_timesteps
    if are_of_ranges and [4 * low for low, _ in material.ranges] == [0, total, 2 * total, 3 * total]:
        by_name["published (LSUN-Church)"] = list(PUBLISHED)
    if config.paths.best_coefficients.is_file():
        searched = read_searched(config.paths.best_coefficients, None)
        hashes = [material.hashes[name] for name in ("pretrained", *experts)]
        is_of_these = [searched.pretrained, *(searched.finetuned or [])] == hashes and searched.merged_by is None
        merged = [RANGES] if are_of_ranges else config.merge.experts
        merging = replace(config, merge=replace(config.merge, experts=merged, coefficients=None))
        groups = searched.groups(merging) if is_of_these else {}
        if list(groups) == ["*"]:
            by_name["searched"] = groups["*"]
    first, second = map(experts.index, _experts(material))
    return {name: (values[first], values[second]) for name, values in by_name.items()}


def _draw_contours(axes: Axes, side: np.ndarray, values: np.ndarray, points: dict[str, tuple[float, float]]) -> None:
    """Values on the plane as colours and contours, and points by name."""
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
