"""Image files: opened, shown as a viewer shows them, resized."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from deme.errors import UserError, one_line


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """
    Raises:
        UserError: instead of whatever PIL raises on a damaged or hostile file; names it.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{name}: not a readable image: {one_line(error)}") from None


def decode_image(content: Any, resolution: int, channels: int) -> np.ndarray:
    """An image, its shorter side resized to `resolution`: uint8, shape (H, W, C).

    Args:
        content: a PIL image, or a row of datasets' undecoded images: a dictionary of `bytes` or `path`.

    Raises:
        Exception: it can't be read.
    """
    return _resize(as_seen(_open_image(content), channels), resolution, channels)


def _open_image(content: Any) -> Image.Image:
    if isinstance(content, Image.Image):
        return content
    if content is None or (content["bytes"] is None and not content["path"]):
        raise ValueError("no image in this row")
    return Image.open(BytesIO(content["bytes"]) if content["bytes"] is not None else content["path"])


def as_seen(image: Image.Image, channels: int) -> Image.Image:
    """What a viewer shows: upright by EXIF, transparent pixels over white, 16 bits scaled to 8, grayscale or RGB."""
    from deme.models.encoders import MODES  # with torch, which the names of samples do not need

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
        size = [max(resolution, round(side * scale)) for side in image.size]
        if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} would become {size[0]} x {size[1]}")
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], channels)
