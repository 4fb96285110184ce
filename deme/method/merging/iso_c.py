"""Isotropic merging in the common subspace (Iso-C, Marczak et al. 2025): the sum with equal singular values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import as_matrices, task_vectors, weighted_sum
from deme.method.task_vectors import MergeMethod


@dataclass
class IsoC(MergeMethod):
    """pretrained + s U Vᵀ, where Σ_k w_k (finetuned_k − pretrained) = U S Vᵀ and s is the mean of the diagonal of S.

    Tensors of one dimension are summed as in task arithmetic.
    """

    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The merged tensor, in float32. A singular value decomposition of the sum is in memory."""
        vectors = task_vectors(pretrained, finetuned)
        total = weighted_sum(vectors, coefficients)
        if pretrained.dim() >= 2:
            [matrix] = as_matrices(total[None])
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            total = (values.mean() * left @ right).reshape(total.shape)
        return pretrained.float() + total
