"""How far a search has come: the candidates scored, and the files from which the same command resumes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deme.job.processes import Processes, in_main_process
from deme.job.records import SEARCH, Record, read_arrays, write_arrays

Tensors = dict[str, torch.Tensor]
COLUMNS = ("trace.passes", "trace.values", "trace.coefficients")  # of the candidates in a file
RECORD = Record(SEARCH, {})  # of a file: the search's folder has the whole record


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A candidate that was scored."""

    way: str
    objective: str  # match, loss, or fd with its number of images
    passes: int  # through the UNet since the search began
    value: float
    coefficients: np.ndarray  # float64, shape (groups, ranges)


class Progress:
    """The state of a solver, which must count the UNet passes spent, and the candidates that it has scored.

    Both are read from the file if it is there.
    """

    def __init__(self, processes: Processes, file: Path, way: str, objective: str, state: Tensors):
        self.processes = processes
        self.file = file
        self.way = way
        self.objective = objective
        self.state = state
        self.rows: list[Evaluated] = []
        arrays = in_main_process(processes, lambda: read_arrays(file, RECORD))
        if arrays is not None:
            columns = [arrays.pop(name) for name in COLUMNS]
            self.state = {name: torch.from_numpy(array) for name, array in arrays.items()}
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
        columns = zip(*((row.passes, row.value, row.coefficients) for row in self.rows), strict=True)
        arrays = {name: tensor.numpy() for name, tensor in self.state.items()}
        arrays |= dict(zip(COLUMNS, map(np.array, columns), strict=True))
        in_main_process(self.processes, lambda: write_arrays(self.file, arrays, RECORD))
