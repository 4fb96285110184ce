"""RegMean (Jin et al. 2023, eq. 2): layers that predict what those of the networks predict."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._statistics import PRODUCTS, WithStatistics
from deme.method.merging._steps import as_matrices, check_fraction


@dataclass
class Regmean(WithStatistics):
    """pretrained + (Σ_k w_k) (Σ_k w_k τ_k G_k) (Σ_k w_k G_k)⁻¹, the paper's with Σ_k w_k = 1, for layers' matrices.

    G_k is the mean product of two inputs of the layer. Convolutions are linear in their patches. Other tensors, and
    layers with very many inputs, are summed.
    """

    kind = PRODUCTS
    shrink: float = 0.9  # α: factor of the products of different inputs

    def __post_init__(self):
        check_fraction("shrink", self.shrink)

    def mean(self, vectors: torch.Tensor, statistics: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        """The least squares, computed in float64."""
        products = statistics.double()
        diagonal = products.diagonal(dim1=1, dim2=2)
        products = self.shrink * products + torch.diag_embed((1 - self.shrink) * diagonal)
        whole, pulled = products.sum(dim=0), (as_matrices(vectors).double() @ products).sum(dim=0)
        merged = pulled @ torch.linalg.pinv(whole, hermitian=True)  # an input may always be 0
        return merged.reshape(vectors.shape[1:]).float()
