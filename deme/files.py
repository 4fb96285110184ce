"""Writing files and folders so that each appears whole or not at all."""

import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from deme.config import UserError

TEMPORARY = ".writing-"  # prefix of unfinished siblings; remove_leftovers deletes those of a killed run
SUFFIX_LENGTH = 8


@contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` when the block ends without an error.

    Args:
        sync: force the content to disk before the file gets its name (off for images, which a resumed run checks).
    """
    if sync:
        remove_leftovers(path.parent, path.name)
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path` to fill; it replaces `path` when the block ends without an error."""
    remove_leftovers(path.parent, path.name)
    temporary, old = _temporary_sibling(path), _temporary_sibling(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        if path.exists():  # os.replace can't replace a folder that holds something
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
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
        raise UserError(f"{key}={path}: cannot create this folder: {error.strerror}") from None


def to_yaml(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_yaml(path: Path, values: dict) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(to_yaml(values), encoding="utf-8")


def read_yaml(path: Path) -> dict:
    """
    Raises:
        UserError: the file does not hold a YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a YAML mapping")
    return values


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_sibling(path: Path) -> Path:
    # no suffix of its own: pytorch_fid takes every *.png, hidden ones too
    return path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:SUFFIX_LENGTH]}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
