"""Noisy images that are the same for every network measured on them, for any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from deme.data.examples import Examples
from deme.data.opening import Stream, batch_indices, torch_seed
from deme.job.processes import Processes
from deme.method.process import Process
from deme.models.encoders import Condition, Encoder

# "clean", on the device: images as the network sees them, shape (B, C, H, W); "condition": its further arguments
Encoded = dict[str, Any]
ENCODED_AT_ONCE = 32  # images; not a setting, because the encoder's random draws depend on it
NOISE, ENCODING = 5, 6  # purposes of generators; deme/data/opening.py has the others


def on_tensors(work: Callable[..., torch.Tensor], *parts: Any) -> Any:
    """What `work` gives for each tensor of nested mappings with the same names."""
    if isinstance(parts[0], dict):
        return {name: on_tensors(work, *(part[name] for part in parts)) for name in parts[0]}
    return work(*parts)


def rows_of(tensors: dict[str, Any], chosen: torch.Tensor | slice) -> dict[str, Any]:
    """The rows of each tensor that a mask, indices or a slice select."""
    return on_tensors(lambda tensor: tensor[chosen], tensors)


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch of noisy images; B of them."""

    noisy: torch.Tensor  # shape (B, C, H, W)
    timesteps: torch.Tensor  # shape (B,)
    condition: Condition  # of the network
    ranges: torch.Tensor  # int64, shape (B,): index of the timestep's range
    target: torch.Tensor  # shape (B, C, H, W): what the network should predict
    weights: torch.Tensor  # shape (B,); of the squared distances, such that their sum is the objective

    def predict(self, network: nn.Module) -> torch.Tensor:
        """The network's prediction: float32, shape (B, C, H, W)."""
        return network(self.noisy, self.timesteps, **self.condition, return_dict=False)[0].float()

    def losses(self, network: nn.Module) -> torch.Tensor:
        """The denoising loss of each image, averaged over its elements: float32, shape (B,)."""
        return (self.predict(network) - self.target).square().flatten(1).mean(1)

    def part(self, chosen: torch.Tensor | slice) -> "Batch":
        """The images selected by a mask of shape (B,) or by a slice."""
        return Batch(**rows_of(vars(self), chosen))


def regrouped(batches: Sequence[Batch], batch_size: int) -> list[Batch]:
    """The same noisy images in batches of another size."""
    whole = Batch(**on_tensors(lambda *parts: torch.cat(parts), *map(vars, batches)))
    return [whole.part(slice(start, start + batch_size)) for start in range(0, len(whole.noisy), batch_size)]


@dataclass(frozen=True)
class Noiser:
    """Encodes images of a data set and adds noise to them."""

    images: Examples
    encoder: Encoder
    process: Process
    processes: Processes

    def encode(self, indices: np.ndarray, random: np.random.Generator) -> Encoded:
        torch.manual_seed(torch_seed(random))  # for the encoder's draws
        clean, condition = self.encoder.encode(self.images.batch(indices, random))
        # half precision on a GPU; labels stay numbers
        named = {name: value.float() if value.is_floating_point() else value for name, value in condition.items()}
        return {"clean": clean, "condition": named}

    def batch(self, encoded: Encoded, noise: torch.Tensor, timesteps: torch.Tensor, ranges: torch.Tensor) -> Batch:
        """Images with noise (B, C, H, W) at timesteps (B,); all weights are 1."""
        clean = encoded["clean"]
        noisy = self.process.noisy(clean, noise, timesteps)
        target = self.process.target(clean, noise, timesteps)
        weights = torch.ones(len(clean), device=clean.device)
        return Batch(noisy, timesteps, encoded["condition"], ranges, target, weights)


def _noise(shape: Sequence[int], random: np.random.Generator) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(torch_seed(random)))


class CleanImages:
    """One process's share of images that are encoded once and can be noised at any timestep.

    An image always gets the same noise at a timestep, independent of its noise at other timesteps. The stream
    determines all random draws. `batch_size` is that of a process.
    """

    def __init__(self, noiser: Noiser, stream: Stream, count: int, batch_size: int):
        self.noiser, self.stream, self.count, self.batch_size = noiser, stream, count, batch_size
        random = np.random.default_rng((*stream, ENCODING))
        indices = batch_indices(stream, len(noiser.images), 0, count)
        first, step = noiser.processes.process_index, noiser.processes.num_processes
        parts = []
        for start in range(0, count, ENCODED_AT_ONCE):
            encoded = noiser.encode(indices[start : start + ENCODED_AT_ONCE], random)
            parts.append(rows_of(encoded, slice((first - start) % step, None, step)))  # every step-th of all images
        noiser.encoder.rest()
        self.encoded = on_tensors(lambda *tensors: torch.cat(tensors), *parts)
        # int64, shape (S,): positions of this process's images among those of all processes
        self.places = torch.arange(first, count, step, device=self.encoded["clean"].device)

    def at(self, timestep: int, among: range) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Positions, int64 (B,), and noisy images of one timestep, in batches, of those `among` all images."""
        clean = self.encoded["clean"]
        random = np.random.default_rng((*self.stream, NOISE, timestep))
        noise = _noise((self.count, *clean.shape[1:]), random)  # for all images, whichever process has them
        noise = noise[self.places.cpu()].to(clean.device)
        inside = ((self.places >= among.start) & (self.places < among.stop)).nonzero().flatten()
        for chosen in inside.split(self.batch_size):
            if len(chosen) > 0:  # the share may be empty
                timesteps = torch.full_like(chosen, timestep, dtype=self.noiser.process.dtype)
                batch = self.noiser.batch(
                    rows_of(self.encoded, chosen), noise[chosen], timesteps, torch.zeros_like(chosen)
                )
                yield self.places[chosen], batch


def draw_probes(
    noiser: Noiser, ranges: Sequence[tuple[int, int]], stream: Stream, places: range, batch_size: int
) -> list[Batch]:
    """Noisy images whose timesteps are spread evenly over every range, so that few give a steady mean.

    `places` are positions in the shuffled images, which are assigned to the ranges in turn; with the stream they
    determine all random draws. A batch of `batch_size` is shared by all processes.
    """
    count = len(places)
    random = np.random.default_rng((*stream, places.start, count))
    numbers = np.arange(count) % len(ranges)
    timesteps = np.empty(count)
    for number, (low, high) in enumerate(ranges):
        mine = numbers == number
        strata = random.permutation(mine.sum())
        timesteps[mine] = low + (strata + 0.5) / max(1, len(strata)) * (high - low)
    indices = batch_indices(stream, len(noiser.images), places.start, count)
    share = slice(noiser.processes.process_index, None, noiser.processes.num_processes)
    batches = []
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        encoded = noiser.encode(indices[part], random)
        device = encoded["clean"].device
        noise = _noise(encoded["clean"].shape, random).to(device)
        at, number = (torch.from_numpy(values[part][share]).to(device) for values in (timesteps, numbers))
        batches.append(noiser.batch(rows_of(encoded, share), noise[share], at.to(noiser.process.dtype), number))
    noiser.encoder.rest()
    return batches
