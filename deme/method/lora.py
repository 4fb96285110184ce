"""LoRAs as task vectors: exact sums, truncation to a rank with its error, and the changes of weights.

A LoRA (Hu et al. 2022) changes the weight of a layer by ΔW = s B A, where A has r rows and B has r columns. So a sum of
LoRAs Σ_k w_k s_k B_k A_k is exactly one LoRA of rank Σ_k r_k: the rows of all A, beside the scaled columns of all B.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from deme.errors import UserError
from deme.method.task_vectors import MergeMethod, Tensors

ALL = "all layers"  # together, among the errors of a truncation


@dataclass(frozen=True, eq=False)
class Factors:
    """The change of a layer's weight, `up` times `down`. The scale alpha / r is in `up`.

    A convolution's `down` has the shape of its weight but for the r output channels, as PEFT and kohya train it.
    """

    down: torch.Tensor  # A: float32, shape (r, in) or (r, in, height, width)
    up: torch.Tensor  # s B: float32, shape (out, r)

    @property
    def rank(self) -> int:
        """r, the number of columns of `up`."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the layer's weight."""
        return (len(self.up), *self.down.shape[1:])

    def change(self) -> torch.Tensor:
        """ΔW, in the factors' type and the shape of the layer's weight."""
        return (self.up @ self.down.flatten(1)).reshape(self.shape)

    def padded(self, rank: int) -> Self:
        """The same change with zeros up to a rank: some programs want one rank for all layers."""
        missing = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(missing, *self.down.shape[1:])])
        return Factors(down, torch.cat([self.up, self.up.new_zeros(len(self.up), missing)], dim=1))

    def triangles(self) -> tuple[torch.Tensor, ...]:
        """Q_B, R_B, Q_A, R_A, float64, with B = Q_B R_B and Aᵀ = Q_A R_A; the Q have orthonormal columns."""
        up, down = self.up.double(), self.down.double().flatten(1)
        return *torch.linalg.qr(up), *torch.linalg.qr(down.T)

    def norm(self) -> float:
        """‖ΔW‖, the square root of the sum of squares, without forming ΔW."""
        _, upper, _, lower = self.triangles()
        return float(torch.linalg.matrix_norm(upper @ lower.T))

    def truncated(self, rank: int) -> tuple[Self, float]:
        """The nearest change of at most this rank, and its distance from this one in the norm (Eckart and Young 1936).

        It is the singular value decomposition of R_B R_Aᵀ, a matrix of r rows, between the Q: ΔW is never formed. Both
        factors get the square roots of the singular values.
        """
        left, upper, right, lower = self.triangles()
        u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        error = float(values[rank:].square().sum().sqrt())
        roots = values[:rank].sqrt()
        up, down = left @ (u[:, :rank] * roots), (roots[:, None] * v[:rank]) @ right.T
        return Factors(down.to(self.down.dtype).reshape(-1, *self.down.shape[1:]), up.to(self.up.dtype)), error


def nearest(change: torch.Tensor, rank: int) -> tuple[Factors, float | None]:
    """The nearest change of at most this rank to that of a weight, and its distance; None where the rank holds all.

    The singular vectors are the eigenvectors of the smaller of M Mᵀ and Mᵀ M, ten times as fast as a decomposition of
    M; float64 keeps the eight digits that float32 holds.
    """
    matrix = change.flatten(1).double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)  # rising
    kept, values = vectors[:, -rank:], squares[-rank:]
    roots = torch.where(values > 0, values, 1.0) ** 0.25  # both factors get those of the singular values
    up, down = (
        (kept * roots, kept.T @ matrix / roots[:, None]) if is_wide else (matrix @ kept / roots, (kept * roots).T)
    )
    error = float(squares[:-rank].clamp(min=0).sum().sqrt()) if rank < len(squares) else None
    return Factors(down.float().reshape(-1, *change.shape[1:]), up.float()), error


def weighted_sum(terms: Iterable[tuple[float, Factors]]) -> Factors | None:
    """Σ_k w_k ΔW_k of one layer, exact up to the rounding of the products w_k B_k; None if all w_k are 0."""
    terms = [(coefficient, factors) for coefficient, factors in terms if coefficient != 0]
    if not terms:
        return None
    return Factors(
        torch.cat([factors.down for _, factors in terms]),
        torch.cat([coefficient * factors.up for coefficient, factors in terms], dim=1),
    )


Lora = Mapping[str, Factors]  # layer's name → its change
Coefficients = Mapping[str, Sequence[float]]  # layer's name → one w_k of each LoRA


class Changed(Mapping[str, torch.Tensor]):
    """Tensors with a LoRA's changes of the same names: added when asked for, in float32; the others as they are."""

    def __init__(self, pretrained: Tensors, lora: Lora):
        self.pretrained, self.lora = pretrained, lora

    def __getitem__(self, name: str) -> torch.Tensor:
        factors = self.lora.get(name)
        return self.pretrained[name] if factors is None else self.pretrained[name].float() + factors.change()

    def __iter__(self) -> Iterator[str]:
        return iter(self.pretrained)

    def __len__(self) -> int:
        return len(self.pretrained)


Merged = tuple[dict[str, Factors], dict[str, float]]  # and the relative error of each layer that is truncated


def merge_loras(loras: Mapping[str, Lora], coefficients: Coefficients, rank: int | None = None) -> Merged:
    """The LoRA Σ_k w_k LoRA_k, truncated to a rank.

    `loras` are named for messages. A layer that a LoRA does not have is unchanged by it.
    """
    sums = weighted_sums(loras, coefficients)
    if rank is None:
        return dict(sums), {}
    return told((layer, *(whole.truncated(rank) if whole.rank > rank else (whole, None))) for layer, whole in sums)


def merge_by(
    method: MergeMethod,
    pretrained: Tensors,
    loras: Mapping[str, Lora],
    coefficients: Coefficients,
    rank: int | None = None,
) -> Merged:
    """What a merge method makes of weights that LoRAs change, less the pretrained ones, truncated to a rank.

    Without a rank a layer's is the sum of those of the LoRAs. All names are those of the weights, which `pretrained`
    has.
    """
    having = by_layer(loras)
    layers = {layer: pretrained[layer] for layer in having}
    changed = [Changed(layers, lora) for lora in loras.values()]
    method.prepare(layers, changed)

    def truncated() -> Iterator[tuple[str, Factors, float | None]]:  # one layer's change in memory at a time
        for layer, base in layers.items():
            merged = method.merge_tensor(layer, base, [tensors[layer] for tensors in changed], coefficients[layer])
            change = merged - base.float()
            if not torch.isfinite(change).all():
                raise too_large(layer, coefficients)
            if change.any():
                yield layer, *nearest(change, rank or sum(factors.rank for _, factors in having[layer]))

    return told(truncated())


def told(truncated: Iterable[tuple[str, Factors, float | None]]) -> Merged:
    """Layers and the relative errors of those that have lost something; under ALL that of all layers together."""
    layers, errors, squares = {}, {}, np.zeros(2)
    for layer, factors, error in truncated:
        norm = float(np.hypot(factors.norm(), error or 0))
        if error is not None:
            errors[layer] = error / norm if norm > 0 else 0.0
        squares += (error or 0) ** 2, norm**2
        layers[layer] = factors
    if errors:
        errors[ALL] = float((squares[0] / squares[1]) ** 0.5) if squares[1] > 0 else 0.0
    return layers, errors


def by_layer(loras: Mapping[str, Lora]) -> dict[str, list[tuple[str, Factors]]]:
    """The LoRAs that change each layer, by name, with their changes: finite and of one shape."""
    layers = dict.fromkeys(layer for lora in loras.values() for layer in lora)
    having = {layer: [(name, lora[layer]) for name, lora in loras.items() if layer in lora] for layer in layers}
    for layer, changes in having.items():
        check_compatible(layer, changes)
    return having


def weighted_sums(loras: Mapping[str, Lora], coefficients: Coefficients) -> Iterator[tuple[str, Factors]]:
    """The exact sum of each layer, but for those that the coefficients leave alone."""
    for layer, having in by_layer(loras).items():
        weights = dict(zip(loras, coefficients[layer], strict=True))
        factors = weighted_sum((weights[name], factors) for name, factors in having)
        if factors is None:
            continue
        if not all(torch.isfinite(part).all() for part in (factors.up, factors.down)):
            raise too_large(layer, coefficients)
        yield layer, factors


def too_large(layer: str, coefficients: Coefficients) -> UserError:
    """What to raise where a sum overflows."""
    return UserError(f"the coefficients {list(coefficients[layer])} are too large for {layer}, which overflows")


def check_compatible(layer: str, having: Sequence[tuple[str, Factors]]) -> None:
    """Check that several LoRAs' changes of a layer can be added, and are finite."""
    first, expected = having[0]
    for name, factors in having:
        if factors.shape != expected.shape:
            raise UserError(f"{name}: {layer} has the shape {factors.shape}, in {first} {expected.shape}")
        for kind, tensor in (("A", factors.down), ("B", factors.up)):
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name}: {kind} of {layer} holds NaN or infinite values")
