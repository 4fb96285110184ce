"""The training objective: the denoising loss plus the paper's consistency loss against the teacher."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from deme.errors import UserError


def prediction_target(
    scheduler: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict: the noise, x₀ or v, as the scheduler's `prediction_type` says.

    Args:
        clean, noise: shape (B, C, H, W).
        timesteps: int64, shape (B,).
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return clean
        case "v_prediction":
            return scheduler.get_velocity(clean, noise, timesteps)
        case other:
            raise UserError(f"unknown prediction_type {other!r}")


def decoupled_loss(
    student: nn.Module,
    teacher: nn.Module | None,
    scheduler: DDPMScheduler,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Mapping[str, torch.Tensor],
    weighting: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of the objective, each a float32 scalar: denoising loss, consistency loss.

    The teacher sees the same noisy input, without gradients; without a teacher the second term is 0.

    Args:
        student, teacher: UNets.
        clean: images in [−1, 1] or latents, shape (B, C, H, W).
        noise: standard normal, same shape.
        timesteps: int64, shape (B,).
        condition: what both networks are told beside, by the name of their argument.
        weighting: squared errors of the images, shape (B,), and timesteps → the denoising loss; None: their mean.
    """
    noisy = scheduler.add_noise(clean, noise, timesteps)
    prediction = student(noisy, timesteps, **condition, return_dict=False)[0].float()
    target = prediction_target(scheduler, clean, noise, timesteps)
    if weighting is None:
        denoising = F.mse_loss(prediction, target)
    else:
        denoising = weighting((prediction - target).square().flatten(1).mean(1), timesteps)
    if teacher is None:
        return denoising, torch.zeros_like(denoising)
    with torch.no_grad():
        reference = teacher(noisy, timesteps, **condition, return_dict=False)[0].float()
    return denoising, F.mse_loss(prediction, reference)
