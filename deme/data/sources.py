"""Images and labels of a data set: decoded once into memory or a file, or on the fly; and hashes of them."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deme.config.sections import Data
from deme.data.decoding import ahead, decode_image, decoding, decoding_threads
from deme.data.images import HELD_OUT_CHOICE, CachedImages, CroppedImages, StreamedImages, TrainingImages
from deme.data.opening import Source
from deme.errors import UserError, shown
from deme.job.files import atomic_folder
from deme.job.locks import locked
from deme.job.records import CONTENTS, DATA, IMAGES, Record

FINGERPRINTED = 1_000  # images


def load_training_images(source: Source, channels: int, cache: Path, caption_dropout: float = 0.0) -> TrainingImages:
    """The images to train on, and the `data.held_out_images` others (centre-cropped, not flipped).

    Args:
        channels: 1 (grayscale) or 3 (RGB).
        cache: folder for images that don't fit into `data.cache_gb` of memory.
        caption_dropout: the probability of an empty caption, where the data has any.
    """
    data = source.data
    images = _load(source, channels, cache)
    trained, held_out = split_held_out(data, len(images))
    captions = (source.captions, caption_dropout)
    return TrainingImages(
        CroppedImages(images, data.resolution, data.center_crop, data.random_flip, trained, *captions),
        CroppedImages(images, data.resolution, True, False, held_out, *captions),
    )


def split_held_out(data: Data, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images are trained on, in rising order, and which `data.held_out_images` are not.

    The choice depends on the data alone: it is the same for every seed and script.
    """
    held_out = data.held_out_images
    if held_out >= count:
        raise UserError(f"data.held_out_images={held_out}: {data.name} has {count} images")
    order = np.random.default_rng(HELD_OUT_CHOICE).permutation(count)
    return np.sort(order[held_out:]), order[:held_out]


def load_evaluation_images(source: Source, cache: Path) -> tuple[CroppedImages, torch.Tensor | None]:
    """All images as RGB, centre-cropped and not flipped, and int64 class indices (N,), if the data has labels."""
    data = source.data
    images = _load(source, 3, cache)
    classes = None
    if source.labels is not None:
        for row, label in enumerate(source.labels):
            if not isinstance(label, (int, str, float)) or label != label:
                raise UserError(f"data.label_column={data.label_column}: row {row} has the label {shown(label)}")
        labels = np.asarray(source.labels)[images.rows]
        classes = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    return CroppedImages(images, data.resolution, center_crop=True, random_flip=False), classes


# --- hashes


def data_hashes(source: Source, cache: Path, with_labels: bool = False, with_captions: bool = False) -> dict[str, str]:
    """SHA-256 of the data for records.

    DATA covers up to FINGERPRINTED decoded images, evenly spread, and all labels and captions if wanted: a training run
    may change its label_column. CONTENTS covers all images of a larger local folder.
    """
    hashes = {DATA: _sampled_hash(source, with_labels, with_captions)}
    if Path(source.data.name).is_dir() and len(source.rows) > FINGERPRINTED:
        hashes[CONTENTS] = contents_hash(source, cache)
    return hashes


def contents_hash(source: Source, cache: Path) -> str:
    """`Source.contents`, cached until a file may have changed."""

    def write(folder: Path) -> None:
        (folder / "sha256").write_text(source.contents())

    made_from = {"fingerprint": source.fingerprint(), "content": "SHA-256 of all images"}
    return (_cached(cache, made_from, write) / "sha256").read_text()


def _sampled_hash(source: Source, with_labels: bool, with_captions: bool) -> str:
    count = len(source.rows)
    digest = hashlib.sha256(f"{count} images".encode())
    if with_labels and source.labels is not None:
        digest.update(repr(list(source.labels)).encode())
    if with_captions and source.captions is not None:
        digest.update(repr(source.captions).encode())

    def read(row: int) -> bytes:
        try:
            image = _decode(source, 3, row, source.rows[row])
        except UserError:  # loading the images reports it
            return b""
        return str(image.shape).encode() + image.tobytes()

    sampled = min(count, FINGERPRINTED)
    for content in ahead(
        read, [count * i // sampled for i in range(sampled)], decoding_threads(source.data.resolution)
    ):
        digest.update(content)
    return digest.hexdigest()


# --- decoding


def _load(source: Source, channels: int, cache: Path) -> CachedImages | StreamedImages:
    """The images, resized, the same in each case: in memory up to `data.cache_gb`, in a mapped file up to
    `data.cache_disk_gb`, and decoded on the fly above that."""
    data = source.data
    size = len(source.rows) * data.resolution**2 * channels  # bytes, if all were square
    if size <= data.cache_gb * 2**30:
        rows, images = zip(*_readable(source, channels), strict=True)
        sizes = np.array([image.shape[:2] for image in images])
        return CachedImages(np.concatenate([image.reshape(-1) for image in images]), sizes, np.array(rows), channels)

    made_from = {"fingerprint": source.fingerprint(), "image_column": data.image_column}
    if size > data.cache_disk_gb * 2**30:
        rows = np.arange(len(source.rows))
        if data.skip_unreadable:
            folder = _cached(cache, made_from | {"content": "readable rows"}, partial(_write_rows, source))
            rows = np.load(folder / "rows.npy", allow_pickle=False)
        threads = decoding_threads(data.resolution)
        return StreamedImages(lambda row: _decode(source, channels, row, source.rows[row]), rows, threads)

    made_from |= {"resolution": data.resolution, "channels": channels, "skip_unreadable": data.skip_unreadable}
    folder = _cached(cache, made_from, partial(_write_pixels, source, channels))
    with np.load(folder / "index.npz", allow_pickle=False) as index:
        pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="c")  # copy-on-write: torch wants it writable
        return CachedImages(pixels, index["sizes"], index["rows"], channels)


def _cached(cache: Path, made_from: dict, build: Callable[[Path], None]) -> Path:
    """The folder in `cache` for `made_from`; the first process that needs it builds it, others wait."""
    folder = cache / Record(IMAGES, made_from).digest
    if not folder.exists():
        with locked(folder, "output_dir", wait=True):
            if not folder.exists():
                with atomic_folder(folder) as temporary:
                    build(temporary)
    return folder


def _write_pixels(source: Source, channels: int, folder: Path) -> None:
    """Write pixels.bin, all images after one another, and index.npz, their sizes and rows."""
    rows = []
    sizes = []
    with (folder / "pixels.bin").open("wb") as file:
        for row, image in _readable(source, channels):
            file.write(image.tobytes())
            rows.append(row)
            sizes.append(image.shape[:2])
    np.savez(folder / "index.npz", sizes=np.array(sizes), rows=np.array(rows))


def _write_rows(source: Source, folder: Path) -> None:
    """Write rows.npy, the rows whose images can be read."""
    np.save(folder / "rows.npy", np.array([row for row, _ in _readable(source, channels=3)]))


def _readable(source: Source, channels: int) -> Iterator[tuple[int, np.ndarray]]:
    """Row number and pixels, uint8 (H, W, C), of every image that can be read."""
    data = source.data

    def decode(item: tuple[int, Any]) -> np.ndarray | None:
        try:
            return _decode(source, channels, *item)
        except UserError:
            if data.skip_unreadable:
                return None
            raise

    count = len(source.rows)
    num_read = 0
    decoded = ahead(decode, enumerate(source.rows), decoding_threads(data.resolution))  # iterating reads in batches
    for row, image in enumerate(tqdm(decoded, "decoding images", count, mininterval=1, delay=2)):
        if image is not None:
            num_read += 1
            yield row, image
    if num_read < count:
        print(f"data.skip_unreadable: skipped {count - num_read} of {count} images")
    if num_read == 0:
        raise UserError(f"data.name={data.name}: none of its {count} images can be read")


def _decode(source: Source, channels: int, row: int, content: Any) -> np.ndarray:
    """The image of a row, its shorter side resized: uint8, shape (H, W, C)."""
    path = content.get("path") if isinstance(content, dict) else None
    name = f"data.name={source.data.name}: row {row}" + (f" ({path})" if path else "")
    try:
        with decoding(name):
            return decode_image(content, source.data.resolution, channels)
    except UserError as error:
        raise UserError(f"{error}; data.skip_unreadable=true leaves such images out") from None
