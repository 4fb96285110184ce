"""The denoising loss on the plane through the pretrained network and two experts, the paper's figures 4 and 6a."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from deme.job.arrays import Arrays, Keep
from deme.measure.noisy import Batch
from deme.method.candidates import Candidates

AXIS = (-0.2, 1.2)  # of both coefficients
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))  # pretrained, and the two experts


def axis(points: int) -> np.ndarray:
    """The coefficients along one side of the plane: shape (points,)."""
    return np.linspace(*AXIS, points).round(9)  # so that 0 and 1, where they are met, are exact


def landscape(
    network: nn.Module,
    candidates: Candidates,
    batches: Sequence[Batch],
    num_ranges: int,
    points: int,
    accelerator: Accelerator,
    keep: Keep,
) -> Arrays:
    """Losses at pretrained + w₁ τ₁ + w₂ τ₂, on the same noisy images at every point.

    Args:
        network: in which each point's weights are formed.
        candidates: of one group and two experts.
        batches: this process's share.
        keep: called for each row of points.

    Returns:
        losses: mean over the images of each range, float64, shape (points, points, ranges): by w₁, then w₂.
        corners: of the pretrained network and the two experts, whose weights are copied, not formed, shape (3, ranges).
        errors: standard errors over the images of the experts' losses relative to the pretrained one's, (2, ranges).
    """

    counts = range_sums([torch.ones_like(batch.weights) for batch in batches], batches, num_ranges, accelerator)

    def at(*coefficients: float) -> list[torch.Tensor]:
        form(network, candidates, coefficients)
        return image_losses(network, batches)

    def mean(values: Sequence[torch.Tensor]) -> np.ndarray:
        return range_sums(values, batches, num_ranges, accelerator) / counts

    def at_corners() -> Arrays:
        pretrained, *experts = (at(*corner) for corner in CORNERS)
        differences = [[a - b for a, b in zip(expert, pretrained, strict=True)] for expert in experts]
        squares = np.stack([mean([d.square() for d in difference]) for difference in differences])
        variances = squares - np.stack([mean(difference) for difference in differences]) ** 2
        errors = np.sqrt(variances.clip(0) / np.maximum(1, counts - 1)) / mean(pretrained)
        return {"corners": np.stack([mean(values) for values in (pretrained, *experts)]), "errors": errors}

    side = axis(points)
    corners = keep("corners", at_corners)
    rows = [
        keep(f"row-{number:03d}", lambda first=first: {"losses": np.stack([mean(at(first, w)) for w in side])})
        for number, first in enumerate(side)
    ]
    return {"losses": np.stack([row["losses"] for row in rows])} | corners


def form(network: nn.Module, candidates: Candidates, coefficients: tuple[float, float]) -> None:
    """Give a network the weights of a point; at a corner they are that network's own, bit for bit."""
    corners = (candidates.pretrained, *candidates.finetuned)
    for corner, tensors in zip(CORNERS, corners, strict=True):
        if tuple(coefficients) == corner:
            network.load_state_dict(tensors)
            return
    candidates.form(network, [coefficients])


@torch.no_grad()
def image_losses(network: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The denoising loss of each noisy image, by batch."""
    return [batch.losses(network) if len(batch.ranges) > 0 else batch.weights for batch in batches]


def range_sums(
    values: Sequence[torch.Tensor], batches: Sequence[Batch], num_ranges: int, accelerator: Accelerator
) -> np.ndarray:
    """The sum of a value of each noisy image over those of each range: float64, shape (ranges,), in every process."""
    totals = torch.zeros(num_ranges, dtype=torch.float64, device=accelerator.device)
    for value, batch in zip(values, batches, strict=True):
        totals.index_add_(0, batch.ranges, value.double())
    return accelerator.reduce(totals, "sum").cpu().numpy()
