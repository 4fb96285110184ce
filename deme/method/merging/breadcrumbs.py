"""Model Breadcrumbs (Davari and Belilovsky 2024): the sum of task vectors without their smallest and largest values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.errors import UserError
from deme.method.merging._steps import OfTaskVectors, ranks, weighted_sum


@dataclass
class Breadcrumbs(OfTaskVectors):
    """pretrained + Σ_k w_k (the middle of finetuned_k − pretrained by magnitude), tensor by tensor."""

    smallest: float = 0.85  # share of each tensor's task vector that is left out as too small
    largest: float = 0.01  # and as too large

    def __post_init__(self):
        for key, value in vars(self).items():
            if not 0 <= value < 1:
                raise UserError(f"{key}={value}: must lie in [0, 1)")
        if self.smallest + self.largest >= 1:
            raise UserError(f"largest={self.largest}: leaves nothing beside smallest={self.smallest}")

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        flat = vectors.flatten(1)
        count, places = flat.shape[1], ranks(flat)
        kept = (places >= int(self.smallest * count)) & (places < count - int(self.largest * count))
        return weighted_sum(flat * kept, coefficients).reshape(vectors.shape[1:])
