"""TSV-Merge (Gargiulo et al. 2025): the leading singular vectors of all task vectors, made orthogonal to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import OfTaskVectors, as_matrices, column, weighted_sum


@dataclass
class Tsv(OfTaskVectors):
    """pretrained + U⊥ S V⊥ᵀ, of 1/N of the singular vectors of each of N task vectors; w_k multiplies those of k.

    U⊥ is the nearest matrix with orthonormal columns to all U_k side by side; V⊥ likewise. The paper has w_k = 1.
    Tensors of one dimension are summed as in task arithmetic, where the paper averages them.
    """

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        """What is added to a tensor. A singular value decomposition of each task vector is in memory."""
        if vectors.dim() < 3:
            return weighted_sum(vectors, coefficients)
        left, values, right = torch.linalg.svd(as_matrices(vectors), full_matrices=False)
        kept = max(1, values.shape[1] // len(vectors))
        left = torch.cat([*left[:, :, :kept]], dim=1)
        right = torch.cat([*right[:, :kept]])
        weighted = (values[:, :kept] * column(coefficients, values)).flatten()
        merged = orthogonal(left) * weighted @ orthogonal(right)
        return merged.reshape(vectors.shape[1:])


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns or rows: that of the polar decomposition."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
