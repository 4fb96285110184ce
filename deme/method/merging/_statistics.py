"""Merge methods that weight task vectors by what scripts/merge_statistics.py measured on the training images."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from deme.errors import UserError, blaming
from deme.method.task_vectors import MergeMethod

FISHER, PRODUCTS = "fisher.", "products."  # of the files' tensors, before the name of the weight
MADE_FROM = "made_from"  # key of the files' headers
MAKER = "scripts/merge_statistics.py"


def statistics_file(folder: Path, weights: str) -> Path:
    """The statistics of the network whose weights have this SHA-256."""
    return folder / f"{weights[:16]}.safetensors"


class WithStatistics(MergeMethod):
    """Base of methods with statistics of each network, which are memory-mapped."""

    def check_inputs(self, weights: Sequence[str], statistics: Path) -> None:
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

    def statistics(self, kind: str, name: str, coefficients: Sequence[float]) -> list[torch.Tensor] | None:
        """w_k times each network's statistics of a weight, float32; None if they were not measured for it."""
        if min(coefficients) < 0:
            rule = "its coefficients are weights of a mean, which must not be negative"
            raise UserError(f"merge.method={self.describe()['method']}: {list(coefficients)}: {rule}")
        if not all(f"{kind}{name}" in file.keys() for file in self.files):  # noqa: SIM118  a file is no dictionary
            return None
        return [w * file.get_tensor(f"{kind}{name}") for w, file in zip(coefficients, self.files, strict=True)]
