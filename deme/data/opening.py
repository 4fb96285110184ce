"""Opens a data set: its undecoded images with labels and captions, hashes of them, and which of them a step sees."""

import hashlib
import os
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from posixpath import splitext
from typing import Any

import datasets
import numpy as np
from tqdm import tqdm

from deme.config.sections import Data
from deme.data.decoding import Source, ahead, available_threads, decoding_threads, read_bytes
from deme.data.files import TABLES, File, describe, image_suffixes, list_files, read_folder, version_of
from deme.errors import UserError, blaming, naming, one_line, shown
from deme.job.files import read_json
from deme.job.rank import say_once
from deme.job.records import CONTENTS, DATA, digest_of, made_once

Stream = tuple[int, ...]  # the experiment's seed, then numbers that tell its runs apart
PERMUTATION, MICRO_BATCH, HELD_OUT_CHOICE = 0, 1, 2  # purposes of a generator
DATA_SETS = (".arrow", ".parquet", ".tar")  # files that hold whole data sets
FINGERPRINTED = 1_000  # images
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = tuple(f"a handwritten {name}" for name in DIGITS)


def open_source(data: Data) -> Source:
    """Open the data set; nothing is decoded."""
    with naming(f"data.name={data.name} (data.split={data.split})"):
        try:
            rows, version, names = _open(data)
        except UserError:
            raise
        except Exception as error:  # the message of `datasets` often omits the causes
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            raise UserError(f"cannot be loaded: {', '.join(map(one_line, causes))}") from error
    data = _with_columns(data, rows)
    captions = None
    if data.caption_column is not None:
        rows, captions = _captioned(data, rows)
    if len(rows) == 0:
        raise UserError(f"data.name={data.name} (data.split={data.split}): holds no images")
    labels = None
    if data.label_column is not None:
        labels = rows[data.label_column]
        names = names or getattr(rows.features[data.label_column], "names", None)
        if names and all(name.isdecimal() for name in names):
            known = range(len(names))  # what has no class may be None or -1
            labels, names = [int(names[label]) if label in known else label for label in labels], None
    return Source(data, _undecoded(data, rows), labels, captions, version, names)


def _open(data: Data) -> tuple[datasets.Dataset, str, list[str] | None]:
    """All columns of a data set, the version of the files that they were read from, and the names of its classes.

    The last two only where `datasets` does not have them.
    """
    if data.name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()  # 1,797, in scikit-learn's package
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # from values 0 … 16
        captions = [DIGIT_CAPTIONS[i] for i in digits.target]
        return datasets.Dataset.from_dict({"image": pixels, "label": digits.target, "caption": captions}), "", None
    if os.path.isfile(data.name):
        raise UserError("a file; name the folder that it lies in")
    if not os.path.isdir(data.name):
        return datasets.load_dataset(data.name, split=data.split), "", None
    files = list_files(Path(data.name))
    return _open_images(data, files) if _holds_images(files) else (*_open_tables(data, files), None)


def _holds_images(files: list[File]) -> bool:
    """True for a folder of images, False for tables with a few pictures; 0.json beside 0.png does not count."""
    images = [file for file in files if file.kind == "image"]
    stems = {splitext(file.name)[0] for file in images}
    others = [file for file in files if file.kind == "other" and splitext(file.name)[0] not in stems]
    data_sets = [file for file in others if file.suffix in DATA_SETS]
    if len(images) > len(data_sets) > 0:
        names = f"{data_sets[0].name} beside {images[0].name}"
        raise UserError(f"holds {names}: which are the data? Name the folder of one of them, or move the others")
    tables = Counter(file.suffix for file in others if file.suffix in TABLES)
    return len(images) > 0 and not data_sets and len(images) >= max(tables.values(), default=0)


def _open_images(data: Data, files: list[File]) -> tuple[datasets.Dataset, str, list[str] | None]:
    """The rows of a folder of images, and the names of its classes: a column of them would have another fingerprint."""
    columns, splits, names, left_out = read_folder(files, data.caption_column)
    parts = datasets.ReadInstruction.from_spec(data.split).to_absolute(Counter(splits))
    rows = {split: [row for row, own in enumerate(splits) if own == split] for split in {*splits}}
    chosen = [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]
    given = {key: [getattr(values[row], "path", values[row]) for row in chosen] for key, values in columns.items()}
    opened = datasets.Dataset.from_dict(given)
    for key, values in columns.items():
        if all(isinstance(value, File) for value in values):
            opened = opened.cast_column(key, datasets.Image(decode=False))
    if left_out:
        say_once(f"data.name={data.name}: {len(chosen):,} images are read; left out: {left_out}")
    return opened, "", names if data.label_column == "label" else None


def _open_tables(data: Data, files: list[File]) -> tuple[datasets.Dataset, str]:
    """The rows of the tables in a folder, and the version of its files, which names the cache of `datasets`."""
    folder = Path(data.name).resolve()
    for pattern in ("[", "]", "*", "?", "::"):
        if pattern in str(folder):
            raise UserError(f"datasets would take the {pattern} in {folder} for a pattern; rename or link the folder")
    version = version_of(file.path for file in files)
    cache = str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{version[:16]}")
    builder = datasets.load_dataset_builder(str(folder), cache_dir=cache)
    options = {}
    if hasattr(builder.config, "keep_default_na"):  # csv: NA, null and None are texts, what is empty is missing
        options = {"keep_default_na": False, "na_values": [""]}
    if (saved := _saved_files(folder, builder.config.data_files)) != builder.config.data_files:
        options["data_files"] = saved
    if options:
        builder = datasets.load_dataset_builder(str(folder), cache_dir=cache, **options)
    builder.download_and_prepare()
    rows = builder.as_dataset(data.split)
    read = {os.path.realpath(str(file)) for split in builder.config.data_files.values() for file in split}
    suffixes = image_suffixes() | {*TABLES, ".arrow", ".tar", ".txt"}
    others = [file for file in files if file.suffix in suffixes and file.kind != "hidden" and "://" not in file.path]
    if left_out := describe("file", [file.name for file in others if os.path.realpath(file.path) not in read]):
        say_once(f"data.name={data.name}: {len(rows):,} rows are read; left out: {left_out}")
    return rows, version


def _saved_files(folder: Path, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """The files of each split; of what `save_to_disk` wrote, those that it names: `map` leaves others beside them."""
    index = folder / "dataset_dict.json"
    if index.is_file():
        with blaming(index):
            listed = {split: sorted((folder / split).glob("*.arrow")) for split in read_json(index)["splits"]}
        found = {split: [*map(str, files)] for split, files in listed.items() if files} or found

    @cache
    def written(part: str) -> set[str] | None:
        state = Path(part, "state.json")
        listed = read_json(state).get("_data_files") if state.is_file() else None
        with blaming(state):
            return None if listed is None else {entry["filename"] for entry in listed}

    def is_read(file: str) -> bool:
        part, name = os.path.split(file)
        return not name.endswith(".arrow") or written(part) is None or name in written(part)

    return {split: [file for file in files if is_read(file)] for split, files in found.items()}


def _with_columns(data: Data, rows: datasets.Dataset) -> Data:
    """The settings with their columns checked; a missing column of images is replaced by the only one there is."""
    images = [
        column
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {*feature} <= {"bytes", "path"})
    ]
    if data.image_column not in rows.column_names and len(images) == 1:
        say_once(f"data.image_column={data.image_column}: {data.name} has none; {images[0]}, its only images, is read")
        data = replace(data, image_column=images[0])
    for key in ("image_column", "label_column", "caption_column"):
        column = getattr(data, key)
        if column is not None and column not in rows.column_names:
            raise UserError(f"data.{key}={column}: {data.name} has the columns {', '.join(rows.column_names)}")
    return data


def _captioned(data: Data, rows: datasets.Dataset) -> tuple[datasets.Dataset, list[list[str]]]:
    """The rows without those that `data.skip_uncaptioned` leaves out, and the captions of each: one text or more."""
    if data.skip_uncaptioned:
        captioned = [row for row, caption in enumerate(rows[data.caption_column]) if not _is_missing(caption)]
        if len(captioned) < len(rows):
            say_once(f"data.skip_uncaptioned: skipped {len(rows) - len(captioned):,} of {len(rows):,} images")
            rows = rows.select(captioned)
    captions = [value if isinstance(value, list) else [value] for value in rows[data.caption_column]]
    for row, texts in enumerate(captions):
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            value = texts[0] if len(texts) == 1 else texts
            given = repr(value) if isinstance(value, str) else shown(value)  # a blank text would not be seen
            remedy = "; data.skip_uncaptioned=true leaves such rows out" if _is_missing(texts) else ""
            raise UserError(f"data.caption_column={data.caption_column}: row {row} has the caption {given}{remedy}")
    return rows, captions


def _is_missing(caption: Any) -> bool:
    """True if a row has no caption: None, NaN, a blank text, or a list of nothing else."""
    texts = caption if isinstance(caption, list) else [caption]
    return all(text is None or text != text or (isinstance(text, str) and not text.strip()) for text in texts)


def _undecoded(data: Data, rows: datasets.Dataset) -> datasets.Dataset:
    """The column of images: encoded, or arrays or nested lists of uint8."""
    feature = rows.features[data.image_column]
    is_array = isinstance(feature, (datasets.Array2D, datasets.Array3D, datasets.List, datasets.LargeList))
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    with blaming(f"data.image_column={data.image_column}: holds no images"):
        if not is_array:
            rows = rows.cast_column(data.image_column, datasets.Image(decode=False))
        elif (kind := getattr(feature, "dtype", "objects")) != "uint8":
            raise UserError(f"arrays of {kind}, whose range is not known; uint8 is read")
    return rows.select_columns([data.image_column])


def data_hashes(source: Source, cache: Path, with_labels: bool = False, with_captions: bool = False) -> dict[str, str]:
    """SHA-256 of the data for records.

    DATA covers up to FINGERPRINTED decoded images, evenly spread, and all labels and captions if wanted: a training run
    may change its label_column. CONTENTS covers all images of a larger local folder.
    """
    count = len(source)
    digest = hashlib.sha256(f"{count} images".encode())
    for is_wanted, values in ((with_labels, source.labels), (with_captions, source.captions)):
        if is_wanted and values is not None:
            digest.update(repr(list(values)).encode())

    def read(row: int) -> bytes:
        with suppress(UserError):  # loading the images reports it
            image = source.decode(row, channels=3)
            return str(image.shape).encode() + image.tobytes()
        return b""

    sampled = min(count, FINGERPRINTED)
    places = [count * i // sampled for i in range(sampled)]
    for content in ahead(read, places, decoding_threads(source.data.resolution)):
        digest.update(content)
    hashes = {DATA: digest.hexdigest()}
    if os.path.isdir(source.data.name) and count > FINGERPRINTED:
        hashes[CONTENTS] = contents_hash(source, cache)
    return hashes


def contents_hash(source: Source, cache: Path) -> str:
    """SHA-256 of all images as they are stored, cached until a file may have changed."""

    def write(folder: Path) -> None:
        digest = hashlib.sha256()
        stored = ahead(_stored_bytes, source, available_threads())
        for content in tqdm(stored, "hashing images", len(source), mininterval=1, delay=2):
            digest.update(f"{len(content)}\n".encode() + content)
        (folder / "sha256").write_text(digest.hexdigest())

    made_from = {"fingerprint": source.fingerprint(), "content": "SHA-256 of all images"}
    return (made_once(cache / digest_of(made_from), "output_dir", write) / "sha256").read_text()


def _stored_bytes(image: Any) -> bytes:
    """Empty where the image can't be read, which decoding it reports."""
    try:
        content = read_bytes(image) if isinstance(image, dict) else image
        return content if isinstance(content, bytes) else np.asarray(content, dtype=np.uint8).tobytes()
    except Exception:  # an address fails with whatever its file system raises
        return b""


def split_held_out(data: Data, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images are trained on, rising, and which are held out; every seed and script has the same."""
    held_out = data.held_out_images
    if held_out >= count:
        raise UserError(f"data.held_out_images={held_out}: {data.name} has {count} images")
    order = np.random.default_rng(HELD_OUT_CHOICE).permutation(count)
    return np.sort(order[held_out:]), order[:held_out]


def batch_indices(stream: Stream, num_images: int, start: int, size: int) -> np.ndarray:
    """Images start … start + size − 1 of endless passes over the data, each a seeded permutation: int64 (size,)."""
    places = (divmod(place, num_images) for place in range(start, start + size))
    return np.array([_permutation(stream, number, num_images)[i] for number, i in places], dtype=np.int64)


@lru_cache(maxsize=4)
def _permutation(stream: Stream, number: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((*stream, PERMUTATION, number)).permutation(num_images)


def torch_seed(generator: np.random.Generator) -> int:
    """A seed for torch's generator."""
    return int(generator.integers(2**63))
