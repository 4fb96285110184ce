"""DARE (Yu et al. 2024) before the sign election of TIES-Merging (Yadav et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import Combine, column, elected
from deme.method.merging.dare_linear import DareLinear


@dataclass
class DareTies(DareLinear):
    """Task vectors are dropped at random, rescaled and weighted; where they disagree, the sign of their sum wins."""

    combine: Combine = "mean"

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        return elected(self.dropped(name, vectors) * column(coefficients, vectors), self.combine)
