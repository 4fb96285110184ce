"""The sum of task vectors, each pruned to its largest values, tensor by tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import check_fraction, ranks, task_vectors, weighted_sum
from deme.method.task_vectors import MergeMethod


@dataclass
class MagnitudePrune(MergeMethod):
    """pretrained + Σ_k w_k (the largest of finetuned_k − pretrained)."""

    density: float = 0.5  # of each tensor's task vector that is kept, largest magnitudes first

    def __post_init__(self):
        check_fraction("density", self.density)

    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The merged tensor, in float32."""
        vectors = task_vectors(pretrained, finetuned).flatten(1)
        count = vectors.shape[1]
        kept = ranks(vectors) >= count - math.ceil(self.density * count)
        merged = weighted_sum(vectors * kept, coefficients)
        return pretrained.float() + merged.reshape(pretrained.shape)
