"""Files and folders: whole or not at all, one writer at a time, and read with their content checked against types."""

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout
from safetensors import SafetensorError

from deme.config.reading import read_yaml_text
from deme.errors import RunError, UserError, blaming, one_line
from deme.job.rank import is_main_process

TEMPORARY = ".writing-"  # prefix of unfinished siblings; they have no suffix, as pytorch_fid takes every *.png
REPLACED = ".replaced-"  # prefix of a folder that is set aside while another one takes its name
SUFFIX_LENGTH = 8  # random characters that tempfile appends
UMASK = os.umask(0o077)  # can be read only by setting it
os.umask(UMASK)
HEARTBEAT = 0.5  # seconds between two signs of life of a lock's owner
LEASE = 300.0  # seconds without one, as seen by who waits, after which the owner is taken for dead
POLLED_EVERY = 2.0  # seconds between two looks at what another job holds; the first ones come sooner
LARGEST = 1e38  # of a number: a larger one is damage, and fits neither float32 nor a plot
TYPES = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}
TYPES |= {list: "a list", dict: "a mapping"}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunError, which names `path`, if the disk is full, read-only or gone while the block writes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be written: {one_line(error)}") from error


@contextmanager
def atomic_file(path: Path, is_durable: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` when the block ends without an error.

    `is_durable` syncs it, and clears up after killed runs. This takes too long for thousands of small files, which are
    checked before they are relied on.
    """
    with writing(path):
        if is_durable:
            remove_leftovers(path)
        descriptor, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent)
        os.close(descriptor)  # of a private file: readable to its owner alone
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~UMASK)
            if is_durable:
                sync_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path` to fill; it replaces `path` when the block ends without an error.

    A folder with content can't be replaced in one step, so the old one is set aside first. After a kill between the
    two steps it is the only copy, and `remove_leftovers` puts it back.
    """
    path = path.resolve()  # a link to a folder elsewhere stays: what it points to is replaced
    with writing(path):
        remove_leftovers(path)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))  # private: mode 0700
        try:
            yield temporary
            for file in temporary.rglob("*"):
                sync_to_disk(file)
            temporary.chmod(0o777 & ~UMASK)
            sync_to_disk(temporary)
            if path.exists():
                os.replace(path, path.with_name(f"{REPLACED}{path.name}"))
            os.replace(temporary, path)
            sync_to_disk(path.parent)
        finally:
            remove_leftovers(path)


def remove_leftovers(path: Path, pattern: str | None = None) -> None:
    """Clear up after a run that was killed while it wrote `path`, or names in it that fit a pattern, under its lock."""
    folder, pattern = (path.parent, glob.escape(path.name)) if pattern is None else (path, pattern)
    for old in folder.glob(f"{REPLACED}{pattern}"):
        replaced = old.with_name(old.name.removeprefix(REPLACED))
        shutil.rmtree(old, ignore_errors=True) if replaced.exists() else os.replace(old, replaced)
    for leftover in unfinished(folder, pattern):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def unfinished(folder: Path, pattern: str) -> Iterator[Path]:
    """What a killed run left unfinished directly in `folder`, of the names that fit a pattern such as *.png."""
    return folder.glob(f"{TEMPORARY}{pattern}-{'?' * SUFFIX_LENGTH}")


def check_apart(key: str, output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is, holds or lies in an input, links resolved."""
    place = output.resolve()
    for path in inputs:
        source = path.resolve()
        if place == source or place in source.parents or source in place.parents:
            raise UserError(f"{key}={output}: is, holds or lies in {path}, which is read")


class InUse(UserError):
    """Another job holds an output."""


@contextmanager
def locked(
    output: Path, key: str, wait: bool = False, share: Callable[[Callable[[], bool]], bool] = lambda attempt: attempt()
) -> Iterator[None]:
    """Hold the file or folder `output` against other jobs while the block lasts; clear up after one that was killed.

    The lock is a `filelock.SoftFileLease` beside the output. It is created exclusively, so it needs no locks of the
    operating system, which hosts that share a folder may not see of each other.

    Args:
        key: the setting that `output` comes from.
        wait: for a living owner, too. A job that Slurm has started again waits in any case: its earlier self may be
            running on a node that was cut off.
        share: makes an attempt in one of several processes and returns its result in all of them.
    """
    output = output if output.name else output.absolute()
    if not output.name:
        raise UserError(f"{key}={output}: must be a file or folder below it")
    lock = SoftFileLease(lock_file(output), lease_duration=LEASE, heartbeat_interval=HEARTBEAT, on_compromise=_end)
    attempts = _attempts(lock, output, key, wait or os.environ.get("SLURM_RESTART_COUNT", "0") != "0")
    try:
        while not share(lambda: next(attempts)):
            pass
        yield
    finally:
        lock.release()


def lock_file(output: Path) -> Path:
    """The lock beside an output."""
    return output.with_name(f".{output.name}.lock")


def _attempts(lock: SoftFileLease, output: Path, key: str, wait: bool) -> Iterator[bool]:
    """Yield False for each attempt that fails, and True once the lock is held.

    The lock of a dead process of this host is taken over at once. Any other owner is watched: it gives a sign of life,
    upon which this job is refused, or it is dead after `LEASE`. No clocks are compared.
    """
    file = lock_file(output)
    seen, since, pause = None, 0.0, 0.1
    is_told = not is_main_process()  # by the main process
    with writing(file):
        make_folder(output.parent, key)
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise UserError(f"{key}={output}: {file} is no lock, but stands in its place: delete it")
        while True:
            with suppress(Timeout, LeaseSettingsMismatch):
                lock.acquire(timeout=0)
                break
            owner, now, latest = lock.owner, time.monotonic(), stamp(file)
            if latest is None:  # released since
                continue
            name = "another process" if owner is None else f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
            in_use = f"{key}={output}: in use by {name}; if that has ended, `rm {file}`"
            if latest != seen:
                if seen is not None and not wait:
                    raise InUse(in_use)
                seen, since = latest, now
            elif now - since > 1.1 * LEASE:  # filelock was to take it over by now
                _remove_dead(file, seen)
            if not is_told and (wait or now - since > LEASE / 30):
                is_told = True
                print(f"{in_use}; waiting for it, or for {LEASE / 60:.0f} minutes without a sign of life", flush=True)
            time.sleep(pause)
            pause = min(2 * pause, POLLED_EVERY)
            yield False
        remove_leftovers(output.resolve())
    yield True


def _remove_dead(file: Path, seen: tuple[int, ...]) -> None:
    """Remove the lock that was seen, and no other that has just taken its place.

    filelock takes over only where the disk can exchange two names in one step, as NFS can't, and no empty file, which
    a job leaves that was killed before it wrote its name.
    """
    aside = file.with_name(f"{TEMPORARY}{file.stem.removeprefix('.')}-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        file.rename(aside)
        if stamp(aside) != seen:
            with suppress(FileExistsError):
                os.link(aside, file)
        aside.unlink()


def _end(lost: LeaseCompromise) -> None:
    """End this process, which was suspended or cut off from the disk: another job may write, so it writes nothing."""
    with suppress(OSError, ValueError):
        print(f"{lost.lock_file}: lost to another job ({lost.reason}); this one stops", file=sys.stderr, flush=True)
    os._exit(RunError.status)


class Watched:
    """Files that are read more than once, for their hash and for their content."""

    def __init__(self, files: Iterable[Path]):
        self.before = {path: stamp(path) for path in files}

    def check(self) -> None:
        """Raise RunError if another program has written or deleted one of them since."""
        for path, before in self.before.items():
            if stamp(path) != before:
                raise RunError(f"{path}: was written while it was read; start the same command again")


def stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; None if there is none."""
    with suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None


def make_folder(path: Path, key: str) -> None:
    """Create a folder and its parents."""
    with blaming(f"{key}: cannot create the folder {path}"):
        path.mkdir(parents=True, exist_ok=True)


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, rising; none if there is no folder."""
    # not by glob, which takes a folder that can't be read for an empty one: the run would begin anew
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    matches = (re.fullmatch(r"step-([0-9]{8}|[1-9][0-9]{8,17})", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_yaml(values: dict) -> str:
    """A mapping as YAML, its keys in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def write_yaml(path: Path, values: dict) -> None:
    """Write a mapping as a YAML file, whole or not at all."""
    write_text(path, to_yaml(values))


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file."""
    return read_json(path, read_yaml_text, "YAML mapping")


def read_json(path: Path, parse: Callable[[str], Any] = json.loads, name: str = "JSON object") -> dict:
    """The object in a JSON file."""
    with blaming(path):
        values = parse(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise UserError(f"not a {name}")
    return values


def checked(value: Any, kind: Any, name: str = "") -> Any:
    """A value of a type, with finite numbers. A truth value is no number, and a number no text.

    Args:
        kind: str, int, float, bool, a dataclass of such, or list[T], dict[str, T], T | None of them. A dataclass is
            made of a mapping: other keys are ignored, and what may be None or has a default may be missing. Any.
        name: of the value, for messages.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or (origin is UnionType and value is None):
        return value
    if origin is UnionType:
        return checked(value, parts[0], name)
    if value is None:
        raise UserError(f"{name or 'it'} is missing")
    if kind is float and type(value) is int and abs(value) < LARGEST:
        value = float(value)
    expected = dict if is_dataclass(kind) else origin or kind
    fits = type(value) is expected and (expected not in (int, float) or abs(value) < LARGEST)  # false for NaN
    if fits and expected is str:  # JSON may hold halves of a character, which no file takes
        fits = value.encode(errors="ignore").decode() == value
    if not fits:
        raise UserError(f"{name or 'it'} is not {TYPES[expected]}")
    if is_dataclass(kind):
        prefix, hints = f"{name}." if name else "", get_type_hints(kind)
        given = {field.name: None if field.default is MISSING else field.default for field in fields(kind)} | value
        return kind(**{key: checked(given[key], hint, prefix + key) for key, hint in hints.items()})
    if expected is list:
        return [checked(part, parts[0], f"{name}[{i}]") for i, part in enumerate(value)]
    if expected is dict:
        return {checked(key, str, f"{name}: a key"): checked(value[key], parts[1], f"{name}.{key}") for key in value}
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """Return once a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
