import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from deme.config.trainings import WEIGHTINGS, Finetune
from deme.errors import UserError
from deme.method.losses import UncertaintyWeights, loss_weights
from deme.method.process import DDPM, FlowMatching

PREDICTIONS = ("epsilon", "sample", "v_prediction")
USUAL = Finetune()
RAW = Finetune(normalize_loss_weighting=False)
OTHER = Finetune(normalize_loss_weighting=False, min_snr_gamma=3.0, p2_k=1.5, p2_gamma=0.5)
TABLE = {  # of the squared error of x₀, by the signal-to-noise ratio
    "constant": lambda snr: snr,
    "snr_plus_one": lambda snr: snr + 1,
    "truncated_snr": lambda snr: snr.clamp(min=1),
    "min_snr": lambda snr: snr.clamp(max=3),
    "p2": lambda snr: snr / (1.5 + snr) ** 0.5,
}


def process_with(alphas: torch.Tensor, prediction_type: str) -> DDPM:
    """A process whose ᾱ are these."""
    process = DDPM(DDPMScheduler(num_train_timesteps=len(alphas), prediction_type=prediction_type))
    process.scheduler.alphas_cumprod = alphas
    return process


def all_weights(weighting: str, alphas: torch.Tensor, prediction_type: str, settings: Finetune) -> torch.Tensor:
    """The factors at all timesteps."""
    return loss_weights(weighting, process_with(alphas, prediction_type), settings)(torch.arange(len(alphas)))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_three_prediction_types_weigh_the_same_error_of_the_image_equally(weighting):
    """The gradient of the weighted loss in the predicted x₀ is that of the table, whatever is predicted."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 40, 3, 2, 2, dtype=torch.float64)
    timesteps = torch.linspace(0, 999, 40).long()
    gradients = {}
    for prediction_type in PREDICTIONS:
        alphas = DDPMScheduler().alphas_cumprod.double()
        signal, rest = (part[timesteps].view(-1, 1, 1, 1).sqrt() for part in (alphas, 1 - alphas))
        guess = (clean + 0.1 * torch.ones_like(clean)).requires_grad_()  # of x₀
        of_noise = (signal * clean + rest * noise - signal * guess) / rest
        prediction = {"epsilon": of_noise, "sample": guess, "v_prediction": signal * of_noise - rest * guess}
        process = process_with(alphas, prediction_type)
        target = process.target(clean, noise, timesteps)
        errors = (prediction[prediction_type] - target).square().flatten(1).mean(1)
        weights = loss_weights(weighting, process, OTHER)
        gradients[prediction_type] = torch.autograd.grad((weights(timesteps) * errors).mean(), guess)[0]
    snr = compute_snr(DDPMScheduler(), timesteps).double().view(-1, 1, 1, 1)
    expected = TABLE[weighting](snr) * 2 * 0.1 / clean.numel() * torch.ones_like(clean)
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=0)  # SNR of alphas in float32


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_flow_matching_weighs_the_error_of_the_image_as_ddpm_does(weighting):
    """The gradient in the predicted x₀ = x_σ − σ v is that of the table, at SNR = ((1 − σ)/σ)²."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 40, 3, 2, 2, dtype=torch.float64)
    process, timesteps = FlowMatching(FlowMatchEulerDiscreteScheduler(shift=3.0)), torch.linspace(1, 999, 40)
    sigma = (timesteps.double() / 1000).view(-1, 1, 1, 1)
    guess = (clean + 0.1).requires_grad_()  # of x₀
    prediction = ((1 - sigma) * clean + sigma * noise - guess) / sigma
    errors = (prediction - process.target(clean, noise, timesteps)).square().flatten(1).mean(1)
    loss = (loss_weights(weighting, process, OTHER)(timesteps) * errors).mean()
    [gradient] = torch.autograd.grad(loss, guess)
    expected = TABLE[weighting](((1 - sigma) / sigma).square()) * 2 * 0.1 / clean.numel() * torch.ones_like(clean)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)
    usual = loss_weights(weighting, process, USUAL)
    assert float(usual(process.quantiles()).double().mean()) == pytest.approx(1, abs=1e-5)
    assert usual(torch.tensor([0.0, 1000.0])).isfinite().all()


def test_min_snr_of_v_is_not_what_diffusers_once_had():
    """min(SNR, γ)/(SNR + 1), not min(SNR + 1, γ)/(SNR + 1): they differ where SNR < γ."""
    alphas = torch.tensor([0.9, 0.75, 0.5, 0.1], dtype=torch.float64)  # SNR 9, 3, 1, 1/9
    found = all_weights("min_snr", alphas, "v_prediction", RAW)
    torch.testing.assert_close(found, torch.tensor([5 / 10, 3 / 4, 1 / 2, 0.1]))


def test_the_raw_weight_of_the_last_timestep_is_the_known_one():
    """SNR + 1 of the noise's error: 24,778 with DDPM's betas, 214.6 with Stable Diffusion's; else the mean is 1."""
    stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for options, last in (({}, 24_778), (stable, 214.6)):
        alphas = DDPMScheduler(**options).alphas_cumprod
        assert float(all_weights("snr_plus_one", alphas, "epsilon", RAW)[-1]) == pytest.approx(last, 1e-3)
        for weighting in WEIGHTINGS:
            assert float(all_weights(weighting, alphas, "epsilon", USUAL).double().mean()) == pytest.approx(1, abs=1e-5)


NOTHING, ALL = torch.tensor([0.0]), torch.tensor([1.0])  # ᾱ at SNR 0 and ∞
LIMITS = {  # at SNR 0 and ∞, of the errors of noise, image and v
    "constant": ((1, 0, 0), (1, math.inf, 1)),
    "snr_plus_one": ((math.inf, 1, 1), (1, math.inf, 1)),
    "truncated_snr": ((math.inf, 1, 1), (1, math.inf, 1)),
    "min_snr": ((1, 0, 0), (0, 5, 0)),
    "p2": ((1, 0, 0), (0, 1, 0)),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_limits_where_there_is_no_signal_and_where_there_is_no_noise(weighting):
    for alphas, limits in zip((NOTHING, ALL), LIMITS[weighting], strict=True):
        for prediction_type, limit in zip(PREDICTIONS, limits, strict=True):
            if limit == math.inf:
                with pytest.raises(UserError, match=f"^{weighting} of {prediction_type}: infinite at timestep 0"):
                    all_weights(weighting, alphas, prediction_type, RAW)
            else:
                found = all_weights(weighting, alphas, prediction_type, RAW)
                assert float(found) == pytest.approx(limit, abs=1e-12)


def test_zero_terminal_snr_has_weights_of_v():
    """diffusers' rescaled betas, whose last ᾱ is as good as 0."""
    alphas = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    for weighting in WEIGHTINGS:
        assert all_weights(weighting, alphas, "v_prediction", USUAL).isfinite().all()


def test_learned_weights_in_closed_form():
    """Each range's loss is scaled by exp(−s) with s added; s is at rest where it is the logarithm of the loss."""
    weighting = UncertaintyWeights([(0, 250), (250, 1000)])
    errors, timesteps = torch.tensor([2.0, 4.0, 0.5]), torch.tensor([0, 249, 250])
    assert weighting(errors, timesteps).item() == pytest.approx((2 + 4 + 0.5) / 3)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([math.log(3.0), math.log(0.5)]))
    loss = weighting(errors, timesteps)
    assert loss.item() == pytest.approx((6 / 3 + 2 * math.log(3) + 1 + math.log(0.5)) / 3)
    loss.backward()
    torch.testing.assert_close(weighting.log_variances.grad, torch.zeros(2), atol=1e-7, rtol=0)
