"""The training objective: timesteps, the denoising loss and its weightings, the consistency loss to a teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from deme.errors import UserError

Range = tuple[int, int]  # [low, high) of timesteps
SMALLEST = 1e-100  # stands for 0 in ᾱ and 1 − ᾱ, so that quotients have their limits


# --- timesteps: the paper's probabilistic sampling strategy, with antithetic pairs


def choose_ranges(ranges: Sequence[Range], total: int, global_probability: float, uniform: float) -> Sequence[Range]:
    """The ranges of one micro-batch: all of [0, T) if one draw from [0, 1) is below p, else `ranges`."""
    return [(0, total)] if uniform < global_probability else ranges


def spread_timesteps(
    batch_size: int, ranges: Sequence[Range], device: torch.device | str, antithetic: bool = True
) -> torch.Tensor:
    """Timesteps of a batch whose parts, those of tensor_split, each have their own range: int64, shape (batch_size,).

    The first ⌈n/2⌉ of a part are uniform; the others mirror them, t' = low + high − 1 − t, so that each pair's mean is
    the range's. With antithetic=False all are uniform and independent.
    """
    timesteps = torch.empty(batch_size, dtype=torch.int64, device=device)
    for part, (low, high) in zip(timesteps.tensor_split(len(ranges)), ranges, strict=True):
        mirrored = len(part) // 2 if antithetic else 0
        uniform = torch.randint(low, high, (len(part) - mirrored,), device=device)
        torch.cat([uniform, low + high - 1 - uniform[:mirrored]], out=part)
    return timesteps


# --- losses


def prediction_target(
    scheduler: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict, by the scheduler's `prediction_type`: the noise, x₀ or v, shape (B, C, H, W)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return {"epsilon": noise, "sample": clean}[scheduler.config.prediction_type]


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

    Clean images in [−1, 1], or latents, and noise have the shape (B, C, H, W); `condition` has further arguments of
    both networks. `weighting` makes the denoising loss of each image's squared error, shape (B,), and timesteps;
    without it the loss is their mean.
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
    """Experts, lowest range first, that predict as one network: the k-th part of a batch is the k-th expert's.

    The teacher of the distilled network, which is ours, not the paper's. `spread_timesteps` draws each part's timesteps
    from its expert's range.
    """

    def __init__(self, experts: Sequence[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool = False, **condition: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """The predictions for images (B, C, H, W), B at least the number of experts, in a tuple as diffusers has it."""
        parts = [tensor.tensor_split(len(self.experts)) for tensor in (noisy, timesteps, *condition.values())]
        predictions = []
        for expert, part, times, *values in zip(self.experts, *parts, strict=True):
            mine = dict(zip(condition, values, strict=True))
            predictions.append(expert(part, times, **mine, return_dict=False)[0])
        return (torch.cat(predictions),)


# --- weightings of the denoising loss by timestep: the baselines that the paper compares with (table 1)
#
# With the signal-to-noise ratio SNR(t) = ᾱ/(1 − ᾱ), the squared error of the noise is SNR times that of x₀, and that of
# v is SNR + 1 times it. So a weighting is one function of the error of x₀, whatever the network predicts.
# To add one, add a line to `of_v`, and its name and its parameters to deme/config/trainings.py.


def loss_weights(weighting: str, alphas_cumprod: torch.Tensor, prediction_type: str, settings: Any) -> torch.Tensor:
    """The factor of the prediction's squared error at each timestep, from ᾱ of shape (T,): float32, shape (T,).

    The weightings of x₀'s error: constant (DDPM, SNR), snr_plus_one (SNR + 1) and truncated_snr (max(SNR, 1); Salimans
    and Ho 2022), min_snr (min(SNR, γ); Hang et al. 2023), p2 (SNR/(k + SNR)^γ; Choi et al. 2022). A training's settings
    have their parameters.
    """
    signal = alphas_cumprod.double().clamp(min=SMALLEST)
    noise = (1 - alphas_cumprod.double()).clamp(min=SMALLEST)
    of_v = {  # the weight of x₀'s error over SNR + 1, that is times 1 − ᾱ: always finite
        "constant": signal,
        "snr_plus_one": torch.ones_like(signal),
        "truncated_snr": torch.maximum(signal, noise),
        "min_snr": torch.minimum(signal, settings.min_snr_gamma * noise),
        "p2": signal * (noise / (settings.p2_k * noise + signal)) ** settings.p2_gamma,
    }[weighting]
    per_error_of_v = {"epsilon": signal, "sample": noise, "v_prediction": torch.ones_like(signal)}
    weights = of_v / per_error_of_v[prediction_type]
    for timestep in (~weights.float().isfinite()).nonzero().flatten().tolist():
        ratio = float(signal[timestep] / noise[timestep])
        raise UserError(f"{weighting} of {prediction_type}: infinite at timestep {timestep}, whose SNR is {ratio:.3g}")
    if settings.normalize_loss_weighting:
        weights = weights / weights.mean()
    return weights.float()


class UncertaintyWeights(nn.Module):
    """ANT-UW (Kendall et al. 2018, Go et al. 2023): the mean of exp(−s) · error + s, with a learned s of each range."""

    def __init__(self, ranges: Sequence[Range]):
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(len(ranges)))
        self.register_buffer("starts", torch.tensor([low for low, _ in ranges[1:]], dtype=torch.int64), False)

    def forward(self, errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A scalar, which may be negative."""
        log_variances = self.log_variances[torch.bucketize(timesteps, self.starts, right=True)]
        return (torch.exp(-log_variances) * errors + log_variances).mean()
