"""Folders of images: the split, class and captions of each image. No image is opened; unread files are reported."""

import re
from dataclasses import dataclass
from functools import lru_cache
from posixpath import dirname, join, normpath, splitext
from typing import Any

from deme.data.files import File, image_suffixes, read_file, read_lines, read_rows
from deme.errors import UserError, naming, one_line

SIDECAR = "sidecar"  # the column of the captions in NAME.txt beside NAME.png, one a line
WORDS = {  # in a folder's name that make it a split, as in `datasets`
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NAMED_FILES = 3  # of those that are left out


@lru_cache(maxsize=100_000)
def split_word(name: str) -> str | None:
    """The split that a folder's name tells, as train2017 and val-set do; None: no split, "?": several."""
    words = set(re.split(r"[-._ 0-9]+", name.lower()))
    splits = [split for split, synonyms in WORDS.items() if words & set(synonyms)]
    return "?" if len(splits) > 1 else splits[0] if splits else None


def splits_of(folders: set[str]) -> dict[str, tuple[str, int]]:
    """The split of each folder of images, and the depth of its own folder in the split's.

    If all folders at one depth name a split, they are splits. Otherwise all images are train. File names do not count.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    for depth in range(max(map(len, parts.values()))):
        at_depth = {names[depth] if len(names) > depth else "" for names in parts.values()}
        words = {split_word(name) for name in at_depth}
        if None not in words and "?" not in words:
            return {folder: (split_word(names[depth]), depth + 1) for folder, names in parts.items()}
        if len(words - {None}) > 1 or "?" in words:
            told = sorted(name for name in at_depth if split_word(name) is not None)
            others = sorted({name or "images" for name in at_depth} - {*told})
            beside = f" beside {', '.join(others[:NAMED_FILES])}" if others else ""
            remedy = "move what is no split elsewhere, or all into one folder train if they are classes"
            raise UserError(f"which images are of which split? It holds {', '.join(told)}{beside}; {remedy}")
    return dict.fromkeys(folders, ("train", 0))


def _classes(splits: dict[str, tuple[str, int]]) -> dict[str, int] | None:
    """The class of each folder of images: the index of its name among all; None where the folders are no classes."""
    names = {folder: folder.rpartition("/")[2] for folder in splits}
    lie_in_splits = all(folder and folder.count("/") >= depth for folder, (_, depth) in splits.items())
    if len({folder.count("/") for folder in splits}) > 1 or len(set(names.values())) < 2 or not lie_in_splits:
        return None
    indices = {name: index for index, name in enumerate(sorted(set(names.values())))}
    return {folder: indices[name] for folder, name in names.items()}


# --- rows


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, with what is known of them."""

    columns: dict[str, list]  # one value per image
    image_columns: list[str]  # those of them that hold paths
    splits: list[str]  # of each image
    left_out: list[str]  # descriptions of the files that are not read


def read_folder(files: list[File], caption_column: str | None) -> ImageFolder:
    """The images among these files, by name or in the order of the metadata that lists them.

    Values of `caption_column` stay texts.
    """
    images = {file.name: file for file in files if file.is_image}
    metadata = [file for file in files if file.is_metadata]
    others = {file.name: file for file in files if not (file.is_image or file.is_metadata)}
    splits = splits_of({dirname(name) for name in images})
    if metadata:
        columns, image_columns = _read_metadata(metadata, images, caption_column)
    else:
        columns, image_columns = {"image": list(images)}, ["image"]
        classes = _classes(splits)
        if classes is not None:
            columns["label"] = [classes[dirname(name)] for name in images]
    names = columns["image"]
    read = {name for column in image_columns for name in columns[column]}
    if caption_column == SIDECAR and SIDECAR not in columns:
        texts = {name: f"{splitext(name)[0]}.txt" for name in dict.fromkeys(names)}
        captions = {name: _sidecar(others[text]) for name, text in texts.items() if text in others}
        columns[SIDECAR] = [captions.get(name) for name in names]
        read |= {*texts.values()}
    hidden = [file.name for file in others.values() if file.is_hidden and file.suffix in image_suffixes()]
    unread = [file.name for file in others.values() if not file.is_hidden and file.name not in read]
    unlisted = [name for name in images if name not in read]
    left_out = [
        *count_files("image", unlisted, f" that {metadata[0].name if metadata else ''} does not list"),
        *count_files("hidden image", hidden),
        *count_files("other file", unread),
    ]
    paths = {key: [images[name].path for name in columns[key]] for key in image_columns}
    return ImageFolder(columns | paths, image_columns, [splits[dirname(name)][0] for name in names], left_out)


def count_files(kind: str, names: list[str], rest: str = "") -> list[str]:
    """A description such as "2 hidden images (a.png, b.png)"; empty where there are none."""
    if not names:
        return []
    examples = ", ".join(sorted(names)[:NAMED_FILES]) + ", …" * (len(names) > NAMED_FILES)
    return [f"{len(names):,} {kind}{'s' * (len(names) > 1)}{rest} ({examples})"]


def _read_metadata(
    metadata: list[File], images: dict[str, File], caption_column: str | None
) -> tuple[dict[str, list], list[str]]:
    """The columns of metadata files, and which of them hold names of images."""
    rows: list[dict[str, Any]] = []
    listed_in: dict[str, str] = {}  # image → metadata file
    for file in metadata:
        with naming(file.name):
            if any(dirname(other.name) == dirname(file.name) for other in metadata if other != file):
                raise UserError("another metadata file stands beside it")
            try:
                content = read_file(file.path)
            except OSError as error:
                raise UserError(one_line(error)) from None
            for number, row in enumerate(read_rows(file.name, content)):
                with naming(f"row {number}"):
                    row = _with_image_names(row, dirname(file.name), images)
                    if listed_in.setdefault(row["image"], file.name) != file.name:
                        raise UserError(f"lists {row['image']}, as {listed_in[row['image']]} does")
                rows.append(row)
    if not rows:
        raise UserError(f"{metadata[0].name}: lists no images")
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    image_columns = [key for key, values in columns.items() if all(isinstance(value, _ImageName) for value in values)]
    if any(file.suffix == ".csv" for file in metadata):
        texts = (*image_columns, caption_column)
        columns = {key: values if key in texts else _numbers(values) for key, values in columns.items()}
    return columns, image_columns


class _ImageName(str):
    """The name of an image of the folder."""


def _with_image_names(row: dict[str, Any], folder: str, images: dict[str, File]) -> dict[str, Any]:
    """A row of metadata whose column file_name is called image, and mask_file_name mask, as `datasets` calls them."""
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
            name = _ImageName(normpath(join(folder, str(value).replace("\\", "/"))))
            if name not in images:
                raise UserError(f"names {name}, which is no image in this folder")
            renamed[column] = name
        else:
            renamed[key] = value
    return renamed


def _numbers(texts: list[str | None]) -> list:
    """A csv column as whole numbers or as numbers, if all its texts are written as such."""
    for pattern, number in ((r"0|-?[1-9][0-9]*", int), (r"-?[0-9]+\.[0-9]*(e[+-]?[0-9]+)?", float)):
        if all(text is None or re.fullmatch(pattern, text) for text in texts):
            return [None if text is None else number(text) for text in texts]
    return texts


def _sidecar(file: File) -> list[str] | None:
    """The captions in a text file, one a line; None where there are none."""
    try:
        lines = read_lines(read_file(file.path))
    except (OSError, ValueError) as error:
        raise UserError(f"{file.path}: cannot be read as UTF-8: {one_line(error)}") from None
    return [line.strip() for line in lines if line.strip()] or None
