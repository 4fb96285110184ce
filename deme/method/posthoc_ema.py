"""Averages of a training's weights of any width, combined afterwards from snapshots of two (EDM2, arXiv 2312.02696).

A power-function average of the weights θ up to step t is ∫ p(τ) θ(τ) dτ with p(τ) = (γ + 1) τ^γ / t^(γ + 1) on [0, t].
Its relative width σ_rel is the standard deviation of p, as a share of t.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from deme.method.task_vectors import Tensors

Profile = tuple[float, float]  # the step t that a power function ends at, and its width σ_rel


@cache
def exponent(width: float) -> float:
    """The γ of a width: σ_rel = (γ + 1)^(1/2) (γ + 2)^(−1) (γ + 3)^(−1/2), a cubic equation (appendix C.1)."""
    share = width**-2
    return float(np.roots([1, 7, 16 - share, 12 - share]).real.max())


def decay(width: float, step: int) -> float:
    """β of the update average ← β average + (1 − β) weights after optimizer step t: (1 − 1/t)^(γ + 1)."""
    return (1 - 1 / step) ** (exponent(width) + 1)


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> np.ndarray:
    """∫ p_i(τ) q_j(τ) dτ of two lists of power functions, shape (first, second); float64 (appendix C.3)."""
    (s, gamma), (t, delta) = (
        np.array([(step, exponent(width)) for step, width in profiles], dtype=np.float64).T
        for profiles in (first, second)
    )
    s, gamma = s[:, None], gamma[:, None]
    least = np.minimum(s, t)  # the functions are 0 beyond their steps
    # the powers of least/s and least/t, as those of the steps themselves overflow
    powers = (least / s) ** gamma * (least / t) ** delta * least / (s * t)
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * powers


def combination(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Coefficients with which snapshots add up to a wanted average, and the error of that, relative to ‖p‖.

    Least squares ‖Σ w_i p_i − p‖² as in EDM2, but with Σ w_i = 1: finetuning changes weights by so little that another
    sum would scale the pretrained ones by more. A profile that was kept has the coefficient 1, and all others 0.
    """
    products, target = inner_products(kept, kept), inner_products(kept, [wanted])[:, 0]
    norm = inner_products([wanted], [wanted])[0, 0]
    scale = np.diag(products) ** -0.5  # of coefficients, so that the equations are as well conditioned as they can be
    border = scale[:, None]
    equations = np.block([[products * scale * border, border], [border.T, np.zeros((1, 1))]])
    solution = np.linalg.lstsq(equations, np.append(target * scale, 1.0), rcond=None)[0]
    coefficients = (solution[:-1] * scale).round(12)  # float64 leaves up to 1e-14 where 0 and 1 are exact
    square = norm - 2 * coefficients @ target + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(square, 0) / norm))


def combine(snapshots: Sequence[Tensors], coefficients: Sequence[float]) -> dict[str, torch.Tensor]:
    """Σ w_i snapshot_i of whole models, summed in float64, tensor by tensor; float32."""
    combined = {}
    for name in snapshots[0]:
        parts = (float(w) * tensors[name].double() for w, tensors in zip(coefficients, snapshots, strict=True) if w)
        combined[name] = sum(parts, torch.zeros(())).float()
    return combined
