"""Training batches: which images a step sees, and its random draws; crops, captions, micro-batches.

A run is a function of its seed: each generator is seeded with the stream of its run, its purpose, and where in the run
it is used. So neither the number of processes nor an interruption changes what is trained on.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from deme.data.decoding import ahead
from deme.models.encoders import Captioned

Stream = tuple[int, ...]  # the experiment's seed, then numbers that tell its runs apart
PERMUTATION, MICRO_BATCH, HELD_OUT_CHOICE = 0, 1, 2  # purposes of a generator


def batch_indices(stream: Stream, num_images: int, start: int, size: int) -> np.ndarray:
    """Images start … start + size − 1 of an endless shuffled stream: int64, shape (size,).

    Each pass over the data is a permutation seeded with its number.
    """
    epochs, offsets = np.divmod(np.arange(start, start + size), num_images)
    indices = np.empty(size, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        in_epoch = epochs == epoch
        indices[in_epoch] = _permutation(stream, epoch, num_images)[offsets[in_epoch]]
    return indices


@lru_cache(maxsize=4)
def _permutation(stream: Stream, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((*stream, PERMUTATION, epoch)).permutation(num_images)


def torch_seed(generator: np.random.Generator) -> int:
    """A seed for torch's generator."""
    return int(generator.integers(2**63))


def choose_caption(captions: Sequence, empty: Any, dropout: float, random: np.random.Generator | None) -> Any:
    """One of an image's captions; `empty` with probability `dropout` (Ho and Salimans 2022, algorithm 1).

    Without a generator it is the first.
    """
    if random is None:
        return captions[0]
    number = int(random.integers(len(captions))) if len(captions) > 1 else 0
    return empty if dropout > 0 and random.random() < dropout else captions[number]


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

    def __post_init__(self):
        self.chosen = np.arange(len(self.images)) if self.chosen is None else self.chosen
        self.threads = getattr(self.images, "threads", 0)

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> torch.Tensor | Captioned:
        """The crops at `indices`, with their captions if there are any.

        `random` draws crops and flips, then captions. Without it, the first caption is taken.
        """
        pixels = self.crops(indices, random)
        if self.captions is None:
            return pixels
        captions = map(self.captions_of, indices)
        return Captioned(pixels, [choose_caption(own, "", self.caption_dropout, random) for own in captions])

    def captions_of(self, index: int) -> list[str]:
        """All captions of an image."""
        return self.captions[int(self.images.rows[self.chosen[index]])]

    def crops(self, indices: Sequence[int], random: np.random.Generator | None = None) -> torch.Tensor:
        """uint8, shape (B, C, R, R), channels-last; centre crops without flips need no generator."""
        size = self.resolution
        crops = []
        for image in map(self.images.__getitem__, self.chosen[np.asarray(indices)].tolist()):
            sides = image.shape[:2]
            if self.center_crop:
                top, left = ((side - size) // 2 for side in sides)
            else:
                top, left = (random.integers(side - size + 1) if side > size else 0 for side in sides)
            crop = image[top : top + size, left : left + size]
            crops.append(crop[:, ::-1] if self.random_flip and random.random() < 0.5 else crop)
        return torch.from_numpy(np.ascontiguousarray(np.stack(crops))).permute(0, 3, 1, 2)


class Examples(Protocol):
    """Training data in the form that the network's encoder takes."""

    threads: int  # that load batches ahead

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> Any:
        """The examples at `indices`, augmented by `random`."""


class TrainingImages(NamedTuple):
    """The data in two parts."""

    training: Examples
    held_out: Examples


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of training sees, and the random draws that are not made on the device."""

    step: int
    number: int  # within the step, over all processes
    examples: Any  # as the encoder takes them
    uniform: float  # in [0, 1): decides between the run's range and all timesteps
    seed: int  # of torch's generator: timesteps, noise, dropout


@dataclass
class MicroBatches:
    """The micro-batches of one process, loaded ahead where images have to be decoded."""

    images: Examples
    stream: Stream
    batch_size: int  # images per optimizer step, over all processes
    micro_batch_size: int
    numbers: range  # this process's micro-batches of each step

    def __post_init__(self):
        self.close()

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """This process's micro-batches of an optimizer step."""
        if step != self._next_step:  # the first step, or a resumed one
            places = ((later, number) for later in itertools.count(step) for number in self.numbers)
            self._loaded = ahead(self._load, places, self.images.threads)
        self._next_step = None  # until all were taken
        yield from itertools.islice(self._loaded, len(self.numbers))
        self._next_step = step + 1

    def close(self) -> None:
        """Stop loading ahead."""
        self._loaded: Iterator[MicroBatch] = iter(())
        self._next_step: int | None = None  # that `_loaded` begins with

    def _load(self, place: tuple[int, int]) -> MicroBatch:
        step, number = place
        random = np.random.default_rng((*self.stream, MICRO_BATCH, step, number))
        start = step * self.batch_size + number * self.micro_batch_size
        indices = batch_indices(self.stream, len(self.images), start, self.micro_batch_size)
        uniform = random.random()
        examples = self.images.batch(indices, random)
        return MicroBatch(step, number, examples, uniform, torch_seed(random))
