"""Writing files and folders so that each appears whole or not at all."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import SafetensorError

from deme.errors import RunError, UserError, one_line

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TEMPORARY = ".writing-"  # prefix of unfinished siblings; remove_leftovers deletes those of a killed run
SUFFIX_LENGTH = 8  # random characters that tempfile appends
UMASK = os.umask(0o077)  # can be read only by setting it
os.umask(UMASK)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` where the block can't write.

    Raises:
        RunError: instead of the errors of a disk that is full, read-only or gone while the block writes.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be written: {one_line(error)}") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` when the block ends without an error.

    Raises:
        RunError: the disk is full, or the like.
    """
    with writing(path):
        remove_leftovers(path.parent, path.name)
        descriptor, name = tempfile.mkstemp(**_sibling(path))  # private: readable to its owner alone
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~UMASK)
            sync_to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_small_file(path: Path, content: bytes) -> None:
    """Like `atomic_file`, for thousands of small files that are checked before they are relied on.

    Nothing is forced to disk, and the folder is not searched for leftovers; both would take longer than the writing.

    Raises:
        RunError: the disk is full, or the like.
    """
    with writing(path):
        descriptor, temporary = tempfile.mkstemp(**_sibling(path))
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                os.fchmod(descriptor, 0o666 & ~UMASK)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path` to fill; it replaces `path` when the block ends without an error.

    Raises:
        RunError: the disk is full, or the like.
    """
    with writing(path):
        remove_leftovers(path.parent, path.name)
        temporary = Path(tempfile.mkdtemp(**_sibling(path)))  # private: mode 0700
        old: Path | None = None
        try:
            yield temporary
            for file in temporary.rglob("*"):
                sync_to_disk(file)
            temporary.chmod(0o777 & ~UMASK)
            sync_to_disk(temporary)
            if path.exists():  # os.replace can't replace a folder that holds something
                old = Path(tempfile.mkdtemp(**_sibling(path)))
                os.replace(path, old)
            os.replace(temporary, path)
            sync_to_disk(path.parent)
        finally:
            if old is not None and not path.exists():
                os.replace(old, path)
            shutil.rmtree(temporary, ignore_errors=True)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what a killed run left unfinished directly in `folder`: of the file or folder `name`, or (None) of all."""
    pattern = f"{TEMPORARY}*" if name is None else f"{TEMPORARY}{glob.escape(name)}-{'?' * SUFFIX_LENGTH}"
    for leftover in folder.glob(pattern):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def make_folder(path: Path, key: str) -> None:
    """Create a folder and its parents.

    Raises:
        UserError: it can't be created; names the configuration's `key`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot create the folder {path}: {one_line(error)}") from None


def to_yaml(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def write_yaml(path: Path, values: dict) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(to_yaml(values), encoding="utf-8")


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        UserError: missing, unreadable or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a YAML mapping")
    return values


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: missing, unreadable or not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path) -> dict[str, str]:
    """The name of a temporary sibling, for tempfile."""
    # no suffix: pytorch_fid takes every *.png, hidden ones too
    return {"prefix": f"{TEMPORARY}{path.name}-", "dir": str(path.parent)}
