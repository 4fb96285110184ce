"""The training objective: the denoising loss and its weightings, the consistency loss to a teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deme.errors import UserError
from deme.method.process import Process, Range


def choose_ranges(ranges: Sequence[Range], total: int, global_probability: float, uniform: float) -> Sequence[Range]:
    """The ranges of one micro-batch, the paper's probabilistic sampling strategy.

    All of [0, T) if one draw from [0, 1) is below p, else `ranges`.
    """
    return [(0, total)] if uniform < global_probability else ranges


def decoupled_loss(
    student: nn.Module,
    teacher: nn.Module | None,
    process: Process,
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
    noisy = process.noisy(clean, noise, timesteps)
    prediction = student(noisy, timesteps, **condition, return_dict=False)[0].float()
    target = process.target(clean, noise, timesteps)
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

    The teacher of the distilled network, which is ours, not the paper's. `Process.draw` draws each part's timesteps
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
# What a network predicts determines its squared error from that of x₀. So a weighting is one function of the error of
# x₀ by the signal-to-noise ratio, SNR(t) = signal/noise, which holds for DDPM and for flow matching.
# To add one, add a line to `of_image`, and its name and its parameters to deme/config/trainings.py.


def loss_weights(weighting: str, process: Process, settings: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from timesteps (B,) to the factors of the prediction's squared errors: float32, shape (B,).

    The weightings of x₀'s error: constant (DDPM, SNR), snr_plus_one (SNR + 1) and truncated_snr (max(SNR, 1); Salimans
    and Ho 2022), min_snr (min(SNR, γ); Hang et al. 2023), p2 (SNR/(k + SNR)^γ; Choi et al. 2022). A training's settings
    have their parameters.
    """

    def raw(timesteps: torch.Tensor) -> torch.Tensor:
        signal, noise = process.signal_and_noise(timesteps)
        of_image = {  # times `noise`: always finite
            "constant": signal,
            "snr_plus_one": signal + noise,
            "truncated_snr": torch.maximum(signal, noise),
            "min_snr": torch.minimum(signal, settings.min_snr_gamma * noise),
            "p2": signal * (noise / (settings.p2_k * noise + signal)) ** settings.p2_gamma,
        }[weighting]
        return of_image / process.error_scale(signal, noise)

    every = process.quantiles()
    weights = raw(every)
    for timestep in every[~weights.float().isfinite()][:1]:
        signal, noise = process.signal_and_noise(timestep)
        raise UserError(
            f"{weighting} of {process.predicts}: infinite at timestep {timestep}, whose SNR is {signal / noise:.3g}"
        )
    mean = float(weights.mean()) if settings.normalize_loss_weighting else 1.0
    return lambda timesteps: (raw(timesteps) / mean).float()


class UncertaintyWeights(nn.Module):
    """ANT-UW (Kendall et al. 2018, Go et al. 2023): the mean of exp(−s) · error + s, with a learned s of each range."""

    def __init__(self, ranges: Sequence[Range]):
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(len(ranges)))
        self.register_buffer("starts", torch.tensor([low for low, _ in ranges[1:]], dtype=torch.int64), False)

    def forward(self, errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A scalar, which may be negative."""
        log_variances = self.log_variances[torch.bucketize(timesteps, self.starts.to(timesteps.dtype), right=True)]
        return (torch.exp(-log_variances) * errors + log_variances).mean()
