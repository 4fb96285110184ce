"""TSV-Merge (Gargiulo et al. 2025): the leading singular vectors of all task vectors, made orthogonal to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import as_matrices, column, task_vectors, weighted_sum
from deme.method.task_vectors import MergeMethod


@dataclass
class Tsv(MergeMethod):
    """pretrained + U⊥ S V⊥ᵀ, of 1/N of the singular vectors of each of N task vectors; w_k multiplies those of k.

    U⊥ is the nearest matrix with orthonormal columns to all U_k side by side; V⊥ likewise. The paper has w_k = 1.
    Tensors of one dimension are summed as in task arithmetic, where the paper averages them.
    """

    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The merged tensor, in float32. A singular value decomposition of each task vector is in memory."""
        vectors = task_vectors(pretrained, finetuned)
        if pretrained.dim() < 2:
            return pretrained.float() + weighted_sum(vectors, coefficients)
        left, values, right = torch.linalg.svd(as_matrices(vectors), full_matrices=False)
        kept = max(1, values.shape[1] // len(vectors))
        left = torch.cat([*left[:, :, :kept]], dim=1)
        right = torch.cat([*right[:, :kept]])
        weighted = (values[:, :kept] * column(coefficients, values)).flatten()
        merged = orthogonal(left) * weighted @ orthogonal(right)
        return pretrained.float() + merged.reshape(pretrained.shape)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns or rows: that of the polar decomposition."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
