"""Images as training takes them: decoded once or on the fly, square crops in batches, micro-batches by step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from deme.data.ahead import ahead
from deme.data.draws import Stream, batch_indices, micro_batch_generator, torch_seed


class CachedImages(Sequence):
    """Images of different sizes, decoded into one flat uint8 array, in memory or mapped from a file.

    Args:
        pixels: all images after one another, each in (H, W, C) order.
        sizes: (height, width) of each, shape (N, 2).
        rows: the data set's row of each, shape (N,): rows are missing where unreadable images were skipped.
    """

    threads = 0  # that help to load a batch: it only has to be copied

    def __init__(self, pixels: np.ndarray, sizes: np.ndarray, rows: np.ndarray, channels: int):
        self.pixels = pixels
        self.sizes = sizes
        self.rows = rows
        self.channels = channels
        self.ends = np.cumsum(sizes.prod(axis=1, dtype=np.int64) * channels)
        self.stacked: np.ndarray | None = None  # all of them as one array, where they have one size
        if len(sizes) and (sizes == sizes[0]).all():
            self.stacked = pixels.reshape(len(sizes), *sizes[0].tolist(), channels)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> torch.Tensor:
        """uint8, shape (C, H, W); shares memory with `pixels`."""
        height, width = self.sizes[index]
        end = self.ends[index]
        pixels = self.pixels[end - int(height) * int(width) * self.channels : end]
        return torch.from_numpy(pixels.reshape(height, width, self.channels)).permute(2, 0, 1)


class StreamedImages(Sequence):
    """Images that are decoded each time they are asked for, by threads ahead of the step that needs them.

    Args:
        decode: row of the data set → uint8 (H, W, C).
        rows: of the images, shape (N,).
        threads: that help to load batches.
    """

    def __init__(self, decode: Callable[[int], np.ndarray], rows: np.ndarray, threads: int):
        self.decode = decode
        self.rows = rows
        self.threads = threads

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        """uint8, shape (C, H, W)."""
        pixels = self.decode(int(self.rows[index]))
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


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
        self.images = images
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.chosen = np.arange(len(images)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def threads(self) -> int:
        """How many help to load batches ahead."""
        return getattr(self.images, "threads", 0)

    def row(self, index: int) -> int:
        """The data set's row of an image."""
        return int(self.images.rows[self.chosen[index]])

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> torch.Tensor:
        """The images at `indices`: uint8, shape (B, C, R, R), in the channels-last format, as they lie in the cache.

        Args:
            random: draws the crops and flips; not needed for centre crops without flips.
        """
        stacked = getattr(self.images, "stacked", None)
        if stacked is not None:
            return self._stacked_batch(stacked, self.chosen[np.asarray(indices)], random)
        images = [self._augment(self.images[self.chosen[index]], random) for index in indices]
        shape = (len(images), len(images[0]), self.resolution, self.resolution)
        batch = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        for place, image in zip(batch, images, strict=True):
            place.copy_(image)
        return batch

    def _stacked_batch(self, stacked: np.ndarray, rows: np.ndarray, random: np.random.Generator | None) -> torch.Tensor:
        """The batch, cut out of all images at once, which takes a third of the time for small ones.

        Args:
            stacked: all images, shape (N, H, W, C).
            rows: of the wanted ones, shape (B,).
        """
        size = self.resolution
        draws = [self._draw(*stacked.shape[1:3], random) for _ in rows]
        tops, lefts, flipped = (np.array(values) for values in zip(*draws, strict=True))
        windows = sliding_window_view(stacked, (size, size), (1, 2)).transpose(0, 1, 2, 4, 5, 3)
        crops = windows[rows, tops, lefts]  # (B, R, R, C)
        crops[flipped] = crops[flipped, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2)

    def _augment(self, image: torch.Tensor, random: np.random.Generator | None) -> torch.Tensor:
        size = self.resolution
        top, left, is_flipped = self._draw(*image.shape[1:], random)
        image = image[:, top : top + size, left : left + size]
        return image.flip(-1) if is_flipped else image

    def _draw(self, height: int, width: int, random: np.random.Generator | None) -> tuple[int, int, bool]:
        """Where an image is cropped, and whether it is mirrored."""
        size = self.resolution
        top, left = ((side - size) // 2 for side in (height, width))
        if not self.center_crop:
            top, left = (random.integers(side - size + 1) if side > size else 0 for side in (height, width))
        return top, left, self.random_flip and random.random() < 0.5


class Examples(Protocol):
    """What a run is trained on, in the form that the network's encoder takes."""

    threads: int  # that help to load batches ahead

    def __len__(self) -> int:
        """How many there are."""

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> Any:
        """Those at `indices`; `random` draws what is random about them."""


class TrainingImages(NamedTuple):
    """What training sees, and what it does not."""

    training: Examples
    held_out: Examples


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of training sees, and the random draws that are not made on the device."""

    step: int
    number: int  # within the step, over all processes
    examples: Any  # as the encoder takes them: uint8 images (B, C, R, R), or with captions, or encoded before
    uniform: float  # in [0, 1): decides between the run's range and all timesteps
    seed: int  # of torch's generator: timesteps, noise, dropout


class MicroBatches:
    """The micro-batches of a run that one process works on, loaded ahead where images have to be decoded.

    Args:
        batch_size: images per optimizer step, over all processes.
        numbers: of this process's micro-batches within each step.
    """

    def __init__(self, images: Examples, stream: Stream, batch_size: int, micro_batch_size: int, numbers: range):
        self.images = images
        self.stream = stream
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.numbers = numbers
        self._loaded: Iterator[MicroBatch] = iter(())

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """This process's micro-batches of an optimizer step."""
        for number in self.numbers:
            found = next(self._loaded, None)
            if found is None or (found.step, found.number) != (step, number):  # the first step, or a resumed one
                self._loaded = ahead(self._load, self._places(step, number), self.images.threads)
                found = next(self._loaded)
            yield found

    def close(self) -> None:
        """Stop loading ahead."""
        self._loaded = iter(())

    def _places(self, step: int, number: int) -> Iterator[tuple[int, int]]:
        """(step, number) of all that follow, without an end."""
        numbers = self.numbers[self.numbers.index(number) :]
        while True:
            yield from ((step, number) for number in numbers)
            numbers = self.numbers
            step += 1

    def _load(self, place: tuple[int, int]) -> MicroBatch:
        step, number = place
        random = micro_batch_generator(self.stream, step, number)
        start = step * self.batch_size + number * self.micro_batch_size
        indices = batch_indices(self.stream, len(self.images), start, self.micro_batch_size)
        uniform = random.random()
        examples = self.images.batch(indices, random)
        return MicroBatch(step, number, examples, uniform, torch_seed(random))
