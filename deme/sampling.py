"""DDIM sampling (Song et al. 2021, eq. 12) with one network call per step and one seed per image."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from deme.files import atomic_file

NetworkAt = Callable[[int], nn.Module]  # timestep → the UNet that is used there


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, shape (len(generators), *shape), each image from its own CPU generator.

    So an image's content depends on its seed alone, not on the batch, the device or the number of processes.
    """
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.inference_mode()
def sample_images(
    network_at: NetworkAt,
    scheduler: SchedulerMixin,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    device: torch.device | str,
    num_inference_steps: int,
    eta: float = 0.0,
) -> torch.Tensor:
    """One image per seed.

    Args:
        scheduler: the pretrained one; its betas, clipping and prediction type are kept, its spacing is "leading".
        shape: (C, H, W) of an image.
        eta: 0 for deterministic DDIM; otherwise the steps' noise comes from the image's own generator too.

    Returns:
        uint8 on the CPU, shape (len(seeds), C, H, W).
    """
    ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading")
    ddim.set_timesteps(num_inference_steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = initial_noise(generators, shape).to(device)
    timesteps_on_device = ddim.timesteps.to(device)  # a Python number would be copied there, and waited for, each step
    for timestep, on_device in zip(ddim.timesteps.tolist(), timesteps_on_device, strict=True):
        noise = initial_noise(generators, shape).to(device) if eta > 0 else None
        prediction = network_at(timestep)(images, on_device, return_dict=False)[0].float()
        images = ddim.step(prediction, timestep, images, eta=eta, variance_noise=noise).prev_sample
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def save_grid(images: torch.Tensor, path: Path) -> None:
    """Write a nearly square contact sheet of uint8 images (N, C, H, W); small ones are magnified to 32 pixels."""
    scale = max(1, 32 // images.shape[-1])
    magnified = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    sheet = make_grid(magnified, nrow=math.ceil(math.sqrt(len(images))), padding=2)
    with atomic_file(path) as temporary:
        to_pil_image(sheet).save(temporary, format="PNG")


def ensemble(unets: Sequence[nn.Module], ranges: Sequence[tuple[int, int]]) -> NetworkAt:
    """The ensemble before merging: at each timestep the network that was finetuned for its range [low, high)."""

    def network_at(timestep: int) -> nn.Module:
        [unet] = [unet for unet, (low, high) in zip(unets, ranges, strict=True) if low <= timestep < high]
        return unet

    return network_at
