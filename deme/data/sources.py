"""Images and labels of a data set: decoded once into memory or a cache, or on the fly."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deme.config.sections import Data
from deme.data.ahead import ahead, decoding_threads
from deme.data.captions import CaptionedImages
from deme.data.decoding import decode_image, decoding
from deme.data.draws import held_out_order
from deme.data.images import CachedImages, CroppedImages, StreamedImages, TrainingImages
from deme.data.opening import Source, open_source
from deme.errors import UserError, shown
from deme.job.files import atomic_file, atomic_folder, make_folder, read_json
from deme.job.locks import locked
from deme.job.records import CONTENTS, DATA, IMAGES, Record

FINGERPRINTED = 1_000  # images


def count_images(data: Data) -> int:
    """How many images the data set holds, none of them decoded."""
    return len(open_source(data).rows)


def load_training_images(data: Data, channels: int, cache: Path, caption_dropout: float = 0.0) -> TrainingImages:
    """The images to train on, and the `data.held_out_images` others (centre-cropped, not flipped).

    Which ones are held out depends on the data alone: they are the same for every seed and script.

    Args:
        channels: 1 (grayscale) or 3 (RGB), as the UNet expects.
        cache: folder for images that don't fit into `data.cache_gb` of memory.
        caption_dropout: the probability of an empty caption, where the data has any.
    """
    source = open_source(data)
    images = _load(data, source, channels, cache)
    kept, others = split_held_out(data, len(images))
    training = CroppedImages(images, data.resolution, data.center_crop, data.random_flip, kept)
    held_out = CroppedImages(images, data.resolution, center_crop=True, random_flip=False, chosen=others)
    if source.captions is None:
        return TrainingImages(training, held_out)
    return TrainingImages(*(CaptionedImages(part, source.captions, caption_dropout) for part in (training, held_out)))


def split_held_out(data: Data, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images are trained on, in rising order, and which `data.held_out_images` are not."""
    held_out = data.held_out_images
    if held_out >= count:
        raise UserError(f"data.held_out_images={held_out}: {data.name} has {count} images")
    order = held_out_order(count)
    return np.sort(order[held_out:]), order[:held_out]


def load_evaluation_images(data: Data, cache: Path) -> tuple[CroppedImages, torch.Tensor | None]:
    """The same images as RGB, centre-cropped and never flipped, as pytorch_fid sees them, and their labels.

    Returns:
        the images, and int64 class indices of shape (N,) or None where the data has no labels.
    """
    source = open_source(data)
    images = _load(data, source, 3, cache)
    labels = None
    if source.labels is not None:
        labels = torch.from_numpy(np.unique(_classes(data, source.labels)[images.rows], return_inverse=True)[1])
    return CroppedImages(images, data.resolution, center_crop=True, random_flip=False), labels


def data_hashes(data: Data, cache: Path, with_labels: bool = False, with_captions: bool = False) -> dict[str, str]:
    """What tells the data from others, for records: `data_fingerprint`, and where that looks at some of the images of a
    local folder alone, the hash of all their bytes.

    Args:
        cache: folder that keeps that hash, which is made again when a file may have changed.
    """
    source = open_source(data)
    found = {DATA: _fingerprint(data, source, with_labels, with_captions)}
    if Path(data.name).is_dir() and len(source.rows) > FINGERPRINTED:
        found[CONTENTS] = _contents(source, cache)
    return found


def _contents(source: Source, cache: Path) -> str:
    """`Source.contents`, kept in a file that is called by the state of the images' files."""
    file = cache / f"contents-{hashlib.sha256(source.fingerprint().encode()).hexdigest()[:16]}.json"
    make_folder(cache, "output_dir")
    with locked(file, "output_dir", wait=True):  # one process reads it all, others wait
        with contextlib.suppress(UserError):
            known = read_json(file) if file.exists() else {}
            if isinstance(known.get("contents"), str):
                return known["contents"]
        found = source.contents()
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps({"contents": found}), encoding="utf-8")
    return found


def data_fingerprint(data: Data, with_labels: bool = False, with_captions: bool = False) -> str:
    """A SHA-256 of what is read: how many images there are, up to FINGERPRINTED of them, evenly spread.

    Another set behind the same name shows, whatever cache the images come from; of a few changed images of a large set
    `data_hashes` tells.

    Args:
        with_labels: all of them too; not for a training run, which may change its label_column.
        with_captions: all of them too.
    """
    return _fingerprint(data, open_source(data), with_labels, with_captions)


def _fingerprint(data: Data, source: Source, with_labels: bool, with_captions: bool) -> str:
    count = len(source.rows)
    digest = hashlib.sha256(f"{count} images".encode())
    if with_labels and source.labels is not None:
        digest.update(repr(list(source.labels)).encode())
    if with_captions and source.captions is not None:
        digest.update(repr(source.captions).encode())
    chosen = [count * i // min(count, FINGERPRINTED) for i in range(min(count, FINGERPRINTED))]

    def read(row: int) -> bytes:
        try:
            image = _decode_row(data, source, 3, row)
        except UserError:  # whether that is a mistake is another's to say
            return b""
        return str(image.shape).encode() + image.tobytes()

    for content in ahead(read, chosen, decoding_threads(data.resolution)):
        digest.update(content)
    return digest.hexdigest()


def _classes(data: Data, labels: list) -> np.ndarray:
    """The labels as an array of numbers, texts or truth values, shape (N,)."""
    for row, label in enumerate(labels):
        if not isinstance(label, (int, str, float)) or label != label:
            raise UserError(f"data.label_column={data.label_column}: row {row} has the label {shown(label)}")
    return np.asarray(labels)


def as_opened(data: Data) -> Data:
    """The same settings with the column that the images are really read from, which records name."""
    return replace(data, image_column=open_source(data).image_column)


def _load(data: Data, source: Source, channels: int, cache: Path) -> CachedImages | StreamedImages:
    """The images, resized: decoded once into memory up to `data.cache_gb`, up to `data.cache_disk_gb` into a file that
    is mapped, and on the fly above that; they are the same in each case."""
    size = len(source.rows) * data.resolution**2 * channels  # bytes, if all were square
    if size <= data.cache_gb * 2**30:
        kept, images = zip(*_readable(data, source, channels), strict=True)
        sizes = np.array([image.shape[:2] for image in images])
        return CachedImages(np.concatenate([image.reshape(-1) for image in images]), sizes, np.array(kept), channels)

    made_from = {"fingerprint": source.fingerprint(), "image_column": source.image_column}
    if size > data.cache_disk_gb * 2**30:
        rows = np.arange(len(source.rows))
        if data.skip_unreadable:
            folder = _cached(cache, made_from | {"content": "readable rows"}, lambda f: _write_rows(f, data, source))
            rows = np.load(folder / "rows.npy", allow_pickle=False)
        decode = partial(_decode_row, data, source, channels)
        return StreamedImages(decode, rows, decoding_threads(data.resolution))

    made_from |= {"resolution": data.resolution, "channels": channels, "skip_unreadable": data.skip_unreadable}
    folder = _cached(cache, made_from, lambda f: _write_pixels(f, data, source, channels))
    with np.load(folder / "index.npz", allow_pickle=False) as index:
        pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="c")  # copy-on-write: torch wants it writable
        return CachedImages(pixels, index["sizes"], index["rows"], channels)


def _cached(cache: Path, made_from: dict, build: Callable[[Path], None]) -> Path:
    """The folder in `cache` of what `made_from` gives, built by whichever process comes first, while others wait.

    Args:
        build: fills a folder.
    """
    folder = cache / Record(IMAGES, made_from).digest
    if not folder.exists():
        with locked(folder, "output_dir", wait=True):
            if not folder.exists():
                with atomic_folder(folder) as temporary:
                    build(temporary)
    return folder


def _write_pixels(folder: Path, data: Data, source: Source, channels: int) -> None:
    """Write pixels.bin, all images after one another, and index.npz, their sizes and rows."""
    kept = []
    sizes = []
    with (folder / "pixels.bin").open("wb") as file:
        for row, image in _readable(data, source, channels):
            file.write(image.tobytes())
            kept.append(row)
            sizes.append(image.shape[:2])
    np.savez(folder / "index.npz", sizes=np.array(sizes), rows=np.array(kept))


def _write_rows(folder: Path, data: Data, source: Source) -> None:
    """Write rows.npy, the rows whose images can be read."""
    np.save(folder / "rows.npy", np.array([row for row, _ in _readable(data, source, channels=3)]))


def _readable(data: Data, source: Source, channels: int) -> Iterator[tuple[int, np.ndarray]]:
    """Row number and pixels, uint8 (H, W, C), of every image that can be read."""

    def decode(item: tuple[int, Any]) -> np.ndarray | None:
        try:
            return _decode(data, *item, channels)
        except UserError:
            if data.skip_unreadable:
                return None
            raise

    count = len(source.rows)
    read = 0
    decoded = ahead(decode, enumerate(source.rows), decoding_threads(data.resolution))  # read many at a time
    for row, image in enumerate(tqdm(decoded, "decoding images", count, mininterval=1, delay=2)):
        if image is not None:
            read += 1
            yield row, image
    if read < count:
        print(f"data.skip_unreadable: skipped {count - read} of {count} images")
    if not read:
        raise UserError(f"data.name={data.name}: none of its {count} images can be read")


def _decode_row(data: Data, source: Source, channels: int, row: int) -> np.ndarray:
    """The image of a row, as `_decode` gives it."""
    return _decode(data, row, source.rows[row], channels)


def _decode(data: Data, row: int, content: Any, channels: int) -> np.ndarray:
    """The image of a row, its shorter side resized: uint8, shape (H, W, C).

    Args:
        content: of the row, as `decode_image` takes it.
    """
    path = content.get("path") if isinstance(content, dict) else None
    name = f"data.name={data.name}: row {row}" + (f" ({path})" if path else "")
    try:
        with decoding(name):
            return decode_image(content, data.resolution, channels)
    except UserError as error:
        raise UserError(f"{error}; data.skip_unreadable=true leaves such images out") from None
