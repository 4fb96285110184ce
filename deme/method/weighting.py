"""Weightings of the denoising loss by timestep: the baselines that the paper compares with (table 1).

With the signal-to-noise ratio SNR(t) = ᾱ/(1 − ᾱ), the squared error of the noise is SNR times that of x₀, and that of v
is SNR + 1 times it. So a weighting is one function of the error of x₀, whatever the network predicts.

To add one, add a line to `of_v` below, and its name and its parameters to deme/config/sections.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deme.errors import UserError
from deme.method.timesteps import Range

SMALLEST = 1e-100  # stands for 0 in ᾱ and 1 − ᾱ, so that quotients have their limits


def loss_weights(weighting: str, alphas_cumprod: torch.Tensor, prediction_type: str, settings: Any) -> torch.Tensor:
    """The factor of the prediction's squared error at each timestep: float32, shape (T,).

    Args:
        weighting: of the error of x₀: constant (DDPM, SNR), snr_plus_one (SNR + 1) and truncated_snr (max(SNR, 1);
            Salimans and Ho 2022), min_snr (min(SNR, γ); Hang et al. 2023), p2 (SNR/(k + SNR)^γ; Choi et al. 2022).
        alphas_cumprod: ᾱ, shape (T,).
        settings: a training's, with the weightings' parameters.
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


class TimestepWeights(nn.Module):
    """The mean of squared errors, float32, shape (B,), each with the weight of its timestep.

    Args:
        weights: float32, shape (T,).
    """

    def __init__(self, weights: torch.Tensor):
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A scalar."""
        return (self.weights[timesteps] * errors).mean()


class UncertaintyWeights(nn.Module):
    """The mean of exp(−s) · error + s with a learned s for each range of timesteps, from 0: ANT-UW.

    Uncertainty weighting (Kendall et al. 2018) of timestep ranges as tasks (Go et al. 2023).

    Args:
        ranges: of timesteps, consecutive from 0.
    """

    def __init__(self, ranges: Sequence[Range]):
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(len(ranges)))
        self.register_buffer("starts", torch.tensor([low for low, _ in ranges[1:]], dtype=torch.int64), False)

    def forward(self, errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """A scalar, which may be negative."""
        log_variances = self.log_variances[torch.bucketize(timesteps, self.starts, right=True)]
        return (torch.exp(-log_variances) * errors + log_variances).mean()
