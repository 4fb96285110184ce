"""The loss on images that no training sees: what tells when a network has stopped improving."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn

from deme.data.draws import torch_seed
from deme.data.images import Examples
from deme.method.losses import decoupled_loss
from deme.models.encoders import Encoder

NOISE = 2  # what the generators are for
LEAST_FALL = 1e-3  # a loss that is lower by a smaller fraction has not fallen


@dataclass(frozen=True)
class HeldOut:
    """The images, and when their loss is measured."""

    images: Examples
    every: int  # optimizer steps
    patience: int | None  # training stops once so many measurements in a row did not fall; None: it goes on


@torch.no_grad()
def held_out_loss(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    encoder: Encoder,
    images: Examples,
    batch_size: int,
    accelerator: Accelerator,
) -> float:
    """The denoising loss on all images, over all processes, always with the same timesteps and noise.

    Args:
        unet: in eval mode, on the accelerator's device.
        batch_size: images per forward pass.
    """
    device = accelerator.device
    starts = range(0, len(images), batch_size)[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=device)
    generator = torch.Generator()
    with accelerator.autocast():
        for start in starts:
            batch = range(start, min(start + batch_size, len(images)))
            random = np.random.default_rng((NOISE, start))
            generator.manual_seed(torch_seed(random))
            torch.manual_seed(torch_seed(random))  # for the encoder's draws
            clean, condition = encoder.encode(images.batch(batch))
            # evenly spread over [0, T), so that few images give a steady mean
            timesteps = torch.arange(start, batch.stop) * scheduler.config.num_train_timesteps // len(images)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            loss, _ = decoupled_loss(unet, None, scheduler, clean, noise, timesteps.to(device), condition)
            total += loss * len(batch)
    return float(accelerator.reduce(total, "sum")) / len(images)


def has_fallen(loss: float, lowest: float | None) -> bool:
    """Whether a loss is clearly below the lowest of those measured before, if any."""
    return lowest is None or loss < (1 - LEAST_FALL) * lowest
