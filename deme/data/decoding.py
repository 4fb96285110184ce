"""An opened data set's images, decoded as a viewer shows them: all at once, from a cache, or ahead of their use."""

import io
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms
from tqdm import tqdm

from deme.config.sections import Data
from deme.data.files import read_file, version_of
from deme.errors import UserError, one_line
from deme.job.records import digest_of, made_once

SAME_LEVEL = 2  # of 255: a profile that changes no colour by more is taken for sRGB
TRANSPARENT_LEVEL = {"L;2": 85, "L;4": 17}  # PIL scales such pixels to 8 bits, but not the transparent one among them
UPRIGHT = {  # EXIF orientation → what makes such an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = range(5, 9)  # those that exchange height and width
LEAST_THREADED_RESOLUTION = 64  # pixels; below it, Python's own work on an image takes longer than the decoding


def ahead(work: Callable[[Any], Any], items: Iterable, threads: int) -> Iterator[Any]:
    """`map(work, items)` by threads that store at most two results each; without threads for 0."""
    if threads == 0:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def decoding_threads(resolution: int) -> int:
    """How many threads decode images of a resolution."""
    return available_threads() if resolution >= LEAST_THREADED_RESOLUTION else 0


def available_threads() -> int:
    """The cores that this process may use, divided by the number of processes on this host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Source(Sequence):
    """An opened data set: a sequence of undecoded images, with their labels and captions."""

    data: Data  # the settings, with the column of images that is read
    images: Any  # a datasets.Dataset of that column alone
    labels: Sequence | None
    captions: list[list[str]] | None  # of each image, one or more
    version: str  # of the files that `images` were read from
    class_names: list[str] | None = None  # that `labels` count; None where labels stand for themselves

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.images[row][self.data.image_column]  # datasets' Column would look through all batches for each row

    def __iter__(self) -> Iterator[Any]:
        return (row[self.data.image_column] for row in self.images)  # reads in batches

    def fingerprint(self) -> str:
        """Changes when what is read may have changed: by `datasets`, and the state of the images' own files."""
        import pyarrow as pa
        import pyarrow.compute as pc

        paths = []
        column = self.images.data.column(self.data.image_column)  # of all rows, also those that were left out since
        if pa.types.is_struct(column.type):  # of bytes and a path
            in_files = pc.is_null(pc.struct_field(column, "bytes"))
            paths = [path for path in pc.struct_field(column, "path").filter(in_files).to_pylist() if path]
        return self.images._fingerprint + self.version + (f"-{version_of(paths)}" if paths else "")

    def original_sizes(self, rows: np.ndarray) -> np.ndarray:
        """Heights and widths of the images in these rows as a viewer shows them, shape (N, 2), without decoding."""
        wanted = set(rows.tolist())
        found = [size_as_seen(open_image(content)) for row, content in enumerate(self) if row in wanted]
        return np.array(found)[:, ::-1]

    def decode(self, row: int, channels: int, image: Any = None) -> np.ndarray:
        """The image of a row, its shorter side resized: uint8, shape (H, W, C); `image`, if it was read before."""
        image = self[row] if image is None else image
        path = f" ({image['path']})" if isinstance(image, dict) and image.get("path") else ""
        try:
            return decode_image(image, self.data.resolution, channels)
        except Exception as error:  # PIL raises many types for a damaged image
            place = f"data.name={self.data.name}: row {row}{path}: not a readable image"
            hint = "data.skip_unreadable=true leaves such images out"
            raise UserError(f"{place}: {one_line(error)}; {hint}") from None


@dataclass(frozen=True)
class Images(Sequence):
    """Images of a data set, which are copied from a cache or decoded each time they are read."""

    read: Callable[[int], np.ndarray]  # index → uint8 (H, W, C)
    rows: np.ndarray  # the data set's row of each, shape (N,); unreadable rows may be missing
    threads: int = 0  # that load batches ahead

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read(index)


def flat_images(pixels: np.ndarray, sizes: np.ndarray, rows: np.ndarray, channels: int) -> Images:
    """Images of sizes (N, 2), height and width, that lie one after another in a flat uint8 array."""
    shapes = np.insert(sizes, 2, channels, axis=1)
    ends = np.cumsum(shapes.prod(axis=1, dtype=np.int64))

    def read(index: int) -> np.ndarray:
        shape = shapes[index].tolist()
        return pixels[ends[index] - math.prod(shape) : ends[index]].reshape(shape)

    return Images(read, rows)


def load_images(source: Source, channels: int, cache: Path) -> Images:
    """The images, resized: in memory up to `data.cache_gb`, mapped up to `data.cache_disk_gb`, else decoded anew."""
    data = source.data
    size = len(source) * data.resolution**2 * channels  # bytes, if all were square
    if size <= data.cache_gb * 2**30:
        buffer = io.BytesIO()
        sizes, rows = _decode_all(source, channels, buffer)
        return flat_images(np.frombuffer(buffer.getbuffer(), np.uint8), sizes, rows, channels)

    streams = size > data.cache_disk_gb * 2**30
    settings = {"resolution": data.resolution, "channels": channels, "skip_unreadable": data.skip_unreadable}
    made_from = {"fingerprint": source.fingerprint(), "image_column": data.image_column}
    made_from |= {"content": "rows of readable images"} if streams else settings

    def write(folder: Path) -> None:
        with open(os.devnull if streams else folder / "pixels.bin", "wb") as file:
            sizes, rows = _decode_all(source, channels, file)
        np.savez(folder / "index.npz", sizes=sizes, rows=rows)

    rows = np.arange(len(source))
    if data.skip_unreadable or not streams:
        folder = made_once(cache / digest_of(made_from), "output_dir", write)
        with np.load(folder / "index.npz", allow_pickle=False) as index:
            sizes, rows = index["sizes"], index["rows"]
    if streams:
        return Images(lambda i: source.decode(int(rows[i]), channels), rows, decoding_threads(data.resolution))
    return flat_images(np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r"), sizes, rows, channels)


def _decode_all(source: Source, channels: int, file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Write all images that can be read to a file, one after another; their sizes, shape (N, 2), and rows (N,)."""
    data, count = source.data, len(source)

    def decode(item: tuple[int, Any]) -> np.ndarray | None:
        row, content = item
        with suppress(UserError) if data.skip_unreadable else nullcontext():
            return source.decode(row, channels, content)

    rows, sizes = [], []
    decoded = ahead(decode, enumerate(source), decoding_threads(data.resolution))  # iterating reads in batches
    for row, image in enumerate(tqdm(decoded, "decoding images", count, mininterval=1, delay=2)):
        if image is not None:
            file.write(image.tobytes())
            rows.append(row)
            sizes.append(image.shape[:2])
    if len(rows) < count:
        print(f"data.skip_unreadable: skipped {count - len(rows)} of {count} images")
    if not rows:
        raise UserError(f"data.name={data.name}: none of its {count} images can be read")
    return np.array(sizes), np.array(rows)


def decode_image(content: Any, resolution: int, channels: int) -> np.ndarray:
    """An image as a viewer shows it, its shorter side resized to `resolution`: uint8, shape (H, W, C).

    `content` is bytes, a dictionary of `bytes` and `path`, or values (H, W) or (H, W, 1, 3 or 4) as lists.
    """
    image = as_seen(open_image(content), channels)
    if min(image.size) != resolution:
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} would become {width} x {height}")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)


def open_image(content: Any) -> Image.Image:
    """An image, not yet decoded where it is given by its bytes."""
    content = read_bytes(content) if isinstance(content, dict) else content
    if content is None:
        raise ValueError("no image in this row")
    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content))
    pixels = np.array(content, dtype=np.uint8)
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4)):
        raise UserError(f"an array of {pixels.dtype}, {pixels.shape}; uint8 (H, W) or (H, W, 1, 3 or 4) is read")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)


def size_as_seen(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image as a viewer shows it, upright by EXIF, without decoding."""
    is_exchanged = getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation) in TURNED  # by PIL, of a TIFF
    return image.size[::-1] if _orientation(image) in TURNED and not is_exchanged else image.size


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation, or None; a damaged block is ignored, as in viewers."""
    with suppress(SyntaxError, ValueError, TypeError, struct.error):
        return image.getexif().get(ExifTags.Base.Orientation)
    return None


def read_bytes(content: dict) -> bytes | None:
    """The encoded image in a dictionary of `bytes` and `path`, as `datasets` gives it; None where it has neither."""
    if content["bytes"] is not None or not content["path"]:
        return content["bytes"]
    return read_file(content["path"])


def as_seen(image: Image.Image, channels: int) -> Image.Image:
    """An image of 8 bits, grayscale or RGB, as a viewer shows it: upright by EXIF, over white, sRGB by its profile."""
    _check_range(image)
    if image.format == "PNG" and "transparency" in image.info and image.tile:  # as long as it is not loaded
        kind = image.tile[0].args
        if kind == "RGB;16B":
            raise UserError("a transparent colour of 16 bits; save it with an alpha channel")
        image.info["transparency"] *= TRANSPARENT_LEVEL.get(kind, 1)
    profile = image.info.get("icc_profile")
    image.load()  # after which PIL has turned a TIFF
    turn = UPRIGHT.get(_orientation(image))  # ImageOps.exif_transpose would write all EXIF again, and fail at odd tags
    image = _in_8_bits(image if turn is None else image.transpose(turn))
    if profile:
        image = _as_srgb(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _check_range(image: Image.Image) -> None:
    """Refuse images whose values for black and white are not known."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise UserError(f"{kind} values, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") and image.format not in (None, "PNG", "PPM", "JPEG2000"):
        tags = getattr(image, "tag_v2", {})  # of TIFF: 258 is the bits per sample, 262 whether 0 is white
        if image.format != "TIFF" or tags.get(258) != (16,) or tags.get(262) != 1:
            raise UserError(f"{image.format} with more than 8 bits, whose range is not known; save it as PNG")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits with 8, and its transparent value made alpha; others as they are."""
    if not image.mode.startswith("I"):
        return image
    transparent = image.info.get("transparency")
    pixels = np.asarray(image).astype(np.int64)  # PIL's own conversion would clip them
    grey = Image.fromarray((pixels // 257).clip(0, 255).astype(np.uint8))  # 65,535 is 257 · 255
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey


def _as_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours converted to sRGB; unchanged where the ICC profile is of no use, as in viewers."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = "L" if image.mode in ("1", "L", "LA", "La") else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    transform = _to_srgb(profile, mode)
    if transform is None:
        return image
    plain = image.convert("RGBA") if alpha is not None and mode == "RGB" else image
    converted = transform.apply(plain if plain.mode == mode else plain.convert(mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """PIL's transform from a profile's colours to sRGB; None if it changes nothing or the profile is not of `mode`."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode not in ("L", "RGB"):
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    probe = Image.fromarray(colours)
    changes = np.abs(np.asarray(transform.apply(probe), dtype=int) - np.asarray(probe.convert("RGB"), dtype=int))
    return transform if changes.max() > SAME_LEVEL else None
