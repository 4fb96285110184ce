"""Noisy images that are the same for every network measured on them, for any number of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import nn

from deme.data.images import Examples, Stream, batch_indices, torch_seed
from deme.job.processes import Processes
from deme.method.losses import prediction_target
from deme.models.encoders import Condition, Encoder

ENCODED_AT_ONCE = 32  # images; not a setting, because the encoder's random draws depend on it
NOISE, ENCODING = 5, 6  # purposes of generators; deme/data/images.py has the others


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch of noisy images; B of them."""

    noisy: torch.Tensor  # shape (B, C, H, W)
    timesteps: torch.Tensor  # int64, shape (B,)
    condition: Condition  # of the network
    ranges: torch.Tensor  # int64, shape (B,): index of the timestep's range
    target: torch.Tensor  # shape (B, C, H, W): noise, x₀ or v, as the network predicts
    weights: torch.Tensor  # shape (B,); of the squared distances, such that their sum is the objective

    def predict(self, network: nn.Module) -> torch.Tensor:
        """The network's prediction: float32, shape (B, C, H, W)."""
        return network(self.noisy, self.timesteps, **self.condition, return_dict=False)[0].float()

    def part(self, chosen: torch.Tensor | slice) -> "Batch":
        """The images selected by a mask of shape (B,) or by a slice."""
        condition = {name: value[chosen] for name, value in self.condition.items()}
        rest = (self.ranges, self.target, self.weights)
        return Batch(self.noisy[chosen], self.timesteps[chosen], condition, *(value[chosen] for value in rest))

    def losses(self, network: nn.Module) -> torch.Tensor:
        """The denoising loss of each image, averaged over its elements: float32, shape (B,)."""
        return (self.predict(network) - self.target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class CleanImages:
    """One process's share of images that are encoded once and can be noised at any timestep.

    An image always gets the same noise at a timestep, independent of its noise at other timesteps.
    """

    clean: torch.Tensor  # as the network sees images, shape (S, C, H, W), on the device
    condition: Condition  # of the network
    places: torch.Tensor  # int64, shape (S,): positions among the images of all processes
    count: int  # images of all processes
    scheduler: DDPMScheduler
    stream: Stream  # determines all random draws
    batch_size: int  # of a process

    def at(self, timestep: int, among: range) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Positions, int64 (B,), and noisy images of one timestep, in batches.

        Args:
            among: positions to use, over all processes.
        """
        random = np.random.default_rng((*self.stream, NOISE, timestep))
        noise = _noise((self.count, *self.clean.shape[1:]), random)  # for all images, whichever process has them
        noise = noise[self.places.cpu()].to(self.clean.device)
        inside = ((self.places >= among.start) & (self.places < among.stop)).nonzero().flatten()
        for chosen in inside.split(self.batch_size):
            if len(chosen) > 0:  # the share may be empty
                condition = {name: value[chosen] for name, value in self.condition.items()}
                at, ranges = torch.full_like(chosen, timestep), torch.zeros_like(chosen)
                batch = _batch(self.scheduler, self.clean[chosen], noise[chosen], at, condition, ranges)
                yield self.places[chosen], batch


def draw_clean(
    images: Examples,
    encoder: Encoder,
    scheduler: DDPMScheduler,
    stream: Stream,
    count: int,
    batch_size: int,
    processes: Processes,
) -> CleanImages:
    """Encode the first `count` of the shuffled images, `batch_size` per process at a time later on."""
    random = np.random.default_rng((*stream, ENCODING))
    indices = batch_indices(stream, len(images), 0, count)
    share = torch.arange(processes.process_index, count, processes.num_processes)
    tensors: list[torch.Tensor] = []
    conditions: list[Condition] = []
    for start in range(0, count, ENCODED_AT_ONCE):
        part = indices[start : start + ENCODED_AT_ONCE]
        clean, condition = _encode(encoder, images, part, random)
        mine = share[(share >= start) & (share < start + len(part))] - start
        tensors.append(clean[mine])
        conditions.append({name: value[mine] for name, value in condition.items()})
    encoder.rest()
    clean = torch.cat(tensors)
    return CleanImages(clean, _joined(conditions), share.to(clean.device), count, scheduler, stream, batch_size)


def draw_probes(
    images: Examples,
    encoder: Encoder,
    scheduler: DDPMScheduler,
    ranges: Sequence[tuple[int, int]],
    stream: Stream,
    places: range,
    batch_size: int,
    processes: Processes,
) -> list[Batch]:
    """Noisy images with weights 1 whose timesteps are spread evenly over every range, so that few give a steady mean.

    Args:
        stream: determines all random draws, together with `places`.
        places: positions in the shuffled images, which are assigned to the ranges in turn.
        batch_size: over all processes, each of which gets its share.
    """
    count = len(places)
    random = np.random.default_rng((*stream, places.start, count))
    numbers = np.arange(count) % len(ranges)
    timesteps = np.empty(count, dtype=np.int64)
    for number, (low, high) in enumerate(ranges):
        mine = numbers == number
        strata = random.permutation(mine.sum())
        timesteps[mine] = low + (strata + 0.5) / max(1, len(strata)) * (high - low)
    indices = batch_indices(stream, len(images), places.start, count)
    share = slice(processes.process_index, None, processes.num_processes)
    batches = []
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        clean, condition = _encode(encoder, images, indices[part], random)
        noise = _noise(clean.shape, random).to(clean.device)
        at, number = (torch.from_numpy(values[part][share]).to(clean.device) for values in (timesteps, numbers))
        condition = {name: value[share] for name, value in condition.items()}
        batches.append(_batch(scheduler, clean[share], noise[share], at, condition, number))
    encoder.rest()
    return batches


def regrouped(batches: Sequence[Batch], batch_size: int) -> list[Batch]:
    """The same noisy images in batches of another size."""
    names = ("noisy", "timesteps", "ranges", "target", "weights")
    columns = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    whole = Batch(condition=_joined([batch.condition for batch in batches]), **columns)
    return [whole.part(slice(start, start + batch_size)) for start in range(0, len(whole.noisy), batch_size)]


def _joined(conditions: Sequence[Condition]) -> Condition:
    return {name: torch.cat([part[name] for part in conditions]) for name in conditions[0]}


def _encode(
    encoder: Encoder, images: Examples, indices: np.ndarray, random: np.random.Generator
) -> tuple[torch.Tensor, Condition]:
    torch.manual_seed(torch_seed(random))  # for the encoder's draws
    clean, condition = encoder.encode(images.batch(indices, random))
    return clean, {name: value.float() for name, value in condition.items()}  # half precision on a GPU


def _noise(shape: Sequence[int], random: np.random.Generator) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(torch_seed(random)))


def _batch(
    scheduler: DDPMScheduler,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Condition,
    ranges: torch.Tensor,
) -> Batch:
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = prediction_target(scheduler, clean, noise, timesteps)
    return Batch(noisy, timesteps, condition, ranges, target, torch.ones(len(clean), device=clean.device))
