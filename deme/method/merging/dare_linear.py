"""DARE (Yu et al. 2024): the sum of task vectors of which a random part is dropped and the rest rescaled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import OfTaskVectors, check_fraction, kept_at_random, weighted_sum


@dataclass
class DareLinear(OfTaskVectors):
    """pretrained + Σ_k w_k m_k (finetuned_k − pretrained) / density, m_k random masks."""

    density: float = 0.5  # chance of each number of a task vector to be kept; the paper's 1 − p
    seed: int = 0  # of the masks

    def __post_init__(self):
        check_fraction("density", self.density)

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        return weighted_sum(self.dropped(name, vectors), coefficients)

    def dropped(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """What is left of the task vectors of a tensor, rescaled."""
        kept = kept_at_random(torch.full_like(vectors, self.density), self.seed, name)
        return vectors * kept / self.density
