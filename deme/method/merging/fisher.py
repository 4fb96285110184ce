"""Fisher merging (Matena and Raffel 2022, eq. 4): the mean of the networks, weighted number by number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._statistics import FISHER, WithStatistics
from deme.method.merging._steps import column


@dataclass
class Fisher(WithStatistics):
    """pretrained + (Σ_k w_k) (Σ_k w_k F_k τ_k) / (Σ_k w_k F_k), the paper's with Σ_k w_k = 1.

    F_k is the mean square of the gradient of the denoising loss, of one image at a time. With equal F_k it is the sum.
    """

    kind = FISHER
    floor: float = 1e-6  # added to F_k, relative to its mean over the tensor and the networks

    def mean(self, vectors: torch.Tensor, statistics: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        """The mean, number by number."""
        least = self.floor * float(statistics.mean()) or 1.0  # no network has a gradient: equal weights
        weights = statistics + least * column(coefficients, vectors)
        return (weights * vectors).sum(dim=0) / weights.sum(dim=0)
