"""Arrays that take long to compute, kept in an npz file with the record of what they were made from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deme.errors import UserError, one_line
from deme.job.files import atomic_file, make_folder
from deme.job.processes import Processes, in_main_process
from deme.job.records import Record

Arrays = dict[str, np.ndarray]
Keep = Callable[[str, Callable[[], Arrays]], Arrays]  # name, what makes the arrays → the same, perhaps from a file
MADE_FROM = "made_from"  # the array that holds the record, as JSON
CONTENT = "arrays (SHA-256)"  # in the record


def kept(processes: Processes, file: Path, wanted: Record, make: Callable[[], Arrays]) -> Arrays:
    """The arrays in a file if they were made from the same, else those of `make`, which are written; in every process.

    Args:
        make: called by all processes, or by none.
    """
    arrays = in_main_process(processes, lambda: read_arrays(file, wanted))
    if arrays is None:
        arrays = make()
        in_main_process(processes, lambda: write_arrays(file, arrays, wanted))
    return arrays


def read_arrays(file: Path, wanted: Record) -> Arrays | None:
    """The arrays in a file; None if it is missing, damaged (with a message) or made from something else."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        made_from = json.loads(str(arrays.pop(MADE_FROM)))
        if made_from.pop(CONTENT) != content_hash(arrays):
            raise UserError("its arrays are not those that were written")
        as_read = json.loads(json.dumps(wanted.made_from))  # tuples become lists
        return arrays if Record(wanted.kind, made_from).fits(Record(wanted.kind, as_read), file) else None
    except Exception as error:  # numpy, zipfile and json raise whatever a damaged file leads to
        print(f"{file}: unreadable, made anew ({one_line(error)})")
        return None


def write_arrays(file: Path, arrays: Arrays, record: Record) -> None:
    """Write arrays with their record, whole or not at all."""
    make_folder(file.parent, "output_dir")
    made_from = record.made_from | {CONTENT: content_hash(arrays)}
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays, **{MADE_FROM: np.array(json.dumps(made_from))})


def content_hash(arrays: Arrays) -> str:
    """SHA-256 of arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
