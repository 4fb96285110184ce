"""Images and labels: decoded and resized once, kept as uint8, cropped and flipped per micro-batch."""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from deme.config import Data, UserError

PERMUTATION, MICRO_BATCH = 0, 1  # what a generator is for: keeps the seeds of a run's random draws apart
MODES = {1: "L", 3: "RGB"}  # PIL's mode for a number of channels


class TrainingImages:
    """Images whose shorter side is `resolution`, in memory.

    Args:
        images: uint8 tensors of shape (C, H, W).
    """

    def __init__(self, images: list[torch.Tensor], resolution: int, center_crop: bool, random_flip: bool):
        self.images = images
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """The images at `indices`, cropped and flipped by draws from `random`: uint8, shape (B, C, R, R)."""
        return torch.stack([self._augment(self.images[index], random) for index in indices])

    def _augment(self, image: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
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


def load_training_images(data: Data, channels: int) -> TrainingImages:
    """
    Args:
        channels: 1 (grayscale) or 3 (RGB), as the UNet expects.
    """
    images = [_to_tensor(image, data.resolution, channels) for image in _read(data)[0]]
    return TrainingImages(images, data.resolution, data.center_crop, data.random_flip)


def load_evaluation_images(data: Data) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All images, centre-cropped, never flipped, as pytorch_fid sees them, and their labels.

    Returns:
        uint8 RGB of shape (N, 3, R, R), and int64 class indices of shape (N,) or None where the data has no labels.
    """
    images, labels = _read(data)
    centre = TrainingImages(
        [_to_tensor(image, data.resolution, 3) for image in images],
        data.resolution,
        center_crop=True,
        random_flip=False,
    )
    pixels = centre.batch(np.arange(len(centre)), np.random.default_rng())
    if labels is None:
        return pixels, None
    return pixels, torch.from_numpy(np.unique(labels, return_inverse=True)[1])


def _read(data: Data) -> tuple[list[Image.Image], list | None]:
    """The data set's images, undecoded where datasets decodes on access, and its labels."""
    if data.name == "digits":
        from sklearn.datasets import load_digits  # 1,797 handwritten digits inside the package, values 0 … 16

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return [
            Image.fromarray(image) for image in images
        ], None if data.label_column is None else digits.target.tolist()

    import datasets

    try:
        rows = datasets.load_dataset(data.name, split=data.split)
    except Exception as error:  # the loaders behind load_dataset raise whatever their formats raise
        reason = " ".join(str(error).split())
        raise UserError(f"data.name={data.name} (data.split={data.split}): cannot be loaded: {reason}") from error
    for key in ("image_column", "label_column"):
        column = getattr(data, key)
        if column is not None and column not in rows.column_names:
            raise UserError(f"data.{key}={column}: {data.name} has the columns {', '.join(rows.column_names)}")
    if len(rows) == 0:
        raise UserError(f"data.name={data.name} (data.split={data.split}): holds no images")
    return rows[data.image_column], None if data.label_column is None else rows[data.label_column]


def _to_tensor(image: Image.Image, resolution: int, channels: int) -> torch.Tensor:
    """Decode, convert and resize (bilinear, shorter side to `resolution`): uint8, shape (C, H, W)."""
    image = image.convert(MODES[channels])
    if min(image.size) != resolution:
        scale = resolution / min(image.size)
        image = image.resize([max(resolution, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()
