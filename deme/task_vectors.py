"""The paper's model merging: task vectors (finetuned − pretrained) and their sum, as pure functions on state dicts."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from deme.config import UserError

Tensors = Mapping[str, torch.Tensor]
PROJECTION_SUFFIX = ".projection.weight"  # how the channel-wise projections' tensors end in a state dict


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
    base = pretrained.float()
    merged = base.clone()
    for tensor, coefficient in zip(finetuned, coefficients, strict=True):
        merged.add_(tensor.float() - base, alpha=coefficient)
    return merged.to(pretrained.dtype)


def merge_tensors(
    pretrained: Tensors, finetuned: Mapping[str, Tensors], coefficients: Sequence[float]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge whole models, tensor by tensor.

    Args:
        finetuned: model name → state dict, in the order of the coefficients.

    Yields:
        (tensor name, merged tensor).

    Raises:
        UserError: models of different tensors or shapes, or a NaN or infinite value; names the model and the tensor.
    """
    for name, tensors in finetuned.items():
        check_compatible(pretrained, tensors, name)
    for key, base in pretrained.items():
        for name, tensors in {"the pretrained model": pretrained, **finetuned}.items():
            if not torch.isfinite(tensors[key]).all():
                raise UserError(f"{name}: tensor {key} holds NaN or infinite values")
        yield key, merge_tensor(base, [tensors[key] for tensors in finetuned.values()], coefficients)
