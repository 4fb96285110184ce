"""Folders of images: files, zip archives and metadata; each image's split, class and captions. And tables of texts."""

import csv
import hashlib
import io
import json
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path, PurePath
from posixpath import dirname, join, normpath, splitext
from typing import Any

from PIL import Image

from deme.errors import UserError, blaming, naming

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")  # that `read_rows` reads
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NO_IMAGES = (".h5", ".hdf", ".mpg", ".mpeg")  # suffixes of formats that PIL registers but cannot decode
SIDECAR = "sidecar"  # the column of the captions in NAME.txt beside NAME.png, one a line
SPLITS = {  # word in a folder's name → the split that it makes the folder, as in `datasets`
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NAMED_FILES = 3  # of those that are left out


@dataclass(frozen=True)
class File:
    """A file of a folder, or of a zip archive in it."""

    name: str  # relative to the folder, with /; archives count as unpacked in place
    path: str  # as `read_file` takes it

    @property
    def suffix(self) -> str:
        """In lower case, with the dot."""
        return splitext(self.name)[1].lower()

    @cached_property
    def kind(self) -> str:
        """Either hidden (.name, or in a folder .name or __name), metadata, image (by its suffix) or other."""
        *folders, name = self.name.split("/")
        if name.startswith(".") or any(folder.startswith((".", "__")) for folder in folders):
            return "hidden"
        if name.lower() in METADATA:
            return "metadata"
        return "image" if self.suffix in image_suffixes() else "other"


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that PIL reads, in lower case."""
    formats = Image.registered_extensions()  # by suffix
    return frozenset(suffix for suffix in formats if formats[suffix] in Image.OPEN) - {*NO_IMAGES}


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
    with blaming(folder), os.scandir(folder) as entries:
        entries = list(entries)
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*parents, real))
        elif entry.name.lower().endswith(".zip") and not entry.name.startswith("."):
            with blaming(f"{entry.path}: cannot be read"), zipfile.ZipFile(entry.path) as archive:
                names = [member.filename for member in archive.infolist() if not member.is_dir()]
                for name in names:
                    if "::" in f"{name}\n{entry.path}":
                        raise UserError(f"{name} cannot be read from an archive, as :: stands in the names")
            yield from (File(prefix + name, f"zip://{name}::{entry.path}") for name in names)
        elif entry.is_file() or entry.is_symlink():  # a broken link is reported when it is opened
            yield File(prefix + entry.name, entry.path)


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


def version_of(paths: Iterable[str]) -> str:
    """A SHA-256 of the files' sizes, inodes and change times: it changes when one of them may have changed.

    Programs that keep time stamps can't set the last two. What an address leads to is assumed not to change.
    """

    @cache  # an archive holds many images
    def state(file: str) -> str:
        with suppress(OSError, ValueError):
            status = os.stat(file)
            return f"{status.st_size} {status.st_ino} {status.st_ctime_ns}"
        return "-"

    digest = hashlib.sha256()
    for path in paths:
        file = path if os.path.isabs(path) else path.rpartition("::")[2].removeprefix("file://")
        digest.update(f"{path}\0{state(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_rows(name: str, content: bytes, text_column: str = "") -> list[dict[str, Any]]:
    """The rows of a table, each a dictionary by column; the suffix of `name`, in any case, tells the format.

    All values of a csv or tsv file are texts, NA and null too; an empty one is None. A line of a text file and a text
    in a json list are rows with `text_column` alone. A damaged file raises exceptions of many types.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix in ("", ".txt"):
        rows = read_lines(content)
    elif suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    elif suffix in (".csv", ".tsv"):
        csv.field_size_limit(len(content) + 1)  # Python's own limit is 131,072 characters
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
        table = csv.DictReader(lines, delimiter="," if suffix == ".csv" else "\t", strict=True)
        rows = [{key: value or None for key, value in row.items()} for row in table]
    elif suffix == ".json":
        rows = json.loads(content.decode("utf-8-sig"))
        rows = rows if isinstance(rows, list) else [rows]
    elif suffix not in TABLES:
        raise UserError(f"the suffix {suffix} is of no table; {', '.join(TABLES)} are read")
    else:
        rows = []
        for number, line in enumerate(read_lines(content), start=1):
            with blaming(f"line {number}"):
                rows += [json.loads(line)] if line.strip() else []
    rows = [{text_column: row} if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {number} is not an object")
        if None in row:  # where csv.DictReader puts what is too much
            raise UserError(f"row {number} has more values than the first line has columns; texts may need quotes")
    return rows


def read_lines(content: bytes) -> list[str]:
    """The lines of a text file; str.splitlines would also split at what a prompt may hold, such as U+2028."""
    text = content.decode("utf-8-sig").removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def read_folder(
    files: list[File], caption_column: str | None
) -> tuple[dict[str, list], list[str], list[str] | None, str]:
    """The images among these files, by name or in the order of the metadata that lists them.

    Returns columns, with a value for each image (values of `caption_column` stay texts, images are files); the split
    of each image; the names of the classes that the column label counts, None where folders are no classes; and a
    description of the files that are left out.
    """
    kinds: dict[str, dict[str, File]] = defaultdict(dict)  # kind → name → file
    for file in files:
        kinds[file.kind][file.name] = file
    images, metadata, others = kinds["image"], [*kinds["metadata"].values()], kinds["other"]
    splits, classes = layout_of({dirname(name) for name in images})
    names = sorted({*classes.values()}) if classes and not metadata else None
    if metadata:
        rows = _read_metadata(metadata, images)
    elif classes:
        places = {name: place for place, name in enumerate(names)}
        rows = [{"image": file, "label": places[classes[dirname(name)]]} for name, file in images.items()]
    else:
        rows = [{"image": file} for file in images.values()]
    read = {value.name for row in rows for value in row.values() if isinstance(value, File)}
    if caption_column == SIDECAR and SIDECAR not in rows[0]:
        for row in rows:
            text = others.get(f"{splitext(row['image'].name)[0]}.txt")
            row[SIDECAR] = None
            if text is not None:
                read.add(text.name)
                with blaming(f"{text.path}: cannot be read as UTF-8"):
                    lines = read_lines(read_file(text.path))
                row[SIDECAR] = [line.strip() for line in lines if line.strip()] or None

    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    if any(file.suffix == ".csv" for file in metadata):
        columns |= {key: _numbers(values) for key, values in columns.items() if key != caption_column}
    hidden = [name for name, file in kinds["hidden"].items() if file.suffix in image_suffixes()]
    left_out = (
        describe("image", images.keys() - read, f" that {metadata[0].name if metadata else ''} does not list"),
        describe("hidden image", hidden),
        describe("other file", others.keys() - read),
    )
    return columns, [splits[dirname(row["image"].name)] for row in rows], names, "; ".join(filter(None, left_out))


def layout_of(folders: set[str]) -> tuple[dict[str, str], dict[str, str] | None]:
    """The split of each folder of images, and its class: its name. None: the folders are no classes.

    If all folders at one depth name a split, they are splits. Otherwise all images are train. File names do not count.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    splits, depth_of_classes = dict.fromkeys(folders, "train"), 1
    for depth in range(max(map(len, parts.values()))):
        names = {folder: path[depth] if len(path) > depth else "" for folder, path in parts.items()}
        words = {name: re.split(r"[-._ 0-9]+", name.lower()) for name in names.values()}  # as in train2017, val-set
        told = {name: {SPLITS[word] for word in own if word in SPLITS} for name, own in words.items()}
        if all(len(own) == 1 for own in told.values()):
            splits, depth_of_classes = {folder: min(told[name]) for folder, name in names.items()}, depth + 2
            break
        if len(set().union(*told.values())) > 1:
            others = sorted(name or "images" for name, own in told.items() if not own)
            beside = f" beside {', '.join(others[:NAMED_FILES])}" if others else ""
            remedy = "move what is no split elsewhere, or all into one folder train if they are classes"
            held = ", ".join(sorted(filter(told.get, told)))
            raise UserError(f"which images are of which split? It holds {held}{beside}; {remedy}")
    depths = {len(path) for path in parts.values()}
    classes = {path[-1] for path in parts.values() if path}
    if len(depths) > 1 or max(depths) < depth_of_classes or len(classes) < 2:
        return splits, None
    return splits, {folder: path[-1] for folder, path in parts.items()}


def describe(kind: str, names: Iterable[str], rest: str = "") -> str:
    """A description such as "2 hidden images (a.png, b.png)"; empty where there are none."""
    names = sorted(names)
    examples = ", ".join(names[:NAMED_FILES]) + ", …" * (len(names) > NAMED_FILES)
    return f"{len(names):,} {kind}{'s' * (len(names) > 1)}{rest} ({examples})" if names else ""


def _read_metadata(metadata: list[File], images: dict[str, File]) -> list[dict[str, Any]]:
    """The rows of metadata files; file_name is called image, and mask_file_name mask, as `datasets` calls them."""
    rows = []
    listed_in: dict[str, str] = {}  # image → metadata file
    for file in metadata:
        folder = dirname(file.name)
        with blaming(file.name):
            if any(dirname(other.name) == folder for other in metadata if other != file):
                raise UserError("another metadata file stands beside it")
            for number, row in enumerate(read_rows(file.name, read_file(file.path))):
                with naming(f"row {number}"):
                    rows.append(_with_images(row, folder, images))
                    image = rows[-1]["image"].name
                    if listed_in.setdefault(image, file.name) != file.name:
                        raise UserError(f"lists {image}, as {listed_in[image]} does")
    if not rows:
        raise UserError(f"{metadata[0].name}: lists no images")
    return rows


def _with_images(row: dict[str, Any], folder: str, images: dict[str, File]) -> dict[str, Any]:
    """A row of the metadata of a folder, with files in place of their names."""
    if "file_name" not in row:
        raise UserError("has no column file_name")
    renamed = {}
    for key, value in row.items():
        if key == "file_name" or key.endswith("_file_name"):
            column = key.removesuffix("file_name").removesuffix("_") or "image"
            if column in row:
                raise UserError(f"has a column {column} beside {key}, which is read as {column}; rename it")
            if value is None:
                raise UserError(f"{key} is missing")
            name = normpath(join(folder, str(value).replace("\\", "/")))
            if name not in images:
                raise UserError(f"names {name}, which is no image in this folder")
            renamed[column] = images[name]
        else:
            renamed[key] = value
    return renamed


def _numbers(texts: list) -> list:
    """A csv column as whole numbers or as numbers, if all its texts are written as such."""
    for pattern, number in ((r"0|-?[1-9][0-9]*", int), (r"-?[0-9]+\.[0-9]*(e[+-]?[0-9]+)?", float)):
        if all(text is None or re.fullmatch(pattern, str(text)) for text in texts):
            return [None if text is None else number(text) for text in texts]
    return texts
