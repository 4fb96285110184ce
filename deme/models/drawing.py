"""Draws a batch of images, from noise to pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import SchedulerMixin

from deme.config.sections import Sample
from deme.errors import UserError, naming
from deme.method.sampling import NetworkAt, guided, make_sampler, network_calls, sample_images, scaled, try_sampler
from deme.models.encoders import Condition, Encoder


def sampler_of(settings: Sample, scheduler: SchedulerMixin) -> SchedulerMixin:
    """The sampler of a schedule, with the pretrained noise schedule."""
    return make_sampler(scheduler, settings.scheduler, settings.timestep_spacing, settings.clip)


def passes_of(settings: Sample, scheduler: SchedulerMixin, takes_condition: bool) -> int:
    """Passes through the network for each image; guidance by texts or labels takes two at each call."""
    calls = network_calls(sampler_of(settings, scheduler), settings.num_inference_steps)
    return calls * (1 + (takes_condition and settings.guidance_scale != 1))


def try_samplers(
    drawn: Sequence[Sample], scheduler: SchedulerMixin, shape: tuple[int, int, int], key: str
) -> list[SchedulerMixin]:
    """The sampler of each schedule, after one step; no two may be the same. `key` is the setting that names them."""
    found = {}
    for one in drawn:
        with naming(key, one.scheduler if key == "sample.scheduler" else one.schedule):
            sampler = sampler_of(one, scheduler)
            try_sampler(sampler, one.num_inference_steps, shape)
            if (type(sampler), one.num_inference_steps) in found:
                raise UserError("is listed before, under another name")
            found[type(sampler), one.num_inference_steps] = sampler
    return list(found.values())


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: a batch of seeds, from noise to pixels."""

    scheduler: SchedulerMixin  # the pretrained one
    encoder: Encoder
    settings: Sample
    shape: tuple[int, int, int]  # (C, H, W) of what the network works on
    device: torch.device
    scales: Sequence[tuple[int, int, float]] = ()  # of the predicted noise, as `scaled` takes them

    @cached_property
    def _negative(self) -> Condition:
        return self.encoder.negative([self.settings.negative_prompt])

    @property
    def passes(self) -> int:
        """Passes through the network for each image."""
        return passes_of(self.settings, self.scheduler, self.encoder.takes_text or self.encoder.classes > 0)

    def images(self, network_at: NetworkAt, seeds: Sequence[int], prompts: Sequence[str | int]) -> torch.Tensor:
        """The images of these seeds, each of its prompt or label, if any: uint8, (B, C', H', W'), on the CPU."""
        settings = self.settings
        scaled_at = scaled(network_at, self.scales)
        network = guided(scaled_at, self.encoder.condition(prompts), self._negative, settings.guidance_scale)
        sampler, steps = sampler_of(settings, self.scheduler), settings.num_inference_steps
        return self.encoder.decode(sample_images(network, sampler, seeds, self.shape, self.device, steps, settings.eta))
