"""Steps that merge methods share, on the task vectors of one tensor: float32, shape (K, *the tensor's)."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

from deme.errors import UserError
from deme.method.task_vectors import MergeMethod

Combine = Literal["mean", "sum"]  # of the task vectors that have the elected sign


class OfTaskVectors(MergeMethod):
    """Base of the methods that add something made of the task vectors alone."""

    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The merged tensor, in float32."""
        base = pretrained.float()
        return base + self.change(name, torch.stack([tensor.float() - base for tensor in finetuned]), coefficients)

    @abstractmethod
    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        """What is added to the tensor of this name, by its task vectors finetuned_k − pretrained; float32."""


def column(values: Sequence[float], vectors: torch.Tensor) -> torch.Tensor:
    """One value for each task vector, to multiply or compare them with."""
    return vectors.new_tensor(values).view(-1, *[1] * (vectors.dim() - 1))


def weighted_sum(vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """Σ_k w_k τ_k, of the shape of one task vector."""
    return (vectors * column(coefficients, vectors)).sum(dim=0)


def elected(vectors: torch.Tensor, combine: Combine) -> torch.Tensor:
    """The mean or the sum of those with the sign of the sum, number by number (TIES-Merging, Yadav et al. 2023)."""
    agrees = (vectors.sign() == vectors.sum(dim=0).sign()) & (vectors != 0)
    combined = (vectors * agrees).sum(dim=0)
    return combined / agrees.sum(dim=0).clamp(min=1) if combine == "mean" else combined


def ranks(vectors: torch.Tensor) -> torch.Tensor:
    """The place of each number among its last dimension's by magnitude, 0 for the smallest; equal ones in order."""
    return vectors.abs().argsort(dim=-1, stable=True).argsort(dim=-1)


def kept_at_random(probabilities: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """A mask of numbers that are kept with these probabilities, which follows from seed and tensor name alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    drawn = torch.rand(probabilities.shape, generator=generator)
    return drawn.to(probabilities.device) < probabilities


def as_matrices(vectors: torch.Tensor) -> torch.Tensor:
    """The task vectors of a weight as matrices (K, out, in · height · width)."""
    return vectors.flatten(2)


def check_fraction(key: str, value: float) -> None:
    """Check that a setting is a share above 0."""
    if not 0 < value <= 1:
        raise UserError(f"{key}={value}: must lie in (0, 1]")
