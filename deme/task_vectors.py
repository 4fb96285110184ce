"""The paper's model merging: task vectors (finetuned − pretrained) and their sum, as pure functions on state dicts."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from deme.config import UserError
from deme.pipelines import PROJECTION_SUFFIX

Tensors = Mapping[str, torch.Tensor]
PART = 2**18  # elements merged at a time: what lies between stays in the processor's cache


@dataclass(frozen=True)
class Ties:
    """Settings of TIES-Merging."""

    fraction: float  # of each task vector, largest magnitudes first, that is kept
    combine: str  # mean or sum


def with_identity_projections(pretrained: Tensors, finetuned: Tensors) -> dict[str, torch.Tensor]:
    """`pretrained` with an identity (C, C, 1, 1) for each projection that only `finetuned` has."""
    missing = [name for name in finetuned if name.endswith(PROJECTION_SUFFIX) and name not in pretrained]
    return {**pretrained, **{name: torch.eye(len(finetuned[name]))[:, :, None, None] for name in missing}}


def check_compatible(pretrained: Tensors, finetuned: Tensors, name: str) -> None:
    """
    Args:
        name: of the finetuned model, for the error.

    Raises:
        UserError: a tensor that only one of the two has, or of different shapes.
    """
    for key in sorted({*pretrained, *finetuned}):
        if key not in finetuned:
            raise UserError(f"{name}: the pretrained model's tensor {key} is missing")
        if key not in pretrained:
            raise UserError(f"{name}: tensor {key} is not in the pretrained model")
        if finetuned[key].shape != pretrained[key].shape:
            shapes = f"{tuple(finetuned[key].shape)}, in the pretrained model {tuple(pretrained[key].shape)}"
            raise UserError(f"{name}: tensor {key} has the shape {shapes}")


def merge_tensor(
    pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
) -> torch.Tensor:
    """pretrained + Σ_k w_k (finetuned_k − pretrained), summed in float32, in the pretrained tensor's type and shape."""
    merged = torch.empty_like(pretrained, memory_format=torch.contiguous_format)
    parts = [tensor.reshape(-1).split(PART) for tensor in (merged, pretrained, *finetuned)]
    for target, base, *experts in zip(*parts, strict=True):
        total, base = base.float().clone(), base.float()
        for expert, coefficient in zip(experts, coefficients, strict=True):
            total.add_(expert.float() - base, alpha=float(coefficient))
        target.copy_(total)
    return merged


def ties_merge_tensor(
    pretrained: torch.Tensor,
    finetuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    thresholds: Sequence[float],
    combine: str,
) -> torch.Tensor:
    """TIES-Merging (Yadav et al. 2023) of one tensor, in float32, in the pretrained tensor's type and shape.

    Task vectors are trimmed to magnitudes of at least their threshold and scaled; where those that are left disagree,
    the sign of their sum wins, and the ones of that sign are combined.

    Args:
        thresholds: one per finetuned model, of its whole task vector (`magnitude_threshold`).
        combine: mean, over the task vectors that have the elected sign, or sum.
    """
    base = pretrained.float()
    vectors = torch.stack([tensor.float() - base for tensor in finetuned])
    columns = (-1, *[1] * base.dim())
    vectors[vectors.abs() < torch.tensor(thresholds).view(columns)] = 0
    vectors *= torch.tensor(coefficients).view(columns)
    agrees = (vectors.sign() == vectors.sum(dim=0).sign()) & (vectors != 0)
    combined = (vectors * agrees).sum(dim=0)
    if combine == "mean":
        combined /= agrees.sum(dim=0).clamp(min=1)
    return (base + combined).to(pretrained.dtype)


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


def group_coefficients(groups: Mapping[str, Sequence[float]], name: str) -> Sequence[float]:
    """The coefficients of the first name pattern that fits a tensor's name.

    Raises:
        UserError: none fits.
    """
    for pattern, coefficients in groups.items():
        if fnmatchcase(name, pattern):
            return coefficients
    raise UserError(f"merge.coefficients={dict(groups)}: no pattern fits the tensor {name}; add one for '*'")


def merge_tensors(
    pretrained: Tensors,
    finetuned: Mapping[str, Tensors],
    groups: Mapping[str, Sequence[float]],
    ties: Ties | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge whole models, tensor by tensor.

    Args:
        finetuned: model name → state dict, in the order of the coefficients.
        groups: name pattern → coefficients.
        ties: merge by TIES; None: task arithmetic, the sum of the scaled task vectors.

    Yields:
        (tensor name, merged tensor).

    Raises:
        UserError: models of different tensors or shapes, or a NaN or infinite value; names the model and the tensor.
    """
    for name, tensors in finetuned.items():
        check_compatible(pretrained, tensors, name)
    if ties is not None:
        thresholds = [
            magnitude_threshold(
                lambda tensors=tensors: (tensors[key].float() - base.float() for key, base in pretrained.items()),
                ties.fraction,
            )
            for tensors in finetuned.values()
        ]
    for key, base in pretrained.items():
        coefficients, experts = group_coefficients(groups, key), [tensors[key] for tensors in finetuned.values()]
        if ties is None:
            merged = merge_tensor(base, experts, coefficients)
        else:
            merged = ties_merge_tensor(base, experts, coefficients, thresholds, ties.combine)
        # one pass over the result shows what is wrong with an input, but for TIES, which drops a NaN
        if ties is not None or not torch.isfinite(merged.sum()):
            for name, tensors in {"the pretrained model": pretrained, **finetuned}.items():
                if not torch.isfinite(tensors[key]).all():
                    raise UserError(f"{name}: tensor {key} holds NaN or infinite values")
            if not torch.isfinite(merged).all():
                raise UserError(f"merge.coefficients={list(coefficients)}: too large for tensor {key}, which overflows")
        yield key, merged
