"""The paper's model merging: task vectors (finetuned − pretrained) and their sum, as pure functions on state dicts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from deme.errors import UserError

Tensors = Mapping[str, torch.Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PART = 2**18  # elements merged at a time: what lies between stays in the processor's cache


class MergeMethod(Protocol):
    """What makes one network of a pretrained one and its finetuned copies."""

    def prepare(self, pretrained: Tensors, finetuned: Sequence[Tensors]) -> None:
        """Look at the whole models once, before their tensors are merged one by one."""

    def merge_tensor(
        self, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """Merge one tensor; the result has the pretrained tensor's type and shape."""

    def describe(self) -> dict[str, str | float]:
        """The method and its settings, for the record of a merge."""


class TaskArithmetic:
    """pretrained + Σ_k w_k (finetuned_k − pretrained), as the paper merges."""

    def prepare(self, pretrained: Tensors, finetuned: Sequence[Tensors]) -> None:
        """Nothing: each tensor is merged by itself."""

    def merge_tensor(
        self, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The sum, taken in float32, in the pretrained tensor's type and shape."""
        merged = torch.empty_like(pretrained, memory_format=torch.contiguous_format)
        add_task_vectors(merged, pretrained, finetuned, coefficients)
        return merged

    def describe(self) -> dict[str, str | float]:
        """The method's name, for the record of a merge."""
        return {"method": "task_arithmetic"}


def add_task_vectors(
    target: torch.Tensor, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
) -> None:
    """Write pretrained + Σ_k w_k (finetuned_k − pretrained) into a contiguous tensor, summed in float32.

    Args:
        target: of any floating-point type, on the device of the others.
    """
    size = PART if target.device.type == "cpu" else max(1, target.numel())  # a GPU is called once for all
    parts = [tensor.reshape(-1).split(size) for tensor in (target.view(-1), pretrained, *finetuned)]
    for place, base, *experts in zip(*parts, strict=True):
        base = base.float()
        total = place.copy_(base) if place.dtype == torch.float32 else base.clone()
        for expert, coefficient in zip(experts, coefficients, strict=True):
            if coefficient != 0:
                total.add_(expert.float() - base, alpha=float(coefficient))
        if total is not place:
            place.copy_(total)


def check_compatible(pretrained: Tensors, finetuned: Tensors, name: str) -> None:
    """Compare the tensors of two models by name, type and shape.

    Args:
        name: of the finetuned model, for the error.
    """
    for key in sorted({*pretrained, *finetuned}):
        for tensors, owner in ((pretrained, "the pretrained model"), (finetuned, name)):
            if key in tensors and tensors[key].dtype not in FLOATS:
                kind = str(tensors[key].dtype).removeprefix("torch.")
                raise UserError(f"{owner}: tensor {key} is of the type {kind}, which can't be merged")
        if key not in finetuned:
            raise UserError(f"{name}: the pretrained model's tensor {key} is missing")
        if key not in pretrained:
            raise UserError(f"{name}: tensor {key} is not in the pretrained model")
        if finetuned[key].shape != pretrained[key].shape:
            shapes = f"{tuple(finetuned[key].shape)}, in the pretrained model {tuple(pretrained[key].shape)}"
            raise UserError(f"{name}: tensor {key} has the shape {shapes}")


def check_finite(name: str, key: str, tensor: torch.Tensor) -> None:
    """"""
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name}: tensor {key} holds NaN or infinite values")


def merge_tensors(
    pretrained: Tensors,
    finetuned: Mapping[str, Tensors],
    coefficients: Mapping[str, Sequence[float]],
    method: MergeMethod,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge whole models, tensor by tensor.

    Args:
        finetuned: model name → state dict, in the order of the coefficients.
        coefficients: tensor name → one coefficient per finetuned model.

    Yields:
        (tensor name, merged tensor).

    Raises:
        OverflowError: coefficients that are too large.
    """
    for name, tensors in finetuned.items():
        check_compatible(pretrained, tensors, name)
    method.prepare(pretrained, list(finetuned.values()))
    for key, base in pretrained.items():
        experts = [tensors[key] for tensors in finetuned.values()]
        merged = method.merge_tensor(base, experts, coefficients[key])
        if not torch.isfinite(merged.sum()):  # what is wrong with an input shows here, in one pass over the result
            for name, tensors in {"the pretrained model": pretrained, **finetuned}.items():
                check_finite(name, key, tensors[key])
            if not torch.isfinite(merged).all():
                raise OverflowError(f"{list(coefficients[key])}: too large for tensor {key}, which overflows")
        yield key, merged
