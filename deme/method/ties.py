"""TIES-Merging (Yadav et al. 2023): task vectors trimmed, signs elected, and what agrees combined."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Ties:
    """A merge method: task vectors are trimmed to their largest values and scaled; where those that are left disagree,
    the sign of their sum wins, and the ones of that sign are combined."""

    fraction: float  # of each task vector, largest magnitudes first, that is kept
    combine: str  # mean, over the task vectors that have the elected sign, or sum
    thresholds: list[float] = field(default_factory=list, init=False)  # one per finetuned model, once prepared

    def prepare(self, pretrained: Mapping[str, torch.Tensor], finetuned: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Find the smallest magnitude that is kept of each model's whole task vector."""
        self.thresholds = [
            magnitude_threshold(
                lambda tensors=tensors: (tensors[key].float() - base.float() for key, base in pretrained.items()),
                self.fraction,
            )
            for tensors in finetuned
        ]

    def merge_tensor(
        self, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """Merge one tensor in float32; the result has the pretrained tensor's type and shape."""
        base = pretrained.float()
        vectors = torch.stack([tensor.float() - base for tensor in finetuned])
        columns = (-1, *[1] * base.dim())
        vectors[vectors.abs() < torch.tensor(self.thresholds).view(columns)] = 0
        vectors *= torch.tensor(coefficients).view(columns)
        agrees = (vectors.sign() == vectors.sum(dim=0).sign()) & (vectors != 0)
        combined = (vectors * agrees).sum(dim=0)
        if self.combine == "mean":
            combined /= agrees.sum(dim=0).clamp(min=1)
        return (base + combined).to(pretrained.dtype)

    def describe(self) -> dict[str, str | float]:
        """The settings, for the record of a merge."""
        return {"method": "ties", "ties_fraction": self.fraction, "ties_combine": self.combine}


def magnitude_threshold(vectors: Callable[[], Iterable[torch.Tensor]], fraction: float) -> float:
    """The smallest magnitude among the largest `fraction` of all values, exactly, holding one tensor at a time.

    Two passes: the first counts magnitudes by the upper 16 bits of their float32, whose order is that of the numbers;
    the second looks at the values of the one bin that the threshold falls into.

    Args:
        vectors: starts a pass over the tensors, float32.
    """

    def bins(vector: torch.Tensor) -> torch.Tensor:
        return vector.abs().flatten().view(torch.int32) >> 15

    counts = sum(torch.bincount(bins(vector), minlength=2**16) for vector in vectors())
    keep = math.ceil(fraction * int(counts.sum()))
    at_least = counts.flip(0).cumsum(0).flip(0)  # how many values lie in a bin or above it
    threshold_bin = int((at_least >= keep).nonzero()[-1])
    inside = torch.cat([vector.abs().flatten()[bins(vector) == threshold_bin] for vector in vectors()])
    above = int(at_least[threshold_bin]) - len(inside)
    return float(inside.sort(descending=True).values[keep - above - 1])
