"""Training batches: which images a step sees, and its random draws; crops, captions, micro-batches.

A run is a function of its seed: each generator is seeded with the stream of its run, its purpose, and where in the run
it is used. So neither the number of processes nor an interruption changes what is trained on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from deme.data.decoding import ahead
from deme.models.encoders import Captioned

Stream = tuple[int, ...]  # the experiment's seed, then numbers that tell its runs apart
PERMUTATION, MICRO_BATCH, HELD_OUT_CHOICE = 0, 1, 2  # purposes of a generator


# --- random draws


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


def choose_caption(count: int, dropout: float, random: np.random.Generator | None) -> int | None:
    """Which of `count` captions an image has; None with probability `dropout` (Ho and Salimans 2022, algorithm 1).

    Without a generator it is the first.
    """
    if random is None:
        return 0
    number = int(random.integers(count)) if count > 1 else 0
    return None if dropout > 0 and random.random() < dropout else number


# --- images


class CachedImages(Sequence):
    """Images decoded into one flat uint8 array, in memory or mapped from a file, each in (H, W, C) order.

    Args:
        sizes: (height, width) of each, shape (N, 2).
        rows: the data set's row of each, shape (N,); unreadable rows may be missing.
    """

    threads = 0  # that load batches ahead: a batch only has to be copied

    def __init__(self, pixels: np.ndarray, sizes: np.ndarray, rows: np.ndarray, channels: int):
        self.pixels = pixels
        self.sizes = sizes
        self.rows = rows
        self.channels = channels
        self.ends = np.cumsum(sizes.prod(axis=1, dtype=np.int64) * channels)
        self.stacked: np.ndarray | None = None  # (N, H, W, C), if all have one size
        if len(sizes) and (sizes == sizes[0]).all():
            self.stacked = pixels.reshape(len(sizes), *sizes[0].tolist(), channels)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> torch.Tensor:
        """uint8, shape (C, H, W); shares memory with `pixels`."""
        height, width = map(int, self.sizes[index])
        end = self.ends[index]
        pixels = self.pixels[end - height * width * self.channels : end]
        return torch.from_numpy(pixels.reshape(height, width, self.channels)).permute(2, 0, 1)


@dataclass(frozen=True)
class StreamedImages(Sequence):
    """Images decoded each time they are read."""

    decode: Callable[[int], np.ndarray]  # row of the data set → uint8 (H, W, C)
    rows: np.ndarray  # the data set's row of each, shape (N,)
    threads: int  # that load batches ahead

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        """uint8, shape (C, H, W)."""
        pixels = self.decode(int(self.rows[index]))
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


@dataclass
class CroppedImages:
    """Square crops of images whose shorter side is `resolution`, each with a caption if the data has captions."""

    images: Sequence[torch.Tensor]
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
        texts = []
        for index in indices:
            captions = self.captions_of(index)
            number = choose_caption(len(captions), self.caption_dropout, random)
            texts.append("" if number is None else captions[number])
        return Captioned(pixels, texts)

    def captions_of(self, index: int) -> list[str]:
        """All captions of an image."""
        return self.captions[int(self.images.rows[self.chosen[index]])]

    def crops(self, indices: Sequence[int], random: np.random.Generator | None = None) -> torch.Tensor:
        """uint8, shape (B, C, R, R), channels-last; centre crops without flips need no generator."""
        chosen = self.chosen[np.asarray(indices)]
        stacked = getattr(self.images, "stacked", None)
        if stacked is not None:
            return self._stacked_crops(stacked, chosen, random)
        size = self.resolution
        crops = []
        for image in map(self.images.__getitem__, chosen):
            top, left, is_flipped = self._draw(*image.shape[1:], random)
            crop = image[:, top : top + size, left : left + size]
            crops.append((crop.flip(-1) if is_flipped else crop).permute(1, 2, 0))
        return torch.stack(crops).permute(0, 3, 1, 2)

    def _stacked_crops(
        self, stacked: np.ndarray, chosen: np.ndarray, random: np.random.Generator | None
    ) -> torch.Tensor:
        """The same from images of one size, (N, H, W, C): three times as fast for small ones."""
        size = self.resolution
        draws = [self._draw(*stacked.shape[1:3], random) for _ in chosen]
        tops, lefts, flipped = (np.array(values) for values in zip(*draws, strict=True))
        windows = sliding_window_view(stacked, (size, size), (1, 2)).transpose(0, 1, 2, 4, 5, 3)
        crops = windows[chosen, tops, lefts]  # (B, R, R, C)
        crops[flipped] = crops[flipped, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2)

    def _draw(self, height: int, width: int, random: np.random.Generator | None) -> tuple[int, int, bool]:
        """Top and left of an image's crop, and whether it is flipped."""
        size = self.resolution
        top, left = ((side - size) // 2 for side in (height, width))
        if not self.center_crop:
            top, left = (random.integers(side - size + 1) if side > size else 0 for side in (height, width))
        return top, left, self.random_flip and random.random() < 0.5


# --- micro-batches


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
    _loaded: Iterator[MicroBatch] = field(default_factory=lambda: iter(()))

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """This process's micro-batches of an optimizer step."""
        for number in self.numbers:
            batch = next(self._loaded, None)
            if batch is None or (batch.step, batch.number) != (step, number):  # the first step, or a resumed one
                self._loaded = ahead(self._load, self._places(step, number), self.images.threads)
                batch = next(self._loaded)
            yield batch

    def close(self) -> None:
        """Stop loading ahead."""
        self._loaded = iter(())

    def _places(self, step: int, number: int) -> Iterator[tuple[int, int]]:
        """All (step, number) from here on, without an end."""
        numbers = self.numbers[self.numbers.index(number) :]
        while True:
            yield from ((step, number) for number in numbers)
            numbers = self.numbers
            step += 1

    def _load(self, place: tuple[int, int]) -> MicroBatch:
        step, number = place
        random = np.random.default_rng((*self.stream, MICRO_BATCH, step, number))
        start = step * self.batch_size + number * self.micro_batch_size
        indices = batch_indices(self.stream, len(self.images), start, self.micro_batch_size)
        uniform = random.random()
        examples = self.images.batch(indices, random)
        return MicroBatch(step, number, examples, uniform, torch_seed(random))
