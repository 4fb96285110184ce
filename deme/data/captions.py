"""Images with captions: which of its captions an image has in a step, or none."""

from collections.abc import Sequence

import numpy as np

from deme.data.images import CroppedImages
from deme.models.encoders import Captioned


def choose_caption(count: int, dropout: float, random: np.random.Generator | None) -> int | None:
    """Which of an image's captions it has, or None where it has none (Ho and Salimans 2022, algorithm 1).

    Args:
        count: how many there are.
        dropout: the probability of having none.
        random: draws; None: the first, never none.
    """
    if random is None:
        return 0
    number = int(random.integers(count)) if count > 1 else 0
    return None if dropout > 0 and random.random() < dropout else number


class CaptionedImages:
    """Square crops of images, each with one of its captions.

    Args:
        captions: of each row of the data set, one or more.
        dropout: the probability of an empty caption in training.
    """

    def __init__(self, images: CroppedImages, captions: Sequence[list[str]], dropout: float):
        self.images = images
        self.captions = captions
        self.dropout = dropout

    def __len__(self) -> int:
        return len(self.images)

    @property
    def threads(self) -> int:
        """How many help to load batches ahead."""
        return self.images.threads

    def captions_of(self, index: int) -> list[str]:
        """All captions of an image."""
        return self.captions[self.images.row(index)]

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> Captioned:
        """The images at `indices` with a caption each.

        Args:
            random: draws crops and flips, then the captions.
        """
        pixels = self.images.batch(indices, random)
        texts = []
        for index in indices:
            captions = self.captions_of(index)
            number = choose_caption(len(captions), self.dropout, random)
            texts.append("" if number is None else captions[number])
        return Captioned(pixels, texts)
