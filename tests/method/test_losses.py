import pytest
import torch
from diffusers import DDPMScheduler

from deme.method.losses import decoupled_loss
from deme.method.process import DDPM

CLEAN = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
TIMESTEPS = torch.tensor([0, 10, 500, 999])


def targets(scheduler: DDPMScheduler) -> dict[str, torch.Tensor]:
    alpha = scheduler.alphas_cumprod[TIMESTEPS].sqrt()[:, None, None, None]
    sigma = (1 - scheduler.alphas_cumprod[TIMESTEPS]).sqrt()[:, None, None, None]
    return {"epsilon": NOISE, "sample": CLEAN, "v_prediction": alpha * NOISE - sigma * CLEAN}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_target_follows_the_prediction_type(prediction_type):
    """A constant prediction c gives mean (c − target)², for noise, x₀ and v = αε − σx₀."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    constant = 0.5
    denoising, consistency = decoupled_loss(
        lambda x, t, return_dict: (torch.full_like(x, constant),), None, DDPM(scheduler), CLEAN, NOISE, TIMESTEPS, {}
    )
    torch.testing.assert_close(denoising, (constant - targets(scheduler)[prediction_type]).square().mean())
    assert consistency == 0


def test_consistency_is_the_distance_to_the_teacher_on_the_same_input():
    scheduler, seen = DDPMScheduler(), []

    def network(offset):
        def predict(noisy, timesteps, return_dict):
            seen.append((noisy, timesteps))
            return (noisy + offset,)

        return predict

    _, consistency = decoupled_loss(network(0.0), network(0.25), DDPM(scheduler), CLEAN, NOISE, TIMESTEPS, {})
    torch.testing.assert_close(consistency, torch.tensor(0.0625))
    (student_input, student_t), (teacher_input, teacher_t) = seen
    assert torch.equal(student_input, teacher_input)
    assert torch.equal(student_t, teacher_t)
    torch.testing.assert_close(student_input, scheduler.add_noise(CLEAN, NOISE, TIMESTEPS))


def test_no_gradient_reaches_the_teacher():
    weight = {name: torch.ones((), requires_grad=True) for name in ("student", "teacher")}
    terms = decoupled_loss(
        lambda x, t, return_dict: (weight["student"] * x,),
        lambda x, t, return_dict: (2 * weight["teacher"] * x,),
        DDPM(DDPMScheduler()),
        CLEAN,
        NOISE,
        TIMESTEPS,
        {},
    )
    sum(terms).backward()
    assert weight["student"].grad != 0
    assert weight["teacher"].grad is None
