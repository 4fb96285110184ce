"""Model Breadcrumbs (Davari and Belilovsky 2024): the sum of task vectors without their smallest and largest values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.errors import UserError
from deme.method.merging._steps import ranks, task_vectors, weighted_sum
from deme.method.task_vectors import MergeMethod


@dataclass
class Breadcrumbs(MergeMethod):
    """pretrained + Σ_k w_k (the middle of finetuned_k − pretrained by magnitude), tensor by tensor."""

    smallest: float = 0.85  # share of each tensor's task vector that is left out as too small
    largest: float = 0.01  # and as too large

    def __post_init__(self):
        for key, value in vars(self).items():
            if not 0 <= value < 1:
                raise UserError(f"{key}={value}: must lie in [0, 1)")
        if self.smallest + self.largest >= 1:
            raise UserError(f"largest={self.largest}: leaves nothing beside smallest={self.smallest}")

    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The merged tensor, in float32."""
        vectors = task_vectors(pretrained, finetuned).flatten(1)
        count, places = vectors.shape[1], ranks(vectors)
        kept = (places >= int(self.smallest * count)) & (places < count - int(self.largest * count))
        merged = weighted_sum(vectors * kept, coefficients)
        return pretrained.float() + merged.reshape(pretrained.shape)
