"""How far a search has come: the candidates scored, and safetensors files from which the same command resumes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from deme.errors import UserError, one_line
from deme.job.arrays import CONTENT, content_hash
from deme.job.files import atomic_file
from deme.job.processes import in_main_process

Tensors = dict[str, torch.Tensor]
COLUMNS = ("trace.passes", "trace.values", "trace.coefficients")  # of the candidates in a file


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A candidate that was scored."""

    way: str
    objective: str  # match, loss, or fd with its number of images
    passes: int  # through the UNet since the search began
    value: float
    coefficients: np.ndarray  # float64, shape (groups, ranges)


class Progress:
    """The state of a solver, and the candidates that it has scored.

    Args:
        state: of a new search; else it is read from the file.
    """

    def __init__(self, accelerator: Accelerator, file: Path, way: str, objective: str, state: Tensors):
        self.accelerator = accelerator
        self.file = file
        self.way = way
        self.objective = objective
        self.state = state
        self.rows: list[Evaluated] = []
        tensors = load_state(accelerator, file)
        if tensors is not None:
            columns = [tensors.pop(name).numpy() for name in COLUMNS]
            self.state = tensors
            self.rows = [Evaluated(way, objective, int(p), float(v), w) for p, v, w in zip(*columns, strict=True)]

    @property
    def best(self) -> Evaluated:
        """The first candidate with the lowest value."""
        return min(self.rows, key=lambda row: row.value)

    def add(self, value: float, coefficients: np.ndarray) -> None:
        """Add a candidate that was scored after the passes in the state."""
        row = np.array(coefficients, dtype=np.float64)  # a copy
        self.rows.append(Evaluated(self.way, self.objective, int(self.state["spent"]), value, row))

    def save(self) -> None:
        """Write the state and the candidates."""
        passes = torch.tensor([row.passes for row in self.rows])
        values = torch.tensor([row.value for row in self.rows], dtype=torch.float64)
        coefficients = torch.from_numpy(np.stack([row.coefficients for row in self.rows]))
        columns = dict(zip(COLUMNS, (passes, values, coefficients), strict=True))
        save_state(self.accelerator, self.file, self.state | columns)


def save_state(accelerator: Accelerator, file: Path, tensors: Tensors) -> None:
    """Write tensors, whole or not at all, with the hash of their content."""

    def write() -> None:
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_file(file) as temporary:
            save_file(plain, temporary, {CONTENT: hash_of(plain)})

    in_main_process(accelerator, write)


def load_state(accelerator: Accelerator, file: Path) -> Tensors | None:
    """The tensors of a file, in every process; None if it is missing, or damaged, which is printed."""

    def read() -> Tensors | None:
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
                if (opened.metadata() or {}).get(CONTENT) != hash_of(tensors):
                    raise UserError("its tensors are not those that were written")
            return tensors
        except Exception as error:  # a damaged file leads to errors of safetensors and torch
            print(f"{file}: unreadable, starting anew ({one_line(error)})")
            return None

    return in_main_process(accelerator, read)


def hash_of(tensors: Tensors) -> str:
    """The SHA-256 of tensors with their names."""
    return content_hash({name: tensor.numpy() for name, tensor in tensors.items()})
