"""A data set opened: its undecoded images with labels and captions."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from pyarrow import ArrowException
from tqdm import tqdm

from deme.config.sections import Data
from deme.data.decoding import ahead, available_threads, read_bytes
from deme.data.files import TABLES, File, holds_images, image_suffixes, list_files, stamp
from deme.data.folders import count_files, read_folder
from deme.data.prompts import DIGIT_CAPTIONS
from deme.errors import UserError, naming, one_line, shown

CSV_TEXTS = {"keep_default_na": False, "na_values": [""]}  # NA, null and None are texts; what is empty is missing


class Rows(Sequence):
    """One column of a data set, read row by row; datasets' own Column looks through all batches for each row."""

    def __init__(self, dataset: datasets.Dataset, column: str):
        self.dataset = dataset.select_columns([column])
        self.column = column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        return self.dataset[row][self.column]

    def __iter__(self) -> Iterator[Any]:
        return (row[self.column] for row in self.dataset)

    def fingerprint(self, version: str) -> str:
        """The rows' fingerprint by `datasets`, the version of their files, and the state of the images' own files."""
        import pyarrow as pa
        import pyarrow.compute as pc

        paths = []
        column = self.dataset.data.column(self.column)  # of all rows that were opened, also those left out since
        if pa.types.is_struct(column.type):
            in_files = pc.is_null(pc.struct_field(column, "bytes"))
            paths = [path for path in pc.struct_field(column, "path").filter(in_files).to_pylist() if path]
        own = self.dataset._fingerprint + version
        return f"{own}-{stamp(paths)}" if paths else own


@dataclass(frozen=True)
class Source:
    """An opened data set."""

    data: Data  # the settings, with the column of images that is read
    rows: Sequence  # undecoded images
    labels: Sequence | None  # one per row
    captions: list[list[str]] | None  # one or more per row
    fingerprint: Callable[[], str]  # changes when what is read may have changed

    def contents(self) -> str:
        """A SHA-256 of all images as they are stored; reads everything."""
        digest = hashlib.sha256()
        stored = ahead(_stored_bytes, self.rows, available_threads())
        for content in tqdm(stored, "hashing images", len(self.rows), mininterval=1, delay=2):
            digest.update(f"{len(content)}\n".encode() + content)
        return digest.hexdigest()


def _stored_bytes(image: Any) -> bytes:
    """Empty where the image can't be read, which decoding it reports."""
    try:
        content = read_bytes(image) if isinstance(image, dict) else image
        return content if isinstance(content, bytes) else np.asarray(content, dtype=np.uint8).tobytes()
    except Exception:  # an address fails with whatever its file system raises
        return b""


def open_source(data: Data) -> Source:
    """Open the data set; nothing is decoded."""
    if data.name == "digits":
        return _digits(data)
    with naming(f"data.name={data.name} (data.split={data.split})"):
        if os.path.isdir(data.name):
            files = list_files(Path(data.name))
            rows, version = _open_images(data, files) if holds_images(files) else _open_tables(data, files)
        else:
            with _loading():
                rows, version = datasets.load_dataset(data.name, split=data.split), ""
    data = _with_columns(data, rows)
    if data.skip_uncaptioned and data.caption_column is not None:
        captioned = [row for row, caption in enumerate(rows[data.caption_column]) if not _is_missing(caption)]
        if len(captioned) < len(rows):
            say_once(f"data.skip_uncaptioned: skipped {len(rows) - len(captioned):,} of {len(rows):,} images")
            rows = rows.select(captioned)
    if len(rows) == 0:
        raise UserError(f"data.name={data.name} (data.split={data.split}): holds no images")
    labels = None if data.label_column is None else rows[data.label_column]
    captions = None if data.caption_column is None else _captions(data, rows[data.caption_column])
    images = _undecoded(data, rows)
    return Source(data, images, labels, captions, lambda: images.fingerprint(version))


def _digits(data: Data) -> Source:
    """scikit-learn's 1,797 handwritten digits, which are part of the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # from values 0 … 16
    labels = None if data.label_column is None else digits.target.tolist()
    captions = None if data.caption_column is None else [[DIGIT_CAPTIONS[i]] for i in digits.target]
    return Source(data, [Image.fromarray(image) for image in pixels], labels, captions, lambda: "digits")


def _open_images(data: Data, files: list[File]) -> tuple[datasets.Dataset, str]:
    """The rows of a folder of images, and an empty version: the fingerprint covers their files."""
    folder = read_folder(files, data.caption_column)
    with _loading():
        rows = {split: [] for split in dict.fromkeys(folder.splits)}
        for row, split in enumerate(folder.splits):
            rows[split].append(row)
        counts = {split: len(numbers) for split, numbers in rows.items()}
        parts = datasets.ReadInstruction.from_spec(data.split).to_absolute(counts)
        chosen = [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]
        columns = {key: [values[row] for row in chosen] for key, values in folder.columns.items()}
        opened = datasets.Dataset.from_dict(columns)
        for key in folder.image_columns:
            opened = opened.cast_column(key, datasets.Image(decode=False))
    if folder.left_out:
        say_once(f"data.name={data.name}: {len(chosen):,} images are read; left out: {'; '.join(folder.left_out)}")
    return opened, ""


def _open_tables(data: Data, files: list[File]) -> tuple[datasets.Dataset, str]:
    """The rows of the tables in a folder, and the version of its files, which names the cache of `datasets`."""
    folder = Path(data.name).resolve()
    for pattern in ("[", "]", "*", "?", "::"):
        if pattern in str(folder):
            raise UserError(f"datasets would take the {pattern} in {folder} for a pattern; rename or link the folder")
    version = stamp(file.path for file in files)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{version[:16]}"
    with _loading():
        builder = datasets.load_dataset_builder(str(folder), cache_dir=str(cache))
        if hasattr(builder.config, "keep_default_na"):  # tables of csv files
            builder = datasets.load_dataset_builder(str(folder), cache_dir=str(cache), **CSV_TEXTS)
        builder.download_and_prepare()
        rows = builder.as_dataset(data.split)
    read = {os.path.realpath(str(file)) for split in builder.config.data_files.values() for file in split}
    suffixes = image_suffixes() | {*TABLES, ".arrow", ".tar", ".txt"}
    candidates = [file for file in files if file.suffix in suffixes and not file.is_hidden and "://" not in file.path]
    left_out = count_files("file", [file.name for file in candidates if os.path.realpath(file.path) not in read])
    if left_out:
        say_once(f"data.name={data.name}: {len(rows):,} rows are read; left out: {left_out[0]}")
    return rows, version


@contextmanager
def _loading() -> Iterator[None]:
    """Turn any error of `datasets` into a UserError with all its causes: its own message often omits them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        raise UserError(f"cannot be loaded: {', '.join(map(one_line, causes))}") from error


# --- columns


def _with_columns(data: Data, rows: datasets.Dataset) -> Data:
    """The settings with their columns checked; a missing column of images is replaced by the only one there is."""

    def holds_images(feature: Any) -> bool:
        is_struct = isinstance(feature, dict) and {*feature} <= {"bytes", "path"}
        return isinstance(feature, datasets.Image) or is_struct

    images = [column for column, feature in rows.features.items() if holds_images(feature)]
    if data.image_column not in rows.column_names and len(images) == 1:
        say_once(f"data.image_column={data.image_column}: {data.name} has none; {images[0]}, its only images, is read")
        data = replace(data, image_column=images[0])
    for key in ("image_column", "label_column", "caption_column"):
        column = getattr(data, key)
        if column is not None and column not in rows.column_names:
            raise UserError(f"data.{key}={column}: {data.name} has the columns {', '.join(rows.column_names)}")
    return data


def _undecoded(data: Data, rows: datasets.Dataset) -> Rows:
    """The column of images."""
    kind = _array_type(rows.features[data.image_column])
    if kind == "uint8":
        return Rows(rows, data.image_column)
    try:
        if kind is not None:
            raise TypeError(f"arrays of {kind}, whose range is not known; uint8 is read")
        return Rows(rows.cast_column(data.image_column, datasets.Image(decode=False)), data.image_column)
    except (TypeError, ValueError, ArrowException) as error:
        raise UserError(f"data.image_column={data.image_column}: holds no images: {one_line(error)}") from None


def _array_type(feature: Any) -> str | None:
    """The type of the numbers in a column of arrays or nested lists; None for other columns."""
    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return feature.dtype
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
        depth += 1
    return feature.dtype if depth > 0 and isinstance(feature, datasets.Value) else None


def _captions(data: Data, column: Iterable) -> list[list[str]]:
    """The captions of each row: a text, or a list of them."""
    rows = [[captions] if isinstance(captions, str) else captions for captions in column]
    for row, captions in enumerate(rows):
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            given = f"data.caption_column={data.caption_column}: row {row} has the caption {shown(captions)}"
            raise UserError(given if captions else f"{given}; data.skip_uncaptioned=true leaves such rows out")
    return rows


def _is_missing(caption: Any) -> bool:
    """True if a row has no caption: None, NaN, an empty text, or an empty list."""
    return caption is None or caption != caption or not (caption.strip() if isinstance(caption, str) else caption)


@cache
def say_once(line: str) -> None:
    """Print a line once, in one of the processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        print(line)
