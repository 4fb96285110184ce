import copy

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMScheduler
from text_to_image import tiny_conditional_unet
from torch import nn

from deme.method.losses import Experts, decoupled_loss
from deme.method.process import DDPM

RANGES = [(0, 300), (300, 600), (600, 1000)]


class Offset(nn.Module):
    """Adds a constant, and notes what it was called with."""

    def __init__(self, offset: float):
        super().__init__()
        self.offset = offset
        self.seen = []

    def forward(self, noisy, timesteps, return_dict=True, **condition):
        self.seen.append((noisy, timesteps, condition))
        return (noisy + self.offset,)


def test_each_expert_predicts_its_part_and_is_called_once():
    """Seven images over three experts: 3, 2 and 2 of them, with their timesteps and their part of the condition."""
    offsets = [Offset(k) for k in range(3)]
    noisy, timesteps, texts = torch.randn(7, 1, 2, 2), torch.arange(7), torch.randn(7, 5, 4)
    (prediction,) = Experts(offsets)(noisy, timesteps, encoder_hidden_states=texts, return_dict=False)
    added = torch.tensor([0, 0, 0, 1, 1, 2, 2])[:, None, None, None]
    assert torch.equal(prediction, noisy + added)
    assert [len(expert.seen) for expert in offsets] == [1, 1, 1]
    assert [expert.seen[0][1].tolist() for expert in offsets] == [[0, 1, 2], [3, 4], [5, 6]]
    assert torch.equal(torch.cat([expert.seen[0][2]["encoder_hidden_states"] for expert in offsets]), texts)


@pytest.mark.parametrize("takes_text", [False, True])
def test_the_loss_is_the_mean_over_every_image_and_its_ranges_expert(takes_text):
    """Equal to one written by hand, image by image; no gradient reaches an expert."""
    make, channels, size = (tiny_conditional_unet, 4, 4) if takes_text else (tiny_unet, 1, 8)
    student, *experts = (make(seed) for seed in range(4))
    process = DDPM(DDPMScheduler())
    torch.manual_seed(0)
    timesteps = process.draw(7, RANGES, "cpu")
    clean, noise = torch.randn(2, 7, channels, size, size, generator=torch.Generator().manual_seed(1))
    condition = {"encoder_hidden_states": torch.randn(7, 6, 16)} if takes_text else {}
    _, loss = decoupled_loss(student, Experts(experts), process, clean, noise, timesteps, condition)

    noisy = process.scheduler.add_noise(clean, noise, timesteps)
    distances = []
    for i, timestep in enumerate(timesteps):
        expert = next(experts[k] for k, (low, high) in enumerate(RANGES) if low <= timestep < high)
        mine = {name: tensor[i : i + 1] for name, tensor in condition.items()}
        student_says, expert_says = (
            network(noisy[i : i + 1], timestep, **mine).sample for network in (student, expert)
        )
        distances.append((student_says - expert_says).square().mean())
    torch.testing.assert_close(loss, torch.stack(distances).mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for expert in experts for parameter in expert.parameters())


def test_a_student_that_is_the_only_expert_has_no_loss():
    student = tiny_unet()
    clean, noise = torch.randn(2, 4, 1, 8, 8)
    inputs = (DDPM(DDPMScheduler()), clean, noise, torch.tensor([0, 10, 500, 999]), {})
    _, loss = decoupled_loss(student, Experts([copy.deepcopy(student)]), *inputs)
    assert loss == 0
