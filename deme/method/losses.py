"""The training objective: the denoising loss plus the paper's consistency loss to a teacher."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from deme.errors import UserError
from deme.method.timesteps import even_sizes


def prediction_target(
    scheduler: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict, by the scheduler's `prediction_type`: the noise, x₀ or v, shape (B, C, H, W)."""
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
    """The denoising loss and the consistency loss to the teacher (0 without one), float32 scalars.

    Args:
        clean: images in [−1, 1] or latents, shape (B, C, H, W).
        noise: standard normal, same shape.
        timesteps: int64, shape (B,).
        condition: further arguments of both networks, by name.
        weighting: each image's squared error, shape (B,), and timesteps → the denoising loss; None: their mean.
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


class Experts(nn.Module):
    """Experts, lowest range first, that predict as one network: the k-th even part of a batch is the k-th expert's.

    The teacher of the distilled network, which is ours, not the paper's. Each expert is called once, on the part whose
    timesteps `spread_timesteps` draws from its range.
    """

    def __init__(self, experts: Sequence[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool = False, **condition: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """The predictions for images (B, C, H, W), B at least the number of experts, in a tuple as diffusers has it."""
        sizes = even_sizes(len(noisy), len(self.experts))
        conditions = {name: tensor.split(sizes) for name, tensor in condition.items()}
        predictions = []
        for k, (part, times) in enumerate(zip(noisy.split(sizes), timesteps.split(sizes), strict=True)):
            mine = {name: parts[k] for name, parts in conditions.items()}
            predictions.append(self.experts[k](part, times, **mine, return_dict=False)[0])
        return (torch.cat(predictions),)
