"""Spherical linear interpolation (Shoemake 1985) between two finetuned networks, tensor by tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.errors import UserError
from deme.method.task_vectors import MergeMethod, Tensors

PARALLEL = 1 - 1e-6  # cosines beyond it: the arc is a line to float32's rounding


@dataclass
class Slerp(MergeMethod):
    """The point at t of the arc from finetuned_1 to finetuned_2, with the coefficients 1 − t and t.

    The pretrained network is not used. Tensors that are parallel, opposite or zero are interpolated along the line.
    """

    def prepare(self, pretrained: Tensors, finetuned: Sequence[Tensors]) -> None:
        """Check that there are two networks."""
        if len(finetuned) != 2:
            raise UserError(f"merge.method=slerp: takes two networks, not {len(finetuned)}")

    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The merged tensor, in float32."""
        if not math.isclose(sum(coefficients), 1, abs_tol=1e-6):
            raise UserError(f"merge.method=slerp: needs the coefficients 1 − t and t, not {list(coefficients)}")
        first, second = (tensor.double() for tensor in finetuned)
        weights, norms = coefficients, float(first.norm() * second.norm())
        cosine = float((first * second).sum()) / norms if norms > 0 else 1.0
        if abs(cosine) < PARALLEL:
            angle = math.acos(cosine)
            weights = [math.sin(weight * angle) / math.sin(angle) for weight in coefficients]
        return (weights[0] * first + weights[1] * second).float()
