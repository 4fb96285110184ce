"""What an output was made from, and what happens if that is no longer what is wanted."""

import hashlib
import json
import platform
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.errors import UserError, shown
from deme.job.files import REPOSITORY, read_yaml, write_yaml
from deme.job.machine import processor

LONGEST_VALUE = 60  # characters of a setting in a message; longer values, as hashes, are left out


@dataclass(frozen=True)
class Kind:
    """A kind of output, and where its record is kept."""

    name: str  # for messages
    file: str | None = None  # YAML in the output's folder; None: a cache, which carries its record itself
    key: str | None = None  # of that file, with the record below; None: at its top, beside the provenance
    beside: dict[str, type] = field(default_factory=dict, hash=False)  # what else the file must hold
    later: tuple[str, ...] = ()  # known once the data is open: compared if both records have it
    is_precious: bool = False  # it took hours: of other settings it is refused, others are made anew


DATA = "data (SHA-256)"  # of the images that were read: all, or some of many
CONTENTS = "data files (SHA-256)"  # of all files, if they are many and in a local folder
SCHEDULE = "noise schedule (SHA-256)"
ARCHITECTURE = "architecture (SHA-256)"
IMAGE_COLUMN = "data.image_column"  # the one that was read
ENCODER = "encoders (SHA-256)"  # of a text-to-image pipeline
WEIGHTS_HASH = "weights (SHA-256)"  # of a merged network, beside its record
PROVENANCE = ("git_commit", "versions", "processor", "config")  # beside every record, for the reader; never compared

OF_DATA = (DATA, CONTENTS, IMAGE_COLUMN)
RUN = Kind("a run", "config.yaml", "trained_from", {"free": dict}, OF_DATA, is_precious=True)
MERGED = Kind("a merged network", "merge.yaml")
SAMPLES = Kind("samples", "samples.yaml", "identity", {"num_images": int}, is_precious=True)
SEARCH = Kind("a search", "search.yaml", "searched", is_precious=True)
CLASSIFIER = Kind("a classifier")
STATISTICS = Kind("statistics")
IMAGES = Kind("decoded images")
LATENTS = Kind("encoded images")
ANALYSIS = Kind("an analysis")


@dataclass(frozen=True)
class Record:
    """What an output is made from, as plain values, and what is written beside it but never compared."""

    kind: Kind
    made_from: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)

    def fits(self, wanted: "Record", output: Path, remedy: str = "", overwrite: bool = False) -> bool:
        """True if the output with this record is what is wanted; a precious one that is not is refused.

        Args:
            remedy: what a person can do if it is refused.
            overwrite: do not refuse it.
        """
        changed = changes(self.made_from, wanted.made_from, self.kind.later)
        if changed and self.kind.is_precious and not overwrite:
            raise UserError(f"holds {self.kind.name} of other settings: {', '.join(changed)}; {remedy}")
        if changed and self.kind.file is not None:
            print(f"{output} was made from something else: replacing it")
        return not changed

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of a hash of the values, for the name of a cache's folder."""
        return hashlib.sha256(json.dumps(list(self.made_from.values())).encode()).hexdigest()[:16]

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
    expected_types = kind.beside if kind.key is None else {kind.key: dict, **kind.beside}
    for key, expected in expected_types.items():
        value = content.get(key)
        if type(value) is not expected:
            what = "is missing" if value is None else f"is {shown(value)[:LONGEST_VALUE]}"
            raise UserError(f"{file}: not the record of {kind.name}: {key} {what}")
    if kind.key is None:
        beside = {key: content.pop(key) for key in (*PROVENANCE, WEIGHTS_HASH) if key in content}
        made_from = content
    else:
        made_from, beside = content.pop(kind.key), content
    if not all(isinstance(key, str) for key in made_from):
        raise UserError(f"{file}: not the record of {kind.name}: a key is not a text")
    return Record(kind, made_from, beside)


def changes(before: dict[str, Any], now: dict[str, Any], later: tuple[str, ...] = ()) -> list[str]:
    """The settings that differ, with their values if these are short.

    Args:
        later: keys that count only if both sides have them.
    """
    differing = []
    for key in sorted({*before, *now}):
        if key in later and (key not in before or key not in now):
            continue
        if (key in before) != (key in now) or before.get(key) != now.get(key):
            old, new = (shown(values[key]) if key in values else "not recorded" for values in (before, now))
            change = f"={new} (was {old})"
            differing.append(key + change * (len(change) <= LONGEST_VALUE))
    return differing


def provenance(config: Config) -> dict[str, Any]:
    """Git commit, package versions, processor and resolved configuration."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "numpy")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    return dict(zip(PROVENANCE, (_git_commit(), versions, processor(), config.recorded), strict=True))


@cache
def _git_commit() -> str | None:
    """The commit, with -dirty if tracked files differ; None without git. A kill leaves no lock of git behind."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
