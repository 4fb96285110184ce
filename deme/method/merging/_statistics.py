"""Merge methods that weight task vectors by what scripts/merge_statistics.py measured on the training images."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from deme.errors import UserError, blaming
from deme.method.merging._steps import OfTaskVectors, weighted_sum

FISHER, PRODUCTS = "fisher.", "products."  # of the files' tensors, before the name of the weight
MADE_FROM = "made_from"  # key of the files' headers
MAKER = "scripts/merge_statistics.py"


def statistics_file(folder: Path, weights: str) -> Path:
    """The statistics of the network whose weights have this SHA-256."""
    return folder / f"{weights[:16]}.safetensors"


class WithStatistics(OfTaskVectors):
    """Base of methods with statistics of each network, which are memory-mapped."""

    kind: ClassVar[str]  # FISHER or PRODUCTS

    def check_inputs(self, weights: Iterable[str], statistics: Path) -> None:
        """Find the networks' statistics by the hashes of their weights."""
        self.files, self.made_from = [], []
        for sha256 in weights:
            file = statistics_file(statistics, sha256)
            if not file.is_file():
                raise UserError(f"merge.method={self.describe()['method']}: {file} is missing; {MAKER} makes it")
            with blaming(file):
                self.files.append(safe_open(file, "pt"))
            made_from = (self.files[-1].metadata() or {}).get(MADE_FROM, "")
            self.made_from.append(hashlib.sha256(made_from.encode()).hexdigest()[:16])

    def describe(self) -> dict[str, Any]:
        """The method, its settings, and what its statistics were measured on."""
        return super().describe() | ({"statistics": self.made_from} if hasattr(self, "made_from") else {})

    def change(self, name: str, vectors: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        """What is added to a tensor: the sum, where nothing was measured for it."""
        if min(coefficients) < 0:
            rule = "its coefficients are weights of a mean, which must not be negative"
            raise UserError(f"merge.method={self.describe()['method']}: {list(coefficients)}: {rule}")
        key = f"{self.kind}{name}"
        if sum(coefficients) == 0 or not all(key in file.keys() for file in self.files):  # noqa: SIM118  no dictionary
            return weighted_sum(vectors, coefficients)
        found = [w * torch.atleast_1d(file.get_tensor(key)) for w, file in zip(coefficients, self.files, strict=True)]
        return sum(coefficients) * self.mean(vectors, torch.stack(found).to(vectors.device), coefficients)

    @abstractmethod
    def mean(self, vectors: torch.Tensor, statistics: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
        """The mean of task vectors (N, …), float32, by their statistics, which are multiplied by the coefficients."""
