"""Images drawn while a network is trained, for a person to look at."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from deme.data.samples import save_grid
from deme.job.files import make_folder
from deme.method.sampling import sample_images
from deme.models.encoders import decode

IMAGES = 64
STEPS = 50


def save_preview(
    unet: nn.Module, scheduler: DDPMScheduler, device: torch.device, batch_size: int, folder: Path, step: int
) -> None:
    """Save a grid of images, from the same seeds each time, as previews/step-00005000.png in a run's folder.

    Args:
        batch_size: images that fit into memory.
    """
    size = unet.config.sample_size
    shape = (unet.config.in_channels, size, size)
    steps = min(STEPS, scheduler.config.num_train_timesteps)
    parts = [
        decode(sample_images(lambda _: unet, scheduler, seeds.tolist(), shape, device, steps))
        for seeds in torch.arange(IMAGES).split(batch_size)
    ]
    path = folder / "previews" / f"step-{step:08d}.png"
    make_folder(path.parent, "output_dir")
    save_grid(torch.cat(parts), path)
