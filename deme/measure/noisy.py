"""Noisy images, the same for every network that is measured on them, whatever the number of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn

from deme.data.images import Examples, Stream, batch_indices, torch_seed
from deme.method.losses import prediction_target
from deme.models.encoders import Condition, Encoder

ENCODED_AT_ONCE = 32  # images; not a setting, as what is random in the encoding depends on it
NOISE, ENCODING = 5, 6  # what a generator is for; the others are in data/draws.py


@dataclass(frozen=True)
class Batch:
    """One process's share of a batch of noisy images; B of them."""

    noisy: torch.Tensor  # shape (B, C, H, W)
    timesteps: torch.Tensor  # int64, shape (B,)
    condition: Condition  # of the network
    ranges: torch.Tensor  # int64, shape (B,): the number of the range that the timestep belongs to
    target: torch.Tensor  # shape (B, C, H, W): noise, x₀ or v, as the network predicts
    weights: torch.Tensor  # shape (B,); of the squared distances, such that their sum is the objective

    def predict(self, network: nn.Module) -> torch.Tensor:
        """What a network predicts: float32, shape (B, C, H, W)."""
        return network(self.noisy, self.timesteps, **self.condition, return_dict=False)[0].float()

    def part(self, chosen: torch.Tensor | slice) -> "Batch":
        """Those images that a mask of shape (B,), or a slice, chooses."""
        condition = {name: value[chosen] for name, value in self.condition.items()}
        rest = (self.ranges, self.target, self.weights)
        return Batch(self.noisy[chosen], self.timesteps[chosen], condition, *(value[chosen] for value in rest))

    def losses(self, network: nn.Module) -> torch.Tensor:
        """The denoising loss of each image, the mean over its elements: float32, shape (B,)."""
        return (self.predict(network) - self.target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class CleanImages:
    """One process's share of images that are encoded once, to which noise is added at any timestep.

    The noise of an image at a timestep is always the same, and independent of that at another.
    """

    clean: torch.Tensor  # as the network sees images, shape (S, C, H, W), on the device
    condition: Condition  # of the network
    places: torch.Tensor  # int64, shape (S,): which of all images they are
    count: int  # of the images of all processes
    scheduler: DDPMScheduler
    stream: Stream  # determines all that is random
    batch_size: int  # of a process

    def at(self, timestep: int, among: range) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Places, int64 (B,), and noisy images of one timestep, in batches.

        Args:
            among: which places, over all processes.
        """
        generator = torch.Generator().manual_seed(torch_seed(np.random.default_rng((*self.stream, NOISE, timestep))))
        noise = torch.randn(self.count, *self.clean.shape[1:], generator=generator)  # of all, whoever needs which
        noise = noise[self.places.cpu()].to(self.clean.device)
        inside = ((self.places >= among.start) & (self.places < among.stop)).nonzero().flatten()
        for chosen in inside.split(self.batch_size):
            if len(chosen) == 0:  # the share is empty
                continue
            clean = self.clean[chosen]
            timesteps = torch.full_like(chosen, timestep)
            yield (
                self.places[chosen],
                Batch(
                    noisy=self.scheduler.add_noise(clean, noise[chosen], timesteps),
                    timesteps=timesteps,
                    condition={name: value[chosen] for name, value in self.condition.items()},
                    ranges=torch.zeros_like(chosen),
                    target=prediction_target(self.scheduler, clean, noise[chosen], timesteps),
                    weights=torch.ones(len(chosen), device=clean.device),
                ),
            )


def draw_clean(
    images: Examples,
    encoder: Encoder,
    scheduler: DDPMScheduler,
    stream: Stream,
    count: int,
    batch_size: int,
    accelerator: Accelerator,
) -> CleanImages:
    """The first `count` of the shuffled images, encoded.

    Args:
        batch_size: images per forward pass of a process.
    """
    random = np.random.default_rng((*stream, ENCODING))
    indices = batch_indices(stream, len(images), 0, count)
    share = torch.arange(accelerator.process_index, count, accelerator.num_processes)
    tensors: list[torch.Tensor] = []
    conditions: list[Condition] = []
    for start in range(0, count, ENCODED_AT_ONCE):
        part = indices[start : start + ENCODED_AT_ONCE]
        torch.manual_seed(torch_seed(random))  # for the encoder's draws
        clean, condition = encoder.encode(images.batch(part, random))
        mine = share[(share >= start) & (share < start + len(part))] - start
        tensors.append(clean[mine])
        conditions.append({name: value[mine].float() for name, value in condition.items()})  # half on a GPU
    encoder.rest()
    clean = torch.cat(tensors)
    condition = {name: torch.cat([part[name] for part in conditions]) for name in conditions[0]}
    return CleanImages(clean, condition, share.to(clean.device), count, scheduler, stream, batch_size)


def draw_probes(
    images: Examples,
    encoder: Encoder,
    scheduler: DDPMScheduler,
    ranges: Sequence[tuple[int, int]],
    stream: Stream,
    places: range,
    batch_size: int,
    accelerator: Accelerator,
) -> list[Batch]:
    """Noisy images, whose timesteps are spread evenly over every range, so that few of them give a steady mean.

    Args:
        stream: with `places` it determines all that is random.
        places: which positions of the shuffled images; the images are taken in turn for each range.
        batch_size: over all processes, each of which gets its share.

    Returns:
        batches whose weights are 1 and whose targets are what the network is trained to predict.
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
    batches = []
    for start in range(0, count, batch_size):
        part = slice(start, min(start + batch_size, count))
        torch.manual_seed(torch_seed(random))  # for the encoder's draws
        clean, condition = encoder.encode(images.batch(indices[part], random))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(torch_seed(random)))
        noise = noise.to(clean.device)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        clean, noise = clean[share], noise[share]
        at, number = (torch.from_numpy(values[part][share]).to(clean.device) for values in (timesteps, numbers))
        batches.append(
            Batch(
                noisy=scheduler.add_noise(clean, noise, at),
                timesteps=at,
                condition={name: value[share].float() for name, value in condition.items()},  # half on a GPU
                ranges=number,
                target=prediction_target(scheduler, clean, noise, at),
                weights=torch.ones(len(clean), device=clean.device),
            )
        )
    encoder.rest()
    return batches


def regrouped(batches: Sequence[Batch], batch_size: int) -> list[Batch]:
    """The same noisy images in batches of another size."""

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    condition = {name: torch.cat([batch.condition[name] for batch in batches]) for name in batches[0].condition}
    rest = map(joined, ("ranges", "target", "weights"))
    whole = Batch(joined("noisy"), joined("timesteps"), condition, *rest)
    return [whole.part(slice(start, start + batch_size)) for start in range(0, len(whole.noisy), batch_size)]
