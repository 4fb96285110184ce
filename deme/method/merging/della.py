"""DELLA (Deep et al. 2024): dropping by magnitude (MagPrune) before the sign election of TIES-Merging."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.errors import UserError
from deme.method.merging._steps import Combine, OfTaskVectors, check_fraction, column, elected, kept_at_random, ranks


@dataclass
class Della(OfTaskVectors):
    """As DARE with TIES, but within each row a larger number is dropped with a smaller chance.

    The chances rise evenly from density − ε/2 for a row's smallest number to density + ε/2 for its largest. A number
    that is kept is divided by its own chance.
    """

    density: float = 0.5  # mean chance to be kept; the paper's 1 − p
    epsilon: float = 0.2  # ε: chance of a row's largest number, less that of its smallest
    seed: int = 0  # of the masks
    combine: Combine = "mean"

    def __post_init__(self):
        check_fraction("density", self.density)
        half = self.epsilon / 2
        if half < 0 or self.density - half <= 0 or self.density + half > 1:
            raise UserError(f"epsilon={self.epsilon}: density={self.density} ± epsilon / 2 must lie in (0, 1]")

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        """What is added to a tensor; a vector is one row, a convolution's weight has a row per output channel."""
        rows = vectors.flatten(2) if vectors.dim() > 2 else vectors.reshape(len(vectors), 1, -1)
        places = ranks(rows) / max(1, rows.shape[2] - 1)  # 0 to 1
        chances = self.density + self.epsilon * (places - 0.5)
        rows = rows * kept_at_random(chances, self.seed, name) / chances
        vectors = rows.reshape(vectors.shape)
        return elected(vectors * column(coefficients, vectors), self.combine)
