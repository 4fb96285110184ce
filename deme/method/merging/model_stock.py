"""Model Stock (Jang et al. 2024): the sum of task vectors, shrunk the more the less they agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import OfTaskVectors, weighted_sum


@dataclass
class ModelStock(OfTaskVectors):
    """pretrained + t Σ_k w_k (finetuned_k − pretrained), t = N c / (1 + (N − 1) c), the paper's with w_k = 1/N.

    c is the mean cosine between two of the tensor's N task vectors. A negative one counts as 0: t lies in [0, 1].
    """

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        count, flat = len(vectors), vectors.flatten(1).double()
        units = flat / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        cosine = 1.0
        if count > 1:
            cosines = units @ units.T
            cosine = max(0.0, float(cosines.sum() - cosines.trace()) / (count * (count - 1)))
        share = count * cosine / (1 + (count - 1) * cosine)
        return share * weighted_sum(vectors, coefficients)
