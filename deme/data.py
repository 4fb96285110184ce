"""Images and labels: decoded and resized once, kept as uint8, cropped and flipped per micro-batch."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from tqdm import tqdm

from deme.config import Data, UserError
from deme.files import atomic_folder, make_folder, writing

PERMUTATION, MICRO_BATCH, HELD_OUT = 0, 1, 2  # what a generator is for: keeps the seeds of a run's draws apart
MODES = {1: "L", 3: "RGB"}  # PIL's mode for a number of channels
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # as PIL raises them


class ResizedImages(Sequence):
    """Images of different sizes in one flat uint8 array, in memory or mapped from a file.

    Args:
        pixels: all images after one another, each in (H, W, C) order.
        sizes: (height, width) of each, shape (N, 2).
        rows: the data set's row of each, shape (N,): rows are missing where unreadable images were skipped.
    """

    def __init__(self, pixels: np.ndarray, sizes: np.ndarray, rows: np.ndarray, channels: int):
        self.pixels, self.sizes, self.rows, self.channels = pixels, sizes, rows, channels
        self.ends = np.cumsum(sizes.prod(axis=1, dtype=np.int64) * channels)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> torch.Tensor:
        """uint8, shape (C, H, W); shares memory with `pixels`."""
        height, width = self.sizes[index]
        end = self.ends[index]
        pixels = self.pixels[end - int(height) * int(width) * self.channels : end]
        return torch.from_numpy(pixels.reshape(height, width, self.channels)).permute(2, 0, 1)


class CroppedImages:
    """Square crops of images whose shorter side is `resolution`.

    Args:
        chosen: which of `images` they are; None: all.
    """

    def __init__(
        self,
        images: Sequence[torch.Tensor],
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        chosen: np.ndarray | None = None,
    ):
        self.images, self.resolution = images, resolution
        self.center_crop, self.random_flip = center_crop, random_flip
        self.chosen = np.arange(len(images)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> torch.Tensor:
        """The images at `indices`: uint8, shape (B, C, R, R), in the channels-last format, as they lie in the cache.

        Args:
            random: draws the crops and flips; not needed for centre crops without flips.
        """
        shape = (len(indices), len(self.images[0]), self.resolution, self.resolution)
        batch = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        for place, index in zip(batch, indices, strict=True):
            place.copy_(self._augment(self.images[self.chosen[index]], random))
        return batch

    def _augment(self, image: torch.Tensor, random: np.random.Generator | None) -> torch.Tensor:
        size = self.resolution
        top, left = ((side - size) // 2 for side in image.shape[1:])
        if not self.center_crop:
            top, left = (random.integers(side - size + 1) if side > size else 0 for side in image.shape[1:])
        image = image[:, top : top + size, left : left + size]
        return image.flip(-1) if self.random_flip and random.random() < 0.5 else image


def batch_indices(seed: int, stream: tuple[int, ...], num_images: int, start: int, size: int) -> np.ndarray:
    """Which images stand at positions start … start + size − 1 of the endless shuffled stream: int64, shape (size,).

    Each pass over the data is a permutation seeded with its number.
    """
    epochs, offsets = np.divmod(np.arange(start, start + size), num_images)
    indices = np.empty(size, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        indices[chosen] = _permutation(seed, stream, epoch, num_images)[offsets[chosen]]
    return indices


@lru_cache(maxsize=2)
def _permutation(seed: int, stream: tuple[int, ...], epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((seed, *stream, PERMUTATION, epoch)).permutation(num_images)


def count_images(data: Data) -> int:
    """How many images the data set holds, none of them decoded."""
    return len(_open(data)[0])


def load_training_images(data: Data, channels: int, cache: Path) -> tuple[CroppedImages, CroppedImages]:
    """The images to train on, and the `data.held_out_images` others (centre-cropped, not flipped).

    Which ones are held out depends on the data alone: they are the same for every seed and script.

    Args:
        channels: 1 (grayscale) or 3 (RGB), as the UNet expects.
        cache: folder for images that don't fit into `data.cache_gb` of memory.

    Raises:
        UserError: data that can't be read; names the key, and the file or row.
    """
    rows, _, fingerprint = _open(data)
    images = _resized(data, rows, fingerprint, channels, cache)
    count = data.held_out_images
    if count >= len(images):
        raise UserError(f"data.held_out_images={count}: {data.name} has {len(images)} images")
    order = np.random.default_rng(HELD_OUT).permutation(len(images))
    held_out, kept = order[:count], np.sort(order[count:])
    return (
        CroppedImages(images, data.resolution, data.center_crop, data.random_flip, kept),
        CroppedImages(images, data.resolution, center_crop=True, random_flip=False, chosen=held_out),
    )


def load_evaluation_images(data: Data, cache: Path) -> tuple[CroppedImages, torch.Tensor | None]:
    """The same images as RGB, centre-cropped and never flipped, as pytorch_fid sees them, and their labels.

    Returns:
        the images, and int64 class indices of shape (N,) or None where the data has no labels.
    """
    rows, labels, fingerprint = _open(data)
    images = _resized(data, rows, fingerprint, 3, cache)
    if labels is not None:
        labels = torch.from_numpy(np.unique(np.asarray(labels)[images.rows], return_inverse=True)[1])
    return CroppedImages(images, data.resolution, center_crop=True, random_flip=False), labels


def _open(data: Data) -> tuple[Sequence, list | None, str]:
    """The data set's images, undecoded, its labels, and a fingerprint of both."""
    if data.name == "digits":
        from sklearn.datasets import load_digits  # 1,797 handwritten digits inside the package, values 0 … 16

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        labels = None if data.label_column is None else digits.target.tolist()
        return [Image.fromarray(image) for image in images], labels, "digits"

    import datasets
    from pyarrow import ArrowException

    try:
        rows = datasets.load_dataset(data.name, split=data.split)
    except Exception as error:  # the loaders behind load_dataset raise whatever their formats raise
        causes = [error]  # datasets says only "an error occurred": what occurred is in the cause
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        reason = " ".join(": ".join(map(str, causes)).split())
        raise UserError(f"data.name={data.name} (data.split={data.split}): cannot be loaded: {reason}") from error
    for key in ("image_column", "label_column"):
        column = getattr(data, key)
        if column is not None and column not in rows.column_names:
            raise UserError(f"data.{key}={column}: {data.name} has the columns {', '.join(rows.column_names)}")
    if len(rows) == 0:
        raise UserError(f"data.name={data.name} (data.split={data.split}): holds no images")
    labels = None if data.label_column is None else rows[data.label_column]
    try:
        undecoded = rows.cast_column(data.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, ArrowException) as error:
        raise UserError(f"data.image_column={data.image_column}: holds no images: {error}") from None
    return undecoded[data.image_column], labels, undecoded._fingerprint


def _resized(data: Data, rows: Sequence, fingerprint: str, channels: int, cache: Path) -> ResizedImages:
    """Decode and resize every image once: into memory up to `data.cache_gb`, else into a file that is mapped.

    The file is built by whichever process comes first, while others that need it wait.
    """
    if len(rows) * data.resolution**2 * channels <= data.cache_gb * 2**30:
        kept, images = zip(*_decoded(data, rows, channels), strict=True)
        sizes = np.array([image.shape[:2] for image in images])
        return ResizedImages(np.concatenate([image.reshape(-1) for image in images]), sizes, np.array(kept), channels)

    made_from = [fingerprint, data.image_column, data.resolution, channels, data.skip_unreadable]
    folder = cache / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    make_folder(cache, "output_dir")
    lock = folder.with_suffix(".lock")
    with ExitStack() as held:
        with writing(lock):
            held.enter_context(FileLock(lock))
        try:
            if not folder.exists():
                _build_cache(folder, data, rows, channels)
        finally:
            lock.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone
    with np.load(folder / "index.npz", allow_pickle=False) as index:
        pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="c")  # copy-on-write: torch wants it writable
        return ResizedImages(pixels, index["sizes"], index["rows"], channels)


def _build_cache(folder: Path, data: Data, rows: Sequence, channels: int) -> None:
    """Write pixels.bin, all images after one another, and index.npz, their sizes and rows."""
    with atomic_folder(folder) as temporary:
        kept, sizes = [], []
        with (temporary / "pixels.bin").open("wb") as file:
            for row, image in _decoded(data, rows, channels):
                file.write(image.tobytes())
                kept.append(row)
                sizes.append(image.shape[:2])
        np.savez(temporary / "index.npz", sizes=np.array(sizes), rows=np.array(kept))


def _decoded(data: Data, rows: Sequence, channels: int) -> Iterator[tuple[int, np.ndarray]]:
    """Row number and pixels, uint8 (H, W, C), of every image that can be read.

    Raises:
        UserError: an unreadable image, unless `data.skip_unreadable`; or none that can be read.
    """
    skipped, read = 0, 0
    for number, row in enumerate(tqdm(rows, "decoding images", mininterval=1, delay=2)):
        try:
            image = as_seen(_open_image(row), channels)
        except DECODING_ERRORS as error:
            path = row.get("path") if isinstance(row, dict) else None
            name = f"row {number}" + (f" ({path})" if path else "")
            if not data.skip_unreadable:
                raise UserError(
                    f"data.name={data.name}: {name} is not a readable image: {error}; "
                    "data.skip_unreadable=true leaves such images out"
                ) from None
            skipped += 1
            continue
        read += 1
        yield number, _resize(image, data.resolution, channels)
    if skipped:
        print(f"data.skip_unreadable: skipped {skipped} of {len(rows)} images")
    if not read:
        raise UserError(f"data.name={data.name}: none of its {len(rows)} images can be read")


def _open_image(row: Image.Image | dict | None) -> Image.Image:
    """An image, or a row of datasets' undecoded images: a dictionary of `bytes` or `path`."""
    if isinstance(row, Image.Image):
        return row
    if row is None:
        raise ValueError("no image in this row")
    return Image.open(BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"])


def as_seen(image: Image.Image, channels: int) -> Image.Image:
    """What a viewer shows: upright by EXIF, transparent pixels over white, 16 bits scaled to 8, grayscale or RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grayscale; PIL's own conversion would clip it
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def _resize(image: Image.Image, resolution: int, channels: int) -> np.ndarray:
    """Shorter side to `resolution`, bilinear: uint8, shape (H, W, C)."""
    if min(image.size) != resolution:
        scale = resolution / min(image.size)
        image = image.resize([max(resolution, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], channels)
