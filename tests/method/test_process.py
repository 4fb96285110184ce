"""Flow matching: noisy images, targets, and the timesteps that are drawn. DDPM's are in the tests of losses."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from deme.errors import UserError
from deme.method.losses import Experts, UncertaintyWeights, decoupled_loss
from deme.method.process import FlowMatching, process_of

FLOW = FlowMatching(FlowMatchEulerDiscreteScheduler())
CLEAN, NOISE = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_the_noise_is_mixed_in_as_diffusers_does_it():
    """At the scheduler's own timesteps; σ is a thousandth of the timestep, also where a shift moved it."""
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        timesteps = scheduler.timesteps[[0, 10, 500, 999]]
        noisy = process_of(scheduler).noisy(CLEAN, NOISE, timesteps)
        torch.testing.assert_close(noisy, scheduler.scale_noise(CLEAN, timesteps, NOISE))


def test_the_target_leads_from_the_noise_to_the_image():
    """x_σ − σ v = x₀ and x_σ + (1 − σ) v = ε."""
    timesteps = torch.tensor([0.0, 10.0, 500.0, 999.5])
    sigma = (timesteps / 1000).view(-1, 1, 1, 1)
    noisy, velocity = FLOW.noisy(CLEAN, NOISE, timesteps), FLOW.target(CLEAN, NOISE, timesteps)
    torch.testing.assert_close(noisy - sigma * velocity, CLEAN)
    torch.testing.assert_close(noisy + (1 - sigma) * velocity, NOISE)


def test_draws_are_continuous_and_mirrored_in_each_range():
    ranges = [(0, 100), (100, 700), (700, 1000)]
    torch.manual_seed(0)
    timesteps = FLOW.draw(3 * 1001, ranges, "cpu")
    assert timesteps.dtype == torch.float32
    for part, (low, high) in zip(timesteps.tensor_split(3), ranges, strict=True):
        assert low <= part.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < part.max() < high
        assert len(part.unique()) > 990
        torch.testing.assert_close(part[501:] + part[:500], torch.full((500,), float(low + high)))


def test_no_draw_reaches_the_end_of_its_range(monkeypatch):
    """A share of 0, whose mirror image is 1."""
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.zeros(size, **options))
    low, below = FLOW.draw(2, [(500, 1000)], "cpu").tolist()
    assert low == 500
    assert 999.999 < below < 1000


def test_the_loss_holds_for_flow_matching():
    """A network that always predicts c has the mean of (c − (ε − x₀))²; experts and learned weights take its draws."""
    ranges = [(0, 500), (500, 1000)]
    timesteps = FLOW.draw(4, ranges, "cpu")

    class Constant(torch.nn.Module):
        def __init__(self, value: float):
            super().__init__()
            self.value = value

        def forward(self, noisy, timesteps, return_dict):
            return (torch.full_like(noisy, self.value),)

    weighting = UncertaintyWeights(ranges)
    teacher = Experts([Constant(0.5), Constant(1.0)])
    denoising, consistency = decoupled_loss(Constant(0.25), teacher, FLOW, CLEAN, NOISE, timesteps, {}, weighting)
    torch.testing.assert_close(denoising, (0.25 - (NOISE - CLEAN)).square().mean())
    torch.testing.assert_close(consistency, torch.tensor((0.25**2 + 0.75**2) / 2))


def test_an_unknown_scheduler_has_no_process():
    assert process_of(DDPMScheduler(num_train_timesteps=40)).total == 40
    with pytest.raises(UserError, match=r"^DDIMScheduler: not one of DDPMScheduler, FlowMatchEulerDiscreteScheduler$"):
        process_of(DDIMScheduler())
