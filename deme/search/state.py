"""How far a search has come: tensors in a safetensors file, so that the same command goes on after an interruption."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deme.errors import one_line
from deme.job.arrays import CONTENT, content_hash
from deme.job.files import atomic_file
from deme.job.processes import in_main_process

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Evaluated:
    """A candidate that was scored on the way."""

    way: str
    objective: str  # match, loss, or fd with its number of images
    passes: int  # through the UNet since the search began
    value: float
    coefficients: np.ndarray  # shape (groups, ranges)


@dataclass
class Trace:
    """Candidates of one way, in the order in which they were scored."""

    passes: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    coefficients: list[np.ndarray] = field(default_factory=list)

    def add(self, passes: int, value: float, coefficients: np.ndarray) -> None:
        """One more."""
        self.passes.append(passes)
        self.values.append(value)
        self.coefficients.append(np.array(coefficients, dtype=np.float64))

    @property
    def best(self) -> int:
        """The place of the least value."""
        return int(np.argmin(self.values))

    def tensors(self) -> Tensors:
        """For the state's file."""
        found = {"passes": torch.tensor(self.passes), "values": torch.tensor(self.values, dtype=torch.float64)}
        if self.coefficients:
            found["coefficients"] = torch.from_numpy(np.stack(self.coefficients))
        return {f"trace.{name}": value for name, value in found.items()}

    @classmethod
    def of(cls, tensors: Tensors) -> "Trace":
        """From the state's file.

        Raises:
            ValueError: not as many of each, or no number of passes, value or coefficients.
        """
        passes, values = tensors["trace.passes"], tensors["trace.values"]
        rows = tensors["trace.coefficients"] if len(passes) else torch.empty(0)
        integral = not passes.dtype.is_floating_point
        if not integral or not len(passes) == len(values) == len(rows) or values.isnan().any():
            raise ValueError("its candidates do not fit each other")
        if not rows.isfinite().all():
            raise ValueError("a coefficient is not finite")
        return cls(passes.tolist(), values.tolist(), list(rows.numpy()))

    def evaluated(self, way: str, objective: str) -> list[Evaluated]:
        """Under the name of a way."""
        rows = zip(self.passes, self.values, self.coefficients, strict=True)
        return [Evaluated(way, objective, *row) for row in rows]


def save_state(accelerator: Accelerator, file: Path, tensors: Tensors) -> None:
    """Write a state, whole or not at all."""

    def write() -> None:
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_file(file) as temporary:
            save_file(plain, temporary, {CONTENT: hash_of(plain)})

    in_main_process(accelerator, write)


def hash_of(tensors: Tensors) -> str:
    """The SHA-256 of tensors with their names."""
    return content_hash({name: tensor.numpy() for name, tensor in tensors.items()})


def load_state(
    accelerator: Accelerator, file: Path, like: Tensors, traced: tuple[int, ...] | None = None
) -> Tensors | None:
    """A state in every process; None where there is none, or it is damaged, which is said.

    Args:
        like: tensors of which the file must hold those of the same shapes and types.
        traced: shape of each candidate's coefficients, where the file must hold a trace.
    """

    def read() -> Tensors | None:
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
            found = load_file(file)
            if metadata.get(CONTENT, hash_of(found)) != hash_of(found):  # older files have no hash
                raise ValueError("its tensors are not those that were written")
            for name, tensor in like.items():
                same = (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
                if not same or not found[name].isfinite().all():
                    raise ValueError(f"tensor {name} does not fit")
            if traced is not None:
                rows = Trace.of(found).coefficients
                if not rows or rows[0].shape != traced:
                    raise ValueError("its candidates have other coefficients")
            return found
        except Exception as error:  # a damaged file leads to errors of safetensors and torch
            print(f"{file}: unreadable, starting anew ({one_line(error)})")
            return None

    return in_main_process(accelerator, read)
