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

Predict = Callable[[torch.Tensor, int], torch.Tensor]  # (x_t, t) → prediction, both of shape (B, C, H, W)


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, shape (len(generators), *shape), each image from its own CPU generator.

    So an image's content depends on its seed alone, not on the batch, the device or the number of processes.
    """
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.inference_mode()
def sample_images(
    predict: Predict,
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
    images = initial_noise(generators, shape).to(device).contiguous(memory_format=torch.channels_last)
    for timestep in ddim.timesteps.tolist():
        noise = initial_noise(generators, shape).to(device) if eta > 0 else None
        prediction = predict(images, timestep).float()
        images = ddim.step(prediction, timestep, images, eta=eta, variance_noise=noise).prev_sample
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def save_grid(images: torch.Tensor, path: Path) -> None:
    """Write a nearly square contact sheet of uint8 images (N, C, H, W); small ones are magnified to 32 pixels."""
    scale = max(1, 32 // images.shape[-1])
    magnified = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    sheet = make_grid(magnified, nrow=math.ceil(math.sqrt(len(images))), padding=2)
    with atomic_file(path) as temporary:
        to_pil_image(sheet).save(temporary, format="PNG")


def single(unet: nn.Module) -> Predict:
    """The same network at every timestep."""
    return lambda noisy, timestep: unet(noisy, timestep, return_dict=False)[0]


def ensemble(unets: Sequence[nn.Module], ranges: Sequence[tuple[int, int]]) -> Predict:
    """The ensemble before merging: at each timestep the network that was finetuned for its range [low, high)."""

    def predict(noisy: torch.Tensor, timestep: int) -> torch.Tensor:
        [unet] = [unet for unet, (low, high) in zip(unets, ranges, strict=True) if low <= timestep < high]
        return unet(noisy, timestep, return_dict=False)[0]

    return predict
