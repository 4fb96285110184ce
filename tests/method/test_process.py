"""Flow matching: noisy images, targets, and the timesteps that are drawn. DDPM's are in the tests of losses."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy.stats import ks_2samp, kstest, norm

from deme.config.sections import Timesteps
from deme.errors import UserError
from deme.method.losses import Experts, UncertaintyWeights, decoupled_loss
from deme.method.process import FlowMatching, new_scheduler, process_of

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


def density(**settings) -> FlowMatching:
    """A process with the shift 3 and these settings of `timesteps`."""
    return FlowMatching(FlowMatchEulerDiscreteScheduler(shift=3.0), Timesteps(**settings))


def below(process: FlowMatching, timesteps: np.ndarray) -> np.ndarray:
    """The distribution function over all timesteps, written with scipy."""
    settings, shift = process.settings, process.shift
    if settings is None:
        return timesteps / (1000 * shift - (shift - 1) * timesteps)
    odds = timesteps / (1000 - timesteps) / shift
    return norm.cdf((np.log(odds) + settings.logit_mean) / settings.logit_std)


LOGIT_NORMAL = {"density": "logit_normal", "logit_mean": 0.7, "logit_std": 0.8}


@pytest.mark.parametrize("settings", [{}, {"shift": 1.0}, LOGIT_NORMAL, LOGIT_NORMAL | {"shift": 0.5}])
def test_the_density_is_that_of_diffusers_training_scripts(settings):
    """They draw u, take scheduler.timesteps[u T], which fall from T and are shifted."""
    process = density(**settings)
    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling(process.settings and "logit_normal", 20_000, 0.7, 0.8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=process.shift)
    theirs = scheduler.timesteps[(u * 1000).long()]
    ours = process.draw(20_000, [(0, 1000)], "cpu", antithetic=False)
    assert ks_2samp(ours, theirs).pvalue > 0.01
    is_symmetric = settings == {"shift": 1.0}
    assert ks_2samp(1000 - ours, theirs).pvalue < 1e-6 or is_symmetric  # the other direction


@pytest.mark.parametrize("settings", [{}, LOGIT_NORMAL, LOGIT_NORMAL | {"logit_std": 0.3}])
@pytest.mark.parametrize("edges", [(0, 250), (250, 500), (900, 1000), (998, 999)])
def test_the_density_is_restricted_to_a_range_and_mirrored_there(settings, edges):
    """Its distribution function is (F(t) − F(low))/(F(high) − F(low)), where a pair has the shares p and 1 − p."""
    process, ends = density(**settings), np.array(edges, dtype=float)
    torch.manual_seed(1)
    drawn = process.draw(4000, [edges], "cpu").double().numpy()
    assert ends[0] <= drawn.min() < drawn.max() < ends[1]
    with np.errstate(divide="ignore"):
        first, last = below(process, ends)
        if last - first < 1e-9:  # an upper tail, where scipy's shares cancel
            return
        shares = (below(process, drawn) - first) / (last - first)
    assert kstest(shares[:2000], "uniform").pvalue > 0.01
    np.testing.assert_allclose(shares[:2000] + shares[2000:], 1, atol=2e-3)


def test_quantiles_in_closed_form():
    """The median of the logit-normal density is where logit(σ) = ln s − logit_mean; of the uniform one s/(1 + s)."""
    tilted = math.exp(-0.7)
    for settings, odds in (({}, 3.0), (LOGIT_NORMAL, 3 * tilted), (LOGIT_NORMAL | {"shift": 0.5}, 0.5 * tilted)):
        middle = density(**settings).quantiles()[499:501].double().mean()
        assert float(middle) == pytest.approx(1000 * odds / (1 + odds), rel=1e-3)


def test_the_upper_tail_is_drawn_as_well_as_the_lower_one():
    """20 standard deviations out, where shares round to 1: the mirror image of the lower tail."""
    lower, upper = (density(density="logit_normal", logit_std=0.2, logit_mean=mean, shift=1.0) for mean in (-2.0, 2.0))
    torch.manual_seed(2)
    low = lower.draw(1000, [(1, 100)], "cpu", antithetic=False)
    torch.manual_seed(2)
    high = upper.draw(1000, [(900, 999)], "cpu", antithetic=False)
    assert len(low.unique()) > 900
    assert ks_2samp(low, 1000 - high).pvalue > 0.01


def test_a_range_from_which_as_good_as_nothing_is_drawn_is_refused():
    process = density(density="logit_normal", logit_std=0.01)
    with pytest.raises(UserError, match=r"^timesteps\.logit_std=0\.01: as good as no timestep of \[0, 250\) is drawn$"):
        process.draw(2, [(0, 250)], "cpu")


@pytest.mark.parametrize("settings", [{"density": "logit_normal"}, {"shift": 3.0}])
def test_ddpm_has_no_other_density(settings):
    [(key, value)] = settings.items()
    with pytest.raises(UserError, match=f"^timesteps.{key}={value}: the network was not trained by flow matching$"):
        process_of(DDPMScheduler(), Timesteps(**settings))
    assert process_of(DDPMScheduler(), Timesteps()).predicts == "epsilon"


def test_a_scheduler_is_made_by_its_class():
    flow = new_scheduler(500, _class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)
    assert (flow.config.num_train_timesteps, flow.config.shift) == (500, 3.0)
    assert new_scheduler(40, beta_end=0.03).config.beta_end == 0.03
    with pytest.raises(UserError, match=r"^_class_name=EulerDiscreteScheduler: not one of DDPMScheduler, FlowMatch"):
        new_scheduler(40, _class_name="EulerDiscreteScheduler")
