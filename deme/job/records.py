"""What an output was made from: a record kept with it decides whether it still fits what is wanted.

Every kind of output names its policy for the case that it does not.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.errors import UserError, shown
from deme.job.files import REPOSITORY, read_yaml, write_yaml
from deme.job.machine import processor

LONGEST_VALUE = 60  # characters of a setting that a message shows; hashes are named alone


class Policy(Enum):
    """What happens to an output that stands there but was made from something else."""

    REFUSE = "refuse"  # it took hours: a person decides
    REPLACE = "replace"  # it is made anew, which is said
    REBUILD = "rebuild"  # a cache: it is made anew


@dataclass(frozen=True)
class Kind:
    """A kind of output, and where its record stands."""

    name: str  # for messages
    policy: Policy
    file: str | None = None  # YAML in the output's folder; None: the output carries its record itself
    key: str | None = None  # of that file, below which the record stands; None: at its top, beside the provenance
    beside: dict[str, type] = field(default_factory=dict, hash=False)  # what else the file must hold, not below `key`
    defaults: dict[str, Any] = field(default_factory=dict, hash=False)  # of what older records do not name
    later: tuple[str, ...] = ()  # what older records do not say, or what is not known yet: compared where both say it


DATA = "data (SHA-256)"  # of what was read: of many images, some
CONTENTS = "data files (SHA-256)"  # of all of them, where they are many and in a local folder
SCHEDULE = "noise schedule (SHA-256)"
ARCHITECTURE = "architecture (SHA-256)"
IMAGE_COLUMN = "data.image_column"  # the one that was read, which is known once the data is open
ENCODER = "encoders (SHA-256)"  # of a text-to-image pipeline
SAMPLED_BEFORE = {"sample.scheduler": "ddim", "size_on_disk": None}  # of samples whose records do not name it
RUN_LATER = (DATA, CONTENTS, SCHEDULE, ARCHITECTURE, IMAGE_COLUMN)
RUN = Kind("a run", Policy.REFUSE, "config.yaml", "trained_from", {"free": dict}, later=RUN_LATER)
MERGED = Kind("a merged network", Policy.REPLACE, "merge.yaml", later=(SCHEDULE,))
SAMPLES = Kind("samples", Policy.REFUSE, "samples.yaml", "identity", {"num_images": int}, SAMPLED_BEFORE)
SEARCHED_BEFORE = {"evaluate.classifier_batch_size": 64}
SEARCH = Kind(
    "a search",
    Policy.REFUSE,
    "search.yaml",
    "searched",
    defaults=SEARCHED_BEFORE,
    later=(DATA, CONTENTS, "search.num_inference_steps"),
)
CLASSIFIER = Kind("a classifier", Policy.REBUILD, defaults={"batch_size": 64}, later=(DATA, CONTENTS))
STATISTICS = Kind("statistics", Policy.REBUILD, later=(DATA, CONTENTS))
IMAGES = Kind("decoded images", Policy.REBUILD)
LATENTS = Kind("encoded images", Policy.REBUILD)
ANALYSIS = Kind("an analysis", Policy.REBUILD)


@dataclass(frozen=True)
class Record:
    """What an output is made from.

    Args:
        made_from: everything that determines the output, as plain values.
        beside: what is written with it for the reader, such as the provenance; never compared.
    """

    kind: Kind
    made_from: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)

    def fits(self, wanted: "Record", output: Path, remedy: str = "", overwrite: bool = False) -> bool:
        """Whether the output that this is the record of is what is wanted; if not, its kind's policy is followed.

        Args:
            remedy: what a person can do where it is refused.
            overwrite: a person has decided: it is replaced instead of refused.

        Returns:
            False: it has to be made anew.
        """
        changed = changes(self.made_from, wanted.made_from, self.kind.later)
        policy = Policy.REPLACE if overwrite else self.kind.policy
        if changed and policy is Policy.REFUSE:
            raise UserError(f"holds {self.kind.name} of other settings: {', '.join(changed)}; {remedy}")
        if changed and policy is Policy.REPLACE:
            print(f"{output} was made from something else: replacing it")
        return not changed

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the values: the name of a cache's folder."""
        return hashlib.sha256(json.dumps(list(self.made_from.values())).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write it into the output's folder."""
        made_from = self.made_from if self.kind.key is None else {self.kind.key: self.made_from}
        write_yaml(folder / self.kind.file, made_from | self.beside)


def read_record(kind: Kind, folder: Path) -> Record | None:
    """The record in an output's folder, or None where there is none."""
    file = folder / kind.file
    if not file.exists():
        return None
    content = read_yaml(file)
    check_shape(content, kind.beside if kind.key is None else {kind.key: dict} | kind.beside, kind.name, file)
    check_shape(content, {key: kind for key, kind in OF_PROVENANCE.items() if key in content}, kind.name, file)
    made_from = content.pop(kind.key) if kind.key is not None else content
    if not all(isinstance(key, str) for key in (*content, *made_from)):
        raise UserError(f"{file}: not the record of {kind.name}: a key is not a text")
    not_compared = [key for key in content if kind.key is not None or key in (*PROVENANCE, WEIGHTS_HASH)]
    beside = {key: content.pop(key) for key in not_compared}
    return Record(kind, kind.defaults | made_from, beside)


def check_shape(content: dict[str, Any], wanted: dict[str, type], name: str, file: Path) -> None:
    """Make sure that what was read has these keys, each with a value of its type."""
    for key, expected in wanted.items():
        value = content.get(key)
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            what = "is missing" if value is None else f"is {shown(value)[:LONGEST_VALUE]}"
            raise UserError(f"{file}: not the record of {name}: {key} {what}")


def changes(before: dict[str, Any], now: dict[str, Any], later: tuple[str, ...] = ()) -> list[str]:
    """The settings that differ, each with its values where these are short.

    Args:
        later: keys that count only where both sides have them.
    """
    found = []
    for key in sorted({*before, *now}):
        if key in later and (key not in before or key not in now):
            continue
        if (key in before) != (key in now) or before.get(key) != now.get(key):
            old, new = (shown(values[key]) if key in values else "not recorded" for values in (before, now))
            change = f"={new} (was {old})"
            found.append(key + change * (len(change) <= LONGEST_VALUE))
    return found


OF_PROVENANCE = {"git_commit": str | None, "versions": dict, "processor": str | None, "config": dict}
PROVENANCE = tuple(OF_PROVENANCE)
WEIGHTS_HASH = "weights (SHA-256)"  # of a merged network, beside its record


def provenance(config: Config) -> dict[str, Any]:
    """What is written beside every output: git commit, package versions, processor, the resolved configuration."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "numpy")
    versions = {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}
    values = (_git_commit(), versions, processor(), config.recorded)
    return dict(zip(PROVENANCE, values, strict=True))


@cache
def _git_commit() -> str | None:
    """The commit, with -dirty where tracked files differ; nothing is locked, as a kill would leave the lock behind."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy of the repository without git
