"""A data set opened: its rows, none of them decoded, with labels and captions."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from deme.config.sections import Data
from deme.data.ahead import ahead, available_threads
from deme.data.files import File, holds_images, image_suffixes, list_files, open_file, stamp
from deme.data.folders import named, read_folder
from deme.data.prompts import DIGIT_CAPTIONS
from deme.data.tables import TABLES
from deme.errors import UserError, naming, one_line, shown

if TYPE_CHECKING:
    import datasets

CSV_TEXTS = {"keep_default_na": False, "na_values": [""]}  # NA, null and None are texts; what is empty is missing


class Rows(Sequence):
    """One column of a data set, read row by row; datasets' own Column looks through all batches for each row."""

    def __init__(self, dataset: "datasets.Dataset", column: str, holds_arrays: bool = False):
        self.dataset = dataset.select_columns([column])
        self.column = column
        self.holds_arrays = holds_arrays  # of uint8

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        return self._content(self.dataset[row])

    def __iter__(self) -> Iterator[Any]:
        return map(self._content, self.dataset)

    def _content(self, row: dict) -> Any:
        content = row[self.column]
        return np.array(content, dtype=np.uint8) if self.holds_arrays and content is not None else content

    def paths(self) -> list[str]:
        """Of the images that lie in files of their own."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.dataset.data.column(self.column)  # of all rows that were opened, also those left out since
        if not pa.types.is_struct(column.type):
            return []
        paths = pc.struct_field(column, "path").filter(pc.is_null(pc.struct_field(column, "bytes")))
        return [path for path in paths.to_pylist() if path]


@dataclass(frozen=True)
class Source:
    """A data set as it was opened."""

    rows: Sequence  # of undecoded images
    labels: list | None  # one per row
    captions: list[list[str]] | None  # one or more per row
    image_column: str  # that they were read from
    fingerprint: Callable[[], str]  # that changes when what is read may have changed

    def contents(self) -> str:
        """A SHA-256 of all images, as they lie in files and tables: reads everything."""
        digest = hashlib.sha256()
        read = ahead(_bytes_of, self.rows, available_threads())
        for content in tqdm(read, "hashing images", len(self.rows), mininterval=1, delay=2):
            digest.update(f"{len(content)}\n".encode() + content)
        return digest.hexdigest()


def _bytes_of(image: Any) -> bytes:
    if isinstance(image, dict):
        return _file_content(image)
    return b"" if image is None else np.asarray(image).tobytes()


def _file_content(image: dict) -> bytes:
    """The bytes of an undecoded image; none where there are none, as whoever decodes it says."""
    if image["bytes"] is not None or not image["path"]:
        return image["bytes"] or b""
    try:
        with open_file(image["path"]) as file:
            return file.read()
    except Exception:  # at an address it may be whatever the way there leads to
        return b""


def open_source(data: Data) -> Source:
    """Open the data set; nothing is decoded."""
    if data.name == "digits":
        from sklearn.datasets import load_digits  # 1,797 handwritten digits inside the package, values 0 … 16

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        labels = None if data.label_column is None else digits.target.tolist()
        captions = None if data.caption_column is None else [[DIGIT_CAPTIONS[i]] for i in digits.target]
        images = [Image.fromarray(image) for image in images]
        return Source(images, labels, captions, data.image_column, lambda: "digits")

    data, rows, version = open_rows(data)
    if data.skip_uncaptioned and data.caption_column is not None:
        kept = [row for row, caption in enumerate(rows[data.caption_column]) if not _is_missing(caption)]
        if len(kept) < len(rows):
            say_once(f"data.skip_uncaptioned: skipped {len(rows) - len(kept):,} of {len(rows):,} images")
            rows = rows.select(kept)
    if len(rows) == 0:
        raise UserError(f"data.name={data.name} (data.split={data.split}): holds no images")
    labels = None if data.label_column is None else rows[data.label_column]
    captions = None if data.caption_column is None else _captions(data, rows[data.caption_column])
    images = _undecoded(data, rows)

    def fingerprint() -> str:
        own = images.dataset._fingerprint + version
        paths = images.paths()
        return f"{own}-{stamp(paths)}" if paths else own

    return Source(images, labels, captions, data.image_column, fingerprint)


def open_rows(data: Data) -> tuple[Data, "datasets.Dataset", str]:
    """The rows of a data set, its columns looked at; the settings with the column of images that is really there; and
    what tells this state of its files from others."""
    name = f"data.name={data.name} (data.split={data.split})"
    if os.path.isdir(data.name):
        with naming(name):
            files = list_files(Path(data.name))
            rows, version = _open_images(data, files) if holds_images(files) else _open_tables(data, files)
    else:
        with naming(name), _loading():
            import datasets

            rows, version = datasets.load_dataset(data.name, split=data.split), ""
    images = [column for column, feature in rows.features.items() if _holds_images(feature)]
    if data.image_column not in rows.column_names and len(images) == 1:
        say_once(f"data.image_column={data.image_column}: {data.name} has none; {images[0]}, its only images, is read")
        data = replace(data, image_column=images[0])
    for key in ("image_column", "label_column", "caption_column"):
        column = getattr(data, key)
        if column is not None and column not in rows.column_names:
            raise UserError(f"data.{key}={column}: {data.name} has the columns {', '.join(rows.column_names)}")
    return data, rows, version


def _open_images(data: Data, files: list[File]) -> tuple["datasets.Dataset", str]:
    """The images of a folder."""
    import datasets

    found = read_folder(files, data.caption_column)
    with _loading():
        rows = {split: [] for split in dict.fromkeys(found.splits)}
        for row, split in enumerate(found.splits):
            rows[split].append(row)
        counts = {split: len(own) for split, own in rows.items()}
        parts = datasets.ReadInstruction.from_spec(data.split).to_absolute(counts)
        chosen = [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]
        columns = {key: [values[row] for row in chosen] for key, values in found.columns.items()}
        opened = datasets.Dataset.from_dict(columns)
        for key in found.images:
            opened = opened.cast_column(key, datasets.Image(decode=False))
    if found.left_out:
        say_once(f"data.name={data.name}: {len(chosen):,} images are read; left out: {'; '.join(found.left_out)}")
    return opened, ""


def _open_tables(data: Data, files: list[File]) -> tuple["datasets.Dataset", str]:
    """The rows of the tables in a folder, as `datasets` reads them: once, until one of its files changes."""
    import datasets

    folder = Path(data.name).resolve()
    special = [character for character in ("[", "]", "*", "?", "::") if character in str(folder)]
    if special:
        raise UserError(f"datasets would take the {special[0]} in {folder} for a pattern; rename or link the folder")
    version = stamp(file.path for file in files)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{version[:16]}"
    with _loading():
        builder = datasets.load_dataset_builder(str(folder), cache_dir=str(cache))
        if hasattr(builder.config, "keep_default_na"):  # tables of csv files
            builder = datasets.load_dataset_builder(str(folder), cache_dir=str(cache), **CSV_TEXTS)
        builder.download_and_prepare()
        rows = builder.as_dataset(data.split)
    read = {os.path.realpath(str(file)) for own in builder.config.data_files.values() for file in own}
    suffixes = image_suffixes() | {*TABLES, ".arrow", ".tar", ".txt"}
    own = [file for file in files if file.suffix in suffixes and not file.is_hidden and "://" not in file.path]
    left_out = [file.name for file in own if os.path.realpath(file.path) not in read]
    if left_out:
        say_once(f"data.name={data.name}: {len(rows):,} rows are read; left out: {named('file', left_out)[0]}")
    return rows, version


@contextmanager
def _loading() -> Iterator[None]:
    """Name what `datasets` can't load."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        causes = [error]  # datasets says only "an error occurred": what occurred is in the cause
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        raise UserError(f"cannot be loaded: {': '.join(map(one_line, causes))}") from error


# --- columns


def _holds_images(feature: Any) -> bool:
    """Whether a column's feature is that of images: datasets' own, or a structure of `bytes`, `path` or both."""
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {*feature} <= {"bytes", "path"})


def _undecoded(data: Data, rows: "datasets.Dataset") -> Rows:
    """The column of images."""
    import datasets
    from pyarrow import ArrowException

    kind = _array_type(rows.features[data.image_column])
    if kind == "uint8":
        return Rows(rows, data.image_column, holds_arrays=True)
    try:
        if kind is not None:
            raise TypeError(f"arrays of {kind}, whose range is not known; uint8 is read")
        return Rows(rows.cast_column(data.image_column, datasets.Image(decode=False)), data.image_column)
    except (TypeError, ValueError, ArrowException) as error:
        raise UserError(f"data.image_column={data.image_column}: holds no images: {one_line(error)}") from None


def _array_type(feature: Any) -> str | None:
    """The type of the numbers in a column of arrays; None: it is no such column."""
    import datasets

    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return feature.dtype
    is_list = False
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
        is_list = True
    return feature.dtype if is_list and isinstance(feature, datasets.Value) else None


def _captions(data: Data, column: Iterable) -> list[list[str]]:
    """The captions of each row: a text, or a list of them."""
    found = [[row] if isinstance(row, str) else row for row in column]
    for row, captions in enumerate(found):
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            given = f"data.caption_column={data.caption_column}: row {row} has the caption {shown(captions)}"
            raise UserError(given if captions else f"{given}; data.skip_uncaptioned=true leaves such rows out")
    return found


def _is_missing(caption: Any) -> bool:
    """Whether a row has no caption: nothing, an empty text, or a list of none."""
    return caption is None or caption != caption or not (caption.strip() if isinstance(caption, str) else caption)


@cache
def say_once(line: str) -> None:
    """Print a line, once and by one process of those that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        print(line)
