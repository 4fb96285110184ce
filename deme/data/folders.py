"""Folders of images: of which split and class each is, and what is known of it beside.

What is not read is named. Nothing here opens an image.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from posixpath import dirname, join, normpath, splitext
from typing import Any

from deme.data.files import File, image_suffixes, open_file
from deme.data.tables import read_lines, read_rows
from deme.errors import UserError, naming, one_line

SIDECAR = "sidecar"  # the column of the captions in NAME.txt beside NAME.png, one a line
WORDS = {  # in a folder's name that make it a split, as in `datasets`
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
EXAMPLES_SHOWN = 3  # names of files that are left out


@lru_cache(maxsize=100_000)
def split_word(name: str) -> str | None:
    """The split that a folder's name tells, as train2017 and val-set do; None: none, and ?: more than one."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    found = [split for split, of_split in WORDS.items() if words & set(of_split)]
    return "?" if len(found) > 1 else found[0] if found else None


def splits_of(folders: set[str]) -> dict[str, tuple[str, int]]:
    """The split of each folder of images, and how many of its parts lead to the split's own folder.

    Where the folders at one depth all tell a split, they are splits; else all images are train, whatever a class or a
    file is called. Names of files tell nothing.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    depths = range(max(map(len, parts.values())))
    for depth in depths:
        at_depth = {own[depth] if len(own) > depth else "" for own in parts.values()}
        words = {split_word(name) for name in at_depth}
        if None not in words and "?" not in words:
            return {folder: (split_word(own[depth]), depth + 1) for folder, own in parts.items()}
        told = sorted(name for name in at_depth if split_word(name) is not None)
        if len({split_word(name) for name in told}) > 1 or "?" in words:
            others = sorted({name or "images" for name in at_depth} - {*told})
            beside = f" beside {', '.join(others[:EXAMPLES_SHOWN])}" if others else ""
            remedy = "move what is no split elsewhere, or all into one folder train if they are classes"
            raise UserError(f"which images are of which split? It holds {', '.join(told)}{beside}; {remedy}")
    return dict.fromkeys(folders, ("train", 0))


def _classes(splits: dict[str, tuple[str, int]]) -> dict[str, int] | None:
    """The class of each folder of images: its own name's place among all; None where they tell none."""
    depths = {folder.count("/") for folder in splits}
    names = {folder: folder.rpartition("/")[2] for folder in splits}
    are_classes = all(folder and folder.count("/") >= depth for folder, (_, depth) in splits.items())
    places = {name: place for place, name in enumerate(sorted(set(names.values())))}
    if len(depths) > 1 or len(places) < 2 or not are_classes:
        return None
    return {folder: places[name] for folder, name in names.items()}


# --- rows


@dataclass(frozen=True)
class Rows:
    """The images of a folder, with what is known of them.

    Args:
        columns: name → one value per image; `images` of them hold paths.
        splits: of each image.
        left_out: files that are not read, in words.
    """

    columns: dict[str, list]
    images: list[str]
    splits: list[str]
    left_out: list[str]


def read_folder(files: list[File], caption_column: str | None) -> Rows:
    """The images among these files, in order of their names or in that of the metadata that lists them.

    Args:
        caption_column: that holds texts alone; `sidecar`: of those in NAME.txt beside NAME.png.
    """
    images = {file.name: file for file in files if file.is_image}
    metadata = [file for file in files if file.is_metadata]
    splits = splits_of({dirname(name) for name in images})
    if metadata:
        columns, image_columns = _listed(metadata, images, caption_column)
        names = columns["image"]
    else:
        names = list(images)
        columns, image_columns = {"image": names}, ["image"]
        classes = _classes(splits)
        if classes is not None:
            columns["label"] = [classes[dirname(name)] for name in names]
    read = {name for column in image_columns for name in columns[column]}
    unlisted = [name for name in images if name not in read]
    others = {file.name: file for file in files if not (file.is_image or file.is_metadata)}
    if caption_column == SIDECAR and SIDECAR not in columns:
        texts = {name: f"{splitext(name)[0]}.txt" for name in dict.fromkeys(names)}
        captions = {name: _sidecar(others[text]) for name, text in texts.items() if text in others}
        columns[SIDECAR] = [captions.get(name) for name in names]
        others = {name: file for name, file in others.items() if name not in {texts[image] for image in captions}}
    hidden = [name for name, file in others.items() if file.is_hidden]
    left_out = [
        *named("image", unlisted, f" that {metadata[0].name if metadata else ''} does not list"),
        *named("hidden image", [name for name in hidden if others[name].suffix in image_suffixes()]),
        *named("other file", [name for name, file in others.items() if not file.is_hidden]),
    ]
    of_images = [splits[dirname(name)][0] for name in names]
    paths = {key: [images[name].path for name in columns[key]] for key in image_columns}
    return Rows(columns | paths, image_columns, of_images, left_out)


def _listed(
    metadata: list[File], images: dict[str, File], caption_column: str | None
) -> tuple[dict[str, list], list[str]]:
    """What metadata files say, by column, and the columns that hold names of images."""
    rows: list[dict[str, Any]] = []
    files: dict[str, str] = {}  # of metadata, that list an image
    for file in metadata:
        with naming(file.name):
            if any(dirname(other.name) == dirname(file.name) for other in metadata if other != file):
                raise UserError("another metadata file stands beside it")
            for number, row in enumerate(_read_table(file)):
                with naming(f"row {number}"):
                    row = _with_names(row, dirname(file.name), images)
                    if files.setdefault(row["image"], file.name) != file.name:
                        raise UserError(f"lists {row['image']}, as {files[row['image']]} does")
                rows.append(row)
    if not rows:
        raise UserError(f"{metadata[0].name}: lists no images")
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    of_images = [key for key, values in columns.items() if all(isinstance(value, _Name) for value in values)]
    if any(file.suffix == ".csv" for file in metadata):
        texts = (*of_images, caption_column)
        columns = {key: values if key in texts else _numbers(values) for key, values in columns.items()}
    return columns, of_images


class _Name(str):
    """The name of a file that is one of the images."""


def _with_names(row: dict[str, Any], folder: str, images: dict[str, File]) -> dict[str, Any]:
    """A row of metadata: file_name becomes the column image, and any_file_name becomes any."""
    if "file_name" not in row:
        raise UserError("has no column file_name")
    found = {}
    for key, value in row.items():
        if key == "file_name" or key.endswith("_file_name"):
            renamed = key.removesuffix("file_name").removesuffix("_") or "image"
            if renamed in row:
                raise UserError(f"has a column {renamed} beside {key}, which is read as {renamed}; rename it")
            if value is None:
                raise UserError(f"{key} is missing")
            key = renamed
            value = _Name(normpath(join(folder, str(value).replace("\\", "/"))))
            if value not in images:
                raise UserError(f"names {value}, which is no image in this folder")
        found[key] = value
    return found


def _read_table(file: File) -> list[dict[str, Any]]:
    try:
        with open_file(file.path) as opened:
            content = opened.read()
    except OSError as error:
        raise UserError(one_line(error)) from None
    return read_rows(file.name, content)


def _numbers(texts: list[str | None]) -> list:
    """The texts of a csv column as whole numbers, or as numbers, where all are written as such."""
    for pattern, number in ((r"0|-?[1-9][0-9]*", int), (r"-?[0-9]+\.[0-9]*(e[+-]?[0-9]+)?", float)):
        if all(text is None or re.fullmatch(pattern, text) for text in texts):
            return [None if text is None else number(text) for text in texts]
    return texts


def _sidecar(file: File) -> list[str] | None:
    """The captions in a text file, one a line; None where there are none."""
    with naming(file.path):
        try:
            with open_file(file.path) as opened:
                lines = read_lines(opened.read())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read as UTF-8: {one_line(error)}") from None
    return [line.strip() for line in lines if line.strip()] or None


def named(kind: str, names: list[str], rest: str = "") -> list[str]:
    """How many files of a kind there are, with the first few names; nothing where there are none."""
    if not names:
        return []
    shown = ", ".join(sorted(names)[:EXAMPLES_SHOWN]) + ", …" * (len(names) > EXAMPLES_SHOWN)
    return [f"{len(names):,} {kind}{'s' * (len(names) > 1)}{rest} ({shown})"]
