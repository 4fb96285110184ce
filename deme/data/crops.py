"""Square crops of a data set's images, with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deme.models.encoders import Captioned


def choose_caption(captions: Sequence, empty: Any, dropout: float, random: np.random.Generator | None) -> Any:
    """One of an image's captions, or `empty` with probability `dropout` (Ho and Salimans 2022, algorithm 1).

    Without a generator it is the first.
    """
    if random is None:
        return captions[0]
    number = int(random.integers(len(captions))) if len(captions) > 1 else 0
    return empty if dropout > 0 and random.random() < dropout else captions[number]


@dataclass
class CroppedImages:
    """Square crops of images whose shorter side is `resolution`, each with a caption if the data has captions."""

    images: Sequence[np.ndarray]  # uint8 (H, W, C)
    resolution: int
    center_crop: bool
    random_flip: bool
    chosen: np.ndarray | None = None  # indices of the images to use; None: all
    captions: Sequence[list[str]] | None = None  # of each row of the data set, one or more
    caption_dropout: float = 0.0  # the probability of an empty caption
    originals: np.ndarray | None = None  # heights and widths of the images before they were resized, shape (N, 2)

    def __post_init__(self):
        self.chosen = np.arange(len(self.images)) if self.chosen is None else self.chosen
        self.threads = getattr(self.images, "threads", 0)

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> torch.Tensor | Captioned:
        """The crops at `indices`, captioned if the data is; `random` draws crops and flips, then captions."""
        pixels, sizes = self.crops(indices, random)
        if self.captions is None:
            return pixels
        captions = map(self.captions_of, indices)
        return Captioned(pixels, [choose_caption(own, "", self.caption_dropout, random) for own in captions], sizes)

    def captions_of(self, index: int) -> list[str]:
        """All captions of an image."""
        return self.captions[int(self.images.rows[self.chosen[index]])]

    def crops(
        self, indices: Sequence[int], random: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8, shape (B, C, R, R), channels-last, and their sizes, int64 (B, 6), if those of the originals are known.

        Sizes are the original's height and width, the top and left edge of the crop, in the flipped image if it is
        flipped, and its height and width (Podell et al. 2023). Centre crops without flips need no generator.
        """
        size = self.resolution
        crops, sizes = [], []
        for number in self.chosen[np.asarray(indices)].tolist():
            image = self.images[number]
            sides = image.shape[:2]
            if self.center_crop:
                top, left = ((side - size) // 2 for side in sides)
            else:
                top, left = (random.integers(side - size + 1) if side > size else 0 for side in sides)
            crop = image[top : top + size, left : left + size]
            is_flipped = self.random_flip and random.random() < 0.5
            crops.append(crop[:, ::-1] if is_flipped else crop)
            if self.originals is not None:
                edge = sides[1] - size - left if is_flipped else left
                sizes.append([*self.originals[number].tolist(), top, edge, size, size])
        pixels = torch.from_numpy(np.ascontiguousarray(np.stack(crops))).permute(0, 3, 1, 2)
        return pixels, torch.tensor(sizes) if sizes else None
