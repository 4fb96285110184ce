"""Images drawn while a network is trained, for a person to look at."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from deme.data.samples import save_grid
from deme.job.files import make_folder
from deme.method.sampling import guided, sample_images
from deme.models.encoders import Encoder

IMAGES = 64  # where the network takes no text
STEPS = 50
GUIDANCE = 7.5


def save_preview(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    encoder: Encoder,
    prompts: Sequence[str],
    device: torch.device,
    batch_size: int,
    folder: Path,
    step: int,
) -> None:
    """Save a grid of images, from the same seeds each time, as previews/step-00005000.png in a run's folder.

    Args:
        prompts: where the network takes text; image i has the i-th, and they are as many images as prompts.
        batch_size: images that fit into memory.
    """
    size = unet.config.sample_size
    shape = (unet.config.in_channels, size, size)
    steps = min(STEPS, scheduler.config.num_train_timesteps)
    parts = []
    for seeds in torch.arange(len(prompts) if encoder.takes_text else IMAGES).split(batch_size):
        seeds = seeds.tolist()
        texts = [prompts[seed] for seed in seeds] if encoder.takes_text else []
        network_at = guided(lambda _: unet, encoder.condition(texts), encoder.condition([""]), GUIDANCE)
        parts.append(encoder.decode(sample_images(network_at, scheduler, seeds, shape, device, steps)))
    encoder.rest()
    path = folder / "previews" / f"step-{step:08d}.png"
    make_folder(path.parent, "output_dir")
    save_grid(torch.cat(parts), path)
