"""The loss on held-out images and the preview images of a network in training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn

from deme.data.images import Examples, torch_seed
from deme.data.samples import save_grid
from deme.job.files import make_folder
from deme.method.losses import decoupled_loss
from deme.method.sampling import guided, sample_images
from deme.models.encoders import Encoder

NOISE = 2  # the purpose that the generators' seeds name
PREVIEW_IMAGES = 64  # of a network that takes no text
PREVIEW_STEPS = 50
PREVIEW_GUIDANCE = 7.5


@dataclass(frozen=True)
class HeldOut:
    """The held-out images, and when their loss is measured."""

    images: Examples
    every: int  # optimizer steps
    patience: int | None  # training stops once so many measurements in a row did not fall; None: it goes on


@torch.no_grad()
def held_out_loss(
    denoiser: nn.Module,
    scheduler: DDPMScheduler,
    encoder: Encoder,
    images: Examples,
    batch_size: int,
    accelerator: Accelerator,
) -> float:
    """The denoising loss on all images, over all processes, always with the same timesteps and noise.

    Args:
        denoiser: in eval mode, on the accelerator's device.
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
            # evenly spread over [0, T): few images then give a steady mean
            timesteps = torch.arange(start, batch.stop) * scheduler.config.num_train_timesteps // len(images)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            loss, _ = decoupled_loss(denoiser, None, scheduler, clean, noise, timesteps.to(device), condition)
            total += loss * len(batch)
    return float(accelerator.reduce(total, "sum")) / len(images)


def save_preview(
    denoiser: nn.Module,
    scheduler: DDPMScheduler,
    encoder: Encoder,
    prompts: Sequence[str],
    device: torch.device,
    batch_size: int,
    path: Path,
) -> None:
    """Save a grid of images, drawn from the same seeds each time.

    Args:
        prompts: one per image, if the network takes text.
        batch_size: images that fit into memory.
    """
    config = denoiser.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    steps = min(PREVIEW_STEPS, scheduler.config.num_train_timesteps)
    count = len(prompts) if encoder.takes_text else PREVIEW_IMAGES
    parts = []
    for start in range(0, count, batch_size):
        seeds = range(start, min(start + batch_size, count))
        texts = [prompts[seed] for seed in seeds] if encoder.takes_text else []
        conditions = encoder.condition(texts), encoder.condition([""])
        network_at = guided(lambda _: denoiser, *conditions, PREVIEW_GUIDANCE)
        parts.append(encoder.decode(sample_images(network_at, scheduler, seeds, shape, device, steps)))
    encoder.rest()
    make_folder(path.parent, "output_dir")
    save_grid(torch.cat(parts), path)
