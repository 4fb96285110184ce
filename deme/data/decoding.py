"""Image files decoded as a viewer shows them and resized, and threads that do so ahead of their use."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from deme.data.files import read_file
from deme.errors import UserError

LARGEST_16_BITS = 65535
SAME_LEVEL = 2  # of 255: a profile that changes no colour by more is taken for sRGB
TRANSPARENT_LEVEL = {"L;2": 85, "L;4": 17}  # PIL scales such pixels to 8 bits, but not the transparent one among them
LEAST_THREADED_RESOLUTION = 64  # pixels; below it, Python's own work on an image takes longer than the decoding
Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
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


def decode_image(content: Any, resolution: int, channels: int) -> np.ndarray:
    """An image as a viewer shows it, its shorter side resized to `resolution`: uint8, shape (H, W, C).

    Args:
        content: values (H, W) or (H, W, 1, 3 or 4) as lists, or a dictionary of `bytes` and `path`.

    Raises:
        Exception: PIL raises many types for a damaged image.
    """
    content = read_bytes(content) if isinstance(content, dict) else content
    if content is None:
        raise ValueError("no image in this row")
    if isinstance(content, bytes):
        image = Image.open(BytesIO(content))
    else:
        pixels = np.array(content, dtype=np.uint8)
        if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4)):
            raise UserError(f"an array of {pixels.dtype}, {pixels.shape}; uint8 (H, W) or (H, W, 1, 3 or 4) is read")
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)
    image = as_seen(image, channels)
    if min(image.size) != resolution:
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} would become {width} x {height}")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)


def read_bytes(content: dict) -> bytes | None:
    """The encoded image in a dictionary of `bytes` and `path`, as `datasets` gives it; None where it has neither."""
    if content["bytes"] is not None or not content["path"]:
        return content["bytes"]
    return read_file(content["path"])


def as_seen(image: Image.Image, channels: int) -> Image.Image:
    """An image as a viewer shows it, grayscale or RGB, 8 bits.

    It is upright by EXIF, its transparent pixels over white, its colours as sRGB by its profile.
    """
    _check_range(image)
    if image.format == "PNG" and "transparency" in image.info and image.tile:  # as long as it is not loaded
        kind = image.tile[0].args
        if kind == "RGB;16B":
            raise UserError("a transparent colour of 16 bits; save it with an alpha channel")
        image.info["transparency"] *= TRANSPARENT_LEVEL.get(kind, 1)
    profile = image.info.get("icc_profile")
    image = _in_8_bits(ImageOps.exif_transpose(image))
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
    grey = Image.fromarray((pixels // (LARGEST_16_BITS // 255)).clip(0, 255).astype(np.uint8))
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
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
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
