"""Fisher merging (Matena and Raffel 2022, eq. 4): the mean of the networks, weighted number by number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._statistics import FISHER, WithStatistics
from deme.method.merging._steps import task_vectors, weighted_sum
from deme.method.task_vectors import MergeMethod


@dataclass
class Fisher(WithStatistics, MergeMethod):
    """pretrained + (Σ_k w_k) (Σ_k w_k F_k τ_k) / (Σ_k w_k F_k), the paper's with Σ_k w_k = 1.

    F_k is the mean square of the gradient of the denoising loss, of one image at a time. With equal F_k it is the sum.
    """

    floor: float = 1e-6  # added to F_k, relative to its mean over the tensor and the networks

    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The merged tensor, in float32."""
        vectors, base = task_vectors(pretrained, finetuned), pretrained.float()
        weighted = self.statistics(FISHER, name, coefficients)
        if weighted is None or sum(coefficients) == 0:
            return base + weighted_sum(vectors, coefficients)
        squares = torch.stack(weighted).to(vectors.device)
        least = self.floor * float(squares.mean()) or 1.0  # no network has a gradient: equal weights
        squares += least * squares.new_tensor(coefficients).view(-1, *[1] * base.dim())
        return base + sum(coefficients) * (squares * vectors).sum(dim=0) / squares.sum(dim=0)
