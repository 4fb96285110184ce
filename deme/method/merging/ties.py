"""TIES-Merging (Yadav et al. 2023): trimmed task vectors, combined where they have the elected sign."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from deme.method.merging._steps import Combine, OfTaskVectors, check_fraction, column, elected
from deme.method.task_vectors import Tensors


@dataclass
class Ties(OfTaskVectors):
    """Task vectors are trimmed to their largest values and scaled; where they disagree, the sign of their sum wins."""

    fraction: float = 0.2  # of each task vector that is kept, largest magnitudes first
    combine: Combine = "mean"  # of the task vectors that have the elected sign

    def __post_init__(self):
        check_fraction("fraction", self.fraction)

    def prepare(self, pretrained: Tensors, finetuned: Sequence[Tensors]) -> None:
        """Find the smallest magnitude that is kept of each task vector."""
        self.thresholds = [magnitude_threshold(pretrained, tensors, self.fraction) for tensors in finetuned]

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        vectors[vectors.abs() < column(self.thresholds, vectors)] = 0
        return elected(vectors * column(coefficients, vectors), self.combine)


def magnitude_threshold(pretrained: Tensors, finetuned: Tensors, fraction: float) -> float:
    """The smallest of the largest `fraction` of a task vector's magnitudes, exactly, one tensor in memory at a time.

    The first pass counts magnitudes by the upper 16 bits of their float32, whose order is that of the numbers; the
    second pass looks at the values of the one bin that holds the threshold.
    """

    def magnitudes() -> Iterator[torch.Tensor]:
        return ((finetuned[key].float() - base.float()).abs().flatten() for key, base in pretrained.items())

    def bins(values: torch.Tensor) -> torch.Tensor:
        return values.view(torch.int32) >> 15

    counts = sum(torch.bincount(bins(values), minlength=2**16) for values in magnitudes())
    keep = math.ceil(fraction * int(counts.sum()))
    at_least = counts.flip(0).cumsum(0).flip(0)  # how many values lie in a bin or above it
    threshold_bin = int((at_least >= keep).nonzero()[-1])
    inside = torch.cat([values[bins(values) == threshold_bin] for values in magnitudes()])
    above = int(at_least[threshold_bin]) - len(inside)
    return float(inside.sort(descending=True).values[keep - above - 1])
