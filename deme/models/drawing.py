"""Drawing images: one batch of seeds, from noise to pixels, with whatever the model is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DDPMScheduler

from deme.config.sections import Sample
from deme.method.sampling import NetworkAt, guided, sample_images
from deme.models.encoders import Condition, Encoder


@dataclass(frozen=True)
class Drawing:
    """How images are drawn."""

    scheduler: DDPMScheduler
    encoder: Encoder
    settings: Sample
    shape: tuple[int, int, int]  # (C, H, W) of what the network works on
    device: torch.device

    @cached_property
    def _negative(self) -> Condition:
        return self.encoder.condition([self.settings.negative_prompt])

    @property
    def passes(self) -> int:
        """Passes through the network for each image."""
        is_guided = self.encoder.takes_text and self.settings.guidance_scale != 1
        return self.settings.num_inference_steps * (1 + is_guided)

    def images(self, network_at: NetworkAt, seeds: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """The images of these seeds, each with its prompt if there are prompts: uint8, (B, C', H', W'), on the CPU."""
        settings = self.settings
        network = guided(network_at, self.encoder.condition(prompts), self._negative, settings.guidance_scale)
        sampler = (settings.num_inference_steps, settings.scheduler, settings.eta, settings.timestep_spacing)
        return self.encoder.decode(sample_images(network, self.scheduler, seeds, self.shape, self.device, *sampler))
