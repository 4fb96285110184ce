"""The sum of task vectors, each pruned to its largest values, tensor by tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import OfTaskVectors, check_fraction, ranks, weighted_sum


@dataclass
class MagnitudePrune(OfTaskVectors):
    """pretrained + Σ_k w_k (the largest of finetuned_k − pretrained)."""

    density: float = 0.5  # of each tensor's task vector that is kept, largest magnitudes first

    def __post_init__(self):
        check_fraction("density", self.density)

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        flat = vectors.flatten(1)
        count = flat.shape[1]
        kept = ranks(flat) >= count - math.ceil(self.density * count)
        return weighted_sum(flat * kept, coefficients).reshape(vectors.shape[1:])
