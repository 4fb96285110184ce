"""Image files: opened, shown as a viewer shows them, resized."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from deme.data.files import open_file
from deme.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

LARGEST_16_BITS = 65535
SAME_LEVEL = 2  # of 255: a profile that changes no colour by more is taken for sRGB
TRANSPARENT_LEVEL = {"L;2": 85, "L;4": 17}  # PIL scales such pixels to 8 bits, but not the transparent one among them


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """"""
    try:
        yield
    except Exception as error:
        raise UserError(f"{name}: not a readable image: {one_line(error)}") from None


def decode_image(content: Any, resolution: int, channels: int) -> np.ndarray:
    """An image, its shorter side resized to `resolution`: uint8, shape (H, W, C).

    Args:
        content: a PIL image, an array of uint8 values (H, W) or (H, W, 1, 3 or 4), or a row of datasets' undecoded
            images: a dictionary of `bytes` or `path`.

    Raises:
        Exception: it can't be read.
    """
    return _resize(as_seen(_open_image(content), channels), resolution, channels)


def _open_image(content: Any) -> Image.Image:
    if isinstance(content, Image.Image):
        return content
    if isinstance(content, np.ndarray):
        return _of_array(content)
    if content is None or (content["bytes"] is None and not content["path"]):
        raise ValueError("no image in this row")
    if content["bytes"] is not None:
        return Image.open(BytesIO(content["bytes"]))
    with open_file(content["path"]) as file:
        return Image.open(BytesIO(file.read()))


def _of_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise UserError(f"an array of {pixels.dtype}, {pixels.shape}; uint8 (H, W) or (H, W, 1, 3 or 4) is read")
    return Image.fromarray(pixels)


def as_seen(image: Image.Image, channels: int) -> Image.Image:
    """What a viewer shows, grayscale or RGB: upright by EXIF, transparent pixels over white, colours as sRGB by the
    image's profile, 16 bits scaled to 8.
    """
    from deme.models.encoders import MODES  # with torch, which the names of samples do not need

    _check_range(image)
    _mend_transparency(image)
    profile = image.info.get("icc_profile")
    image = _in_8_bits(ImageOps.exif_transpose(image))
    if profile:
        image = _as_srgb(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def _check_range(image: Image.Image) -> None:
    """Make sure that it is known which values are black and white."""
    tags = getattr(image, "tag_v2", {})  # of TIFF: 258 is the bits per sample, 262 whether 0 is white
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise UserError(f"{kind} values, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        is_whole = image.format in (None, "PNG", "PPM", "JPEG2000")
        if not is_whole and not (image.format == "TIFF" and tags.get(258) == (16,) and tags.get(262) == 1):
            raise UserError(f"{image.format} with more than 8 bits, whose range is not known; save it as PNG")


def _mend_transparency(image: Image.Image) -> None:
    """Scale the transparent grey value of a PNG as PIL scales its pixels; only before it is loaded."""
    if image.format != "PNG" or "transparency" not in image.info or not image.tile:
        return
    kind = image.tile[0].args
    if kind == "RGB;16B":
        raise UserError("a transparent colour of 16 bits; save it with an alpha channel")
    image.info["transparency"] = image.info["transparency"] * TRANSPARENT_LEVEL.get(kind, 1)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """The same with 8 bits per channel, and a transparent value made alpha."""
    if not image.mode.startswith("I"):
        return image
    transparent = image.info.get("transparency")
    pixels = np.asarray(image).astype(np.int64)  # PIL's own conversion would clip them
    grey = Image.fromarray((pixels // (LARGEST_16_BITS // 255)).clip(0, 255).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey


def _as_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Its colours as sRGB shows them; as they are where the profile is of no use, as viewers do.

    Args:
        profile: an ICC profile, of grey, RGB, CMYK or Lab values as the image's.
    """
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = "L" if image.mode in ("1", "L", "LA", "La") else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    transform = _to_srgb(profile, mode)
    if transform is None:
        return image
    plain = image.convert("RGBA") if alpha is not None and mode == "RGB" else image
    seen = transform.apply(plain if plain.mode == mode else plain.convert(mode))
    if alpha is not None:
        seen.putalpha(alpha)
    return seen


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> "ImageCmsTransform | None":
    """From the colours of a profile to sRGB; None where that changes nothing, or the profile is not of such values."""
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
