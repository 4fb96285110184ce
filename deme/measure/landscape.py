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
    """

    def at(*coefficients: float) -> np.ndarray:
        form(network, candidates, coefficients)
        return range_losses(network, batches, num_ranges, accelerator)

    side = axis(points)
    corners = keep("corners", lambda: {"losses": np.stack([at(*corner) for corner in CORNERS])})["losses"]
    rows = [
        keep(f"row-{number:03d}", lambda first=first: {"losses": np.stack([at(first, second) for second in side])})
        for number, first in enumerate(side)
    ]
    return {"losses": np.stack([row["losses"] for row in rows]), "corners": corners}


def form(network: nn.Module, candidates: Candidates, coefficients: tuple[float, float]) -> None:
    """Give a network the weights of a point; at a corner they are that network's own, bit for bit."""
    corners = (candidates.pretrained, *candidates.finetuned)
    for corner, tensors in zip(CORNERS, corners, strict=True):
        if tuple(coefficients) == corner:
            network.load_state_dict(tensors)
            return
    candidates.form(network, [coefficients])


@torch.no_grad()
def range_losses(network: nn.Module, batches: Sequence[Batch], num_ranges: int, accelerator: Accelerator) -> np.ndarray:
    """The mean denoising loss over the noisy images of each range: float64, shape (ranges,), in every process."""
    totals, counts = torch.zeros(2, num_ranges, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        if len(batch.ranges) > 0:
            totals.index_add_(0, batch.ranges, batch.losses(network).double())
            counts.index_add_(0, batch.ranges, torch.ones_like(batch.ranges, dtype=torch.float64))
    totals, counts = accelerator.reduce(torch.stack([totals, counts]), "sum").cpu().numpy()
    return totals / counts
