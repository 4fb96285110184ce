"""Files of a folder and of the zip archives in it, and the tables that hold captions and prompts."""

import csv
import hashlib
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path, PurePath
from posixpath import splitext
from typing import Any

from deme.errors import UserError, naming, one_line

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")  # that `read_rows` reads
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
DATA_SETS = (".arrow", ".parquet", ".tar")  # files that hold whole data sets
NO_IMAGES = (".h5", ".hdf", ".mpg", ".mpeg")  # suffixes of formats that PIL registers but cannot decode


@dataclass(frozen=True)
class File:
    """A file of a folder, or of a zip archive in it."""

    name: str  # relative to the folder, with /; archives count as unpacked in place
    path: str  # as `read_file` takes it

    @property
    def suffix(self) -> str:
        """In lower case, with the dot."""
        return splitext(self.name)[1].lower()

    @property
    def is_hidden(self) -> bool:
        """True for .name, and for files in a folder .name or __name."""
        *folders, name = self.name.split("/")
        return name.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)

    @property
    def is_image(self) -> bool:
        """True if PIL reads files of this suffix."""
        return self.suffix in image_suffixes() and not self.is_hidden

    @property
    def is_metadata(self) -> bool:
        """True if the file describes the images next to it and below."""
        return self.name.rpartition("/")[2].lower() in METADATA and not self.is_hidden


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that PIL reads, in lower case."""
    from PIL import Image

    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in Image.OPEN) - {*NO_IMAGES}


def read_file(path: str) -> bytes:
    """The content of a local file, or of an address that `datasets` opens such as zip://a.png::b.zip."""
    if "://" not in path or os.path.isabs(path):
        return Path(path).read_bytes()
    member, _, archive = path.removeprefix("zip://").partition("::")
    if path.startswith("zip://") and os.path.isfile(archive):  # datasets would read its table of contents each time
        return _archive(archive, os.stat(archive).st_ctime_ns).read(member)
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


@lru_cache(maxsize=16)
def _archive(path: str, _: int) -> zipfile.ZipFile:
    """An archive that stays open; several threads may read it at once."""
    return zipfile.ZipFile(path)


def list_files(folder: Path) -> list[File]:
    """All files of a folder, of the folders that links lead to, and of zip archives, sorted by name."""
    files = sorted(_walk(os.path.realpath(folder), "", ()), key=lambda file: file.name)
    for one, other in pairwise(files):
        if one.name == other.name:
            raise UserError(f"holds {one.name} twice, in archives or beside them")
    return files


def _walk(folder: str, prefix: str, parents: tuple[str, ...]) -> Iterator[File]:
    """The files below a folder, their names after `prefix`; `parents` (links resolved) show where a link loops."""
    real = os.path.realpath(folder)
    if real in parents:
        raise UserError(f"{prefix}: a link that leads back to {real}")
    try:
        with os.scandir(folder) as entries:
            entries = list(entries)
    except OSError as error:
        raise UserError(f"{folder}: {one_line(error)}") from None
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*parents, real))
        elif entry.name.lower().endswith(".zip") and not entry.name.startswith("."):
            yield from _members(entry.path, prefix)
        elif entry.is_file() or entry.is_symlink():  # a broken link is reported when it is opened
            yield File(prefix + entry.name, entry.path)


def _members(archive: str, prefix: str) -> Iterator[File]:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [member.filename for member in opened.infolist() if not member.is_dir()]
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise UserError(f"{archive}: cannot be read: {one_line(error)}") from None
    for name in names:
        if "::" in f"{name}{archive}":
            raise UserError(f"{archive}: {name} cannot be read from an archive, as :: stands in the names")
        yield File(prefix + name, f"zip://{name}::{archive}")


def holds_images(files: list[File]) -> bool:
    """True for a folder of images, False for one of tables with a few pictures beside them.

    Tables named after images, such as 0.json beside 0.png, do not count.
    """
    images = [file for file in files if file.is_image]
    stems = {splitext(file.name)[0] for file in images}
    others = [file for file in files if not (file.is_metadata or file.is_hidden)]
    tables = [file for file in others if file.suffix in DATA_SETS + TABLES and splitext(file.name)[0] not in stems]
    data_sets = [file for file in tables if file.suffix in DATA_SETS]
    if len(images) > len(data_sets) > 0:
        names = f"{data_sets[0].name} beside {images[0].name}"
        raise UserError(f"holds {names}: which are the data? Name the folder of one of them, or move the others")
    most = max(Counter(file.suffix for file in tables).values(), default=0)
    return len(images) > 0 and not data_sets and len(images) >= most


def stamp(paths: Iterable[str]) -> str:
    """A SHA-256 of the files' sizes, inodes and change times: it changes when one of them may have changed.

    Programs that keep time stamps can't set the last two. What an address leads to is assumed not to change.
    """
    digest = hashlib.sha256()
    known = {}
    for path in paths:
        file = path if os.path.isabs(path) else path.rpartition("::")[2].removeprefix("file://")
        if file not in known:
            try:
                status = os.stat(file)
                known[file] = f"{status.st_size} {status.st_ino} {status.st_ctime_ns}"
            except (OSError, ValueError):
                known[file] = "-"
        digest.update(f"{path}\0{known[file]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# --- tables


def read_rows(name: str, content: bytes, text_column: str = "") -> list[dict[str, Any]]:
    """The rows of a table, each a dictionary by column; the suffix of `name`, in any case, tells the format.

    All values of a csv or tsv file are texts, NA and null too; an empty one is None. A text in a json list is a row
    with `text_column` alone.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix not in TABLES:
        raise UserError(f"the suffix {suffix or '(none)'} is of no table; {', '.join(TABLES)} are read")
    try:
        rows = _read_table(suffix, content)
    except UserError:
        raise
    except Exception as error:  # csv, json and pyarrow raise many types for a damaged file
        raise UserError(f"cannot be read: {one_line(error)}") from None
    rows = [{text_column: row} if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {number} is not an object")
    return rows


def _read_table(suffix: str, content: bytes) -> list[Any]:
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    if suffix in (".csv", ".tsv"):
        return _read_csv(content, "," if suffix == ".csv" else "\t")
    if suffix == ".json":
        rows = json.loads(content.decode("utf-8-sig"))
        return rows if isinstance(rows, list) else [rows]
    rows = []
    for number, line in enumerate(read_lines(content), start=1):
        with naming(f"line {number}"):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise UserError(one_line(error)) from None
    return rows


def _read_csv(content: bytes, delimiter: str) -> list[dict[str, Any]]:
    csv.field_size_limit(len(content) + 1)  # Python's own limit is 131,072 characters
    lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    rows = []
    for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter, strict=True)):
        if None in row:
            raise UserError(f"row {number} has more values than the first line has columns; texts may need quotes")
        rows.append({key: value or None for key, value in row.items()})
    return rows


def read_lines(content: bytes) -> list[str]:
    """The lines of a text file; str.splitlines would also split at what a prompt may hold, such as U+2028."""
    text = content.decode("utf-8-sig").removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []
