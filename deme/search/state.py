"""How far a search has come: tensors in a safetensors file, so that the same command goes on after an interruption."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from deme.errors import one_line
from deme.job.files import atomic_file
from deme.job.processes import in_main_process

Tensors = dict[str, torch.Tensor]
TRACED = "trace.values"


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
        """From the state's file."""
        passes = tensors["trace.passes"].tolist()
        rows = tensors["trace.coefficients"].numpy() if passes else []
        return cls(passes, tensors["trace.values"].tolist(), list(rows))

    def evaluated(self, way: str, objective: str) -> list[Evaluated]:
        """Under the name of a way."""
        rows = zip(self.passes, self.values, self.coefficients, strict=True)
        return [Evaluated(way, objective, *row) for row in rows]


def save_state(accelerator: Accelerator, file: Path, tensors: Tensors) -> None:
    """Write a state, whole or not at all."""

    def write() -> None:
        with atomic_file(file) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    in_main_process(accelerator, write)


def load_state(accelerator: Accelerator, file: Path, like: Tensors) -> Tensors | None:
    """A state in every process; None where there is none, or it is damaged, which is said.

    Args:
        like: tensors of which the file must hold those of the same shapes.
    """

    def read() -> Tensors | None:
        if not file.exists():
            return None
        try:
            found = load_file(file)
            for name, tensor in like.items():
                if found[name].shape != tensor.shape or not found[name].isfinite().all():
                    raise ValueError(f"tensor {name} does not fit")
            if TRACED in found:
                Trace.of(found)
            return found
        except Exception as error:  # a damaged file leads to errors of safetensors and torch
            print(f"{file}: unreadable, starting anew ({one_line(error)})")
            return None

    return in_main_process(accelerator, read)
