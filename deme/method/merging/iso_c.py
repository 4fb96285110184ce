"""Isotropic merging in the common subspace (Iso-C, Marczak et al. 2025): the sum with equal singular values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import OfTaskVectors, as_matrices, weighted_sum


@dataclass
class IsoC(OfTaskVectors):
    """pretrained + s U Vᵀ, where Σ_k w_k (finetuned_k − pretrained) = U S Vᵀ and s is the mean of the diagonal of S.

    Tensors of one dimension are summed as in task arithmetic.
    """

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        """What is added to a tensor. A singular value decomposition of the sum is in memory."""
        total = weighted_sum(vectors, coefficients)
        if total.dim() >= 2:
            [matrix] = as_matrices(total[None])
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            total = (values.mean() * left @ right).reshape(total.shape)
        return total
