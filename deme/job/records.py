"""What an output was made from, and what happens if that is no longer what is wanted."""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from deme.config.experiment import Config
from deme.errors import UserError, naming, one_line, shown
from deme.job.files import atomic_file, atomic_folder, checked, locked, make_folder, read_yaml, write_yaml
from deme.job.repository import REPOSITORY

Arrays = dict[str, np.ndarray]
Keep = Callable[[str, Callable[[], Arrays]], Arrays]  # name, what makes the arrays → the same, perhaps from a file
MADE_FROM = "made_from"  # in an npz file the array that holds the record, as JSON
CONTENT = "arrays (SHA-256)"  # in that record
ABSENT = "not recorded"
INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "bf16", "avx512f", "avx2")  # as Linux names them, the strongest first
LONGEST_VALUE = 60  # characters of a setting in a message; longer values, as hashes, are left out


@dataclass(frozen=True)
class Kind:
    """A kind of output, and where its record is kept."""

    name: str  # for messages
    file: str  # YAML in the output's folder
    key: str | None = None  # of that file, with the record below; None: at its top, beside the provenance
    beside: dict[str, Any] = field(default_factory=dict, hash=False)  # what else the file must hold
    later: tuple[str, ...] = ()  # known once the data is open, or new: compared if both records have it
    is_precious: bool = False  # it took hours: of other settings it is refused, others are made anew


DATA = "data (SHA-256)"  # of the images that were read: all, or some of many
CONTENTS = "data files (SHA-256)"  # of all files, if they are many and in a local folder
SCHEDULE = "noise schedule (SHA-256)"
ARCHITECTURE = "architecture (SHA-256)"  # of a run the file's, of other outputs that of the settings that count
WEIGHTS_OF = "{} weights (SHA-256)"  # of the networks that a training starts from, or is held to
PRETRAINED_WEIGHTS = WEIGHTS_OF.format("pretrained")
IMAGE_COLUMN = "data.image_column"  # the one that was read
ENCODER = "encoders (SHA-256)"  # of a text-to-image pipeline
BASE = "base of LoRAs (SHA-256)"
LORA_CONFIGS = "configurations of LoRAs (SHA-256)"  # that say their scale, but for diffusers'
WEIGHTS_HASH = "weights (SHA-256)"  # of a merged network, beside its record
LORA_ERRORS = "relative errors"  # of a truncated LoRA's layers, beside its record
MOVED = "moved"  # block → norm of coefficient × task vector of each network, beside a merge's record
OF_RESULT = (WEIGHTS_HASH, LORA_ERRORS, MOVED)  # of a merge
PASSES = "passes"  # through the network for each image, beside a record of samples; older versions wrote none
PROVENANCE = ("git_commit", "versions", "processor", "config")  # beside every record, for the reader; never compared

OF_DATA = (DATA, CONTENTS, IMAGE_COLUMN)
RUN = Kind("a run", "config.yaml", "trained_from", {"free": dict[str, Any]}, OF_DATA, is_precious=True)
MERGED = Kind("a merged network", "merge.yaml")
SNAPSHOT = Kind("a snapshot", "snapshot.yaml")  # that of its run, and the step
AVERAGE = Kind("an average", "ema.yaml", "averaged", {"snapshots": dict[str, str]})  # of an EMA width
SAMPLES = Kind(
    "samples", "samples.yaml", "identity", {"num_images": int, PASSES: int | None}, (ARCHITECTURE,), is_precious=True
)
SEARCH = Kind("a search", "search.yaml", "searched", later=(ARCHITECTURE,), is_precious=True)


@dataclass(frozen=True)
class Record:
    """What an output is made from, as plain values, and what is written beside it but never compared."""

    kind: Kind
    made_from: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)

    def fits(self, wanted: "Record", output: Path, remedy: str = "", overwrite: bool = False) -> bool:
        """True if the output with this record is what is wanted; a precious one that is not is refused.

        The refusal ends with the remedy. `overwrite` replaces a precious one, too.
        """
        changed = changes(self.made_from, wanted.made_from, self.kind.later)
        if changed and self.kind.is_precious and not overwrite:
            raise UserError(f"holds {self.kind.name} of other settings: {', '.join(changed)}; {remedy}")
        if changed:
            print(f"{output} was made from something else: replacing it")
        return not changed

    def write(self, folder: Path) -> None:
        """Write the record into the output's folder."""
        made_from = self.made_from if self.kind.key is None else {self.kind.key: self.made_from}
        write_yaml(folder / self.kind.file, made_from | self.beside)


def read_record(kind: Kind, folder: Path) -> Record | None:
    """The record in an output's folder, if there is one."""
    file = folder / kind.file
    if not file.exists():
        return None
    content = read_yaml(file)
    with naming(f"{file}: not the record of {kind.name}"):
        if kind.key is None:
            beside = {key: content.pop(key) for key in (*PROVENANCE, *OF_RESULT) if key in content}
            made_from = content
        else:
            made_from, beside = content.pop(kind.key, None), content
        record = Record(kind, checked(made_from, dict[str, Any], kind.key or "it"), beside)
        for key, expected in kind.beside.items():
            checked(beside.get(key), expected, key)
    return record


def drawing_passes(folder: Path) -> int | None:
    """The passes through the network that drew a sample folder; None if its record does not tell."""
    record = read_record(SAMPLES, folder)
    if record is None or record.beside.get(PASSES) is None:
        return None
    return record.beside[PASSES] * record.beside["num_images"]


def changes(before: dict[str, Any], now: dict[str, Any], later: tuple[str, ...] = ()) -> list[str]:
    """The settings that differ, with their values if these are short; `later` ones count if both sides have them."""
    differing = []
    for key in sorted({*before, *now}):
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if old != new and not (key in later and ABSENT in (old, new)):
            change = f"={shown(new)} (was {shown(old)})"
            differing.append(key + change * (len(change) <= LONGEST_VALUE))
    return differing


# --- caches


def digest_of(made_from: dict[str, Any]) -> str:
    """16 hexadecimal digits of a hash of the values, for the name of a cache's folder."""
    return hashlib.sha256(json.dumps(list(made_from.values())).encode()).hexdigest()[:16]


def made_once(folder: Path, key: str, build: Callable[[Path], None]) -> Path:
    """A folder that is filled unless it is there; the first process that needs it does so, others wait."""
    if not folder.is_dir():
        with locked(folder, key, wait=True):
            if not folder.is_dir():
                with atomic_folder(folder) as temporary:
                    build(temporary)
    return folder


def read_arrays(file: Path, wanted: dict[str, Any]) -> Arrays | None:
    """The arrays in an npz file; None if it is missing, damaged (with a message) or made from something else."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        made_from = json.loads(str(arrays.pop(MADE_FROM)))
        if made_from.pop(CONTENT) != arrays_hash(arrays):
            raise UserError("its arrays are not those that were written")
        as_read = json.loads(json.dumps(wanted))  # tuples become lists
        return arrays if made_from == as_read else None
    except Exception as error:  # numpy, zipfile and json raise whatever a damaged file leads to
        print(f"{file}: unreadable, made anew ({one_line(error)})")
        return None


def write_arrays(file: Path, arrays: Arrays, made_from: dict[str, Any]) -> None:
    """Write arrays with the record of what they were made from."""
    make_folder(file.parent, "output_dir")
    record = np.array(json.dumps(made_from | {CONTENT: arrays_hash(arrays)}))
    with atomic_file(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays, **{MADE_FROM: record})


def arrays_hash(arrays: Arrays) -> str:
    """SHA-256 of arrays with their names, types and shapes."""
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype.str} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


# --- what is written beside every record


def provenance(config: Config) -> dict[str, Any]:
    """Git commit, package versions, processor and resolved configuration."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "numpy")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    return dict(zip(PROVENANCE, (_git_commit(), versions, processor(), config.recorded), strict=True))


def processor() -> str:
    """The processor's name and its strongest instruction set, which rounding and speed depend on."""
    told = told_by_linux("cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", told)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.+)", told)
    strongest = next((f" ({one})" for one in INSTRUCTION_SETS if flags and one in flags[1].split()), "")
    return (name[1] if name else platform.processor() or platform.machine()) + strongest


def told_by_linux(name: str) -> str:
    """A file of Linux's /proc; empty if there is none."""
    file = Path("/proc") / name
    return file.read_text() if file.exists() else ""


@cache
def _git_commit() -> str | None:
    """The commit, with -dirty if tracked files differ; None without git. A kill leaves no lock of git behind."""
    command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), "status", "--porcelain=v2", "--branch"]
    try:
        status = subprocess.run([*command, "--untracked-files=no"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    commit, *lines = status.removeprefix("# branch.oid ").splitlines()
    return commit + "-dirty" * any(not line.startswith("#") for line in lines)
