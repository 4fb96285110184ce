"""Arrays that take long to compute, each set kept in an npz file with the record of what it was made from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from deme.errors import UserError, one_line
from deme.job.files import atomic_file, make_folder
from deme.job.processes import in_main_process
from deme.job.records import Record

Arrays = dict[str, np.ndarray]
Keep = Callable[[str, Callable[[], Arrays]], Arrays]  # name, what makes it → the same, perhaps from a file
MADE_FROM = "made_from"  # the array that holds the record, as JSON
CONTENT = "arrays (SHA-256)"  # in the record's JSON; older files have none


def kept(accelerator: Accelerator, file: Path, wanted: Record, make: Callable[[], Arrays]) -> Arrays:
    """What a file holds where it was made from the same, else what `make` gives, written there; in every process.

    Args:
        make: called by all processes, or by none.

    Raises:
        RunError: the file can't be written.
    """
    found = in_main_process(accelerator, lambda: read_arrays(file, wanted))
    if found is None:
        found = make()
        in_main_process(accelerator, lambda: write_arrays(file, found, wanted))
    return found


def read_arrays(file: Path, wanted: Record) -> Arrays | None:
    """The arrays in a file, or None: it is missing, damaged, which is said, or made from something else."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        record = Record(wanted.kind, json.loads(str(arrays.pop(MADE_FROM))))
        if record.made_from.pop(CONTENT, content_hash(arrays)) != content_hash(arrays):
            raise UserError("its arrays are not those that were written")
        return arrays if record.fits(Record(wanted.kind, _as_json(wanted)), file) else None
    except Exception as error:  # numpy, zipfile and json raise whatever a damaged file leads to
        print(f"{file}: unreadable, made anew ({one_line(error)})")
        return None


def write_arrays(file: Path, arrays: Arrays, record: Record) -> None:
    """Write arrays with their record, whole or not at all.

    Raises:
        RunError: the disk is full, or the like.
    """
    make_folder(file.parent, "output_dir")
    made_from = record.made_from | {CONTENT: content_hash(arrays)}
    with atomic_file(file) as temporary, temporary.open("wb") as opened:
        np.savez_compressed(opened, **arrays, **{MADE_FROM: np.array(json.dumps(made_from))})


def content_hash(arrays: Arrays) -> str:
    """The SHA-256 of arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _as_json(record: Record) -> dict:
    """The record's values as they are read back: tuples are lists."""
    return json.loads(json.dumps(record.made_from))
