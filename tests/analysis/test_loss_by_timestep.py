from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers import DDPMScheduler
from noisy_images import noiser

from deme.analysis.loss_by_timestep import losses_by_timestep, measure, relative_loss, relative_means
from deme.measure.noisy import CleanImages
from deme.method.losses import decoupled_loss
from deme.method.process import DDPM

TIMESTEPS = [100, 400, 600, 900]
INSIDE = np.array([[True, True, False, False], [False, False, True, True]])  # two ranges


def alone(rank: int = 0, processes: int = 1) -> SimpleNamespace:
    """One of several processes, which does not wait for the others."""
    same = {"reduce": lambda tensor, how: tensor, "device": torch.device("cpu")}
    return SimpleNamespace(process_index=rank, num_processes=processes, **same)


def losses(seed: int, accelerator=None, batch_size: int = 8) -> np.ndarray:
    accelerator = accelerator or Accelerator(cpu=True)
    images = CleanImages(noiser(accelerator), (0, 4), 20, batch_size)
    network = tiny_unet(seed)
    material = SimpleNamespace(processes=accelerator, network=network, timesteps=TIMESTEPS)
    material.tensors = lambda _: network.state_dict()
    return losses_by_timestep(material, "a", lambda: images, None)["losses"]


def test_the_losses_are_those_that_training_sees():
    images = CleanImages(noiser(Accelerator(cpu=True)), (0, 4), 20, 20)
    found = losses(1)
    assert found.shape == (4, 20)
    for row, timestep in zip(found, TIMESTEPS, strict=True):
        [(_, batch)] = images.at(timestep, range(20))
        noise = batch.target
        with torch.no_grad():
            parts = (images.encoded["clean"], noise, batch.timesteps, {})
            expected, _ = decoupled_loss(tiny_unet(1), None, DDPM(DDPMScheduler()), *parts)
        assert row.mean() == pytest.approx(float(expected), rel=1e-5)


def test_neither_batches_nor_processes_change_them():
    """Three processes, one of which has fewer images; batches of 8 and of 3; each fills its own places."""
    whole = losses(1)
    shares = [losses(1, alone(rank, 3), batch_size=3) for rank in range(3)]
    assert all((share == 0).any() for share in shares)
    assert sum(shares) == pytest.approx(whole, rel=1e-5)


def test_the_pretrained_network_is_1_everywhere():
    pretrained = losses(0)
    ratios, by_block = relative_loss(pretrained, pretrained)
    assert (ratios == 1).all()
    assert (by_block == 1).all()
    means, _ = relative_means(pretrained, pretrained, INSIDE)
    assert (means == 1).all()


def test_the_ensemble_is_each_expert_in_its_range():
    kept = {"pretrained": losses(0), "a": losses(1), "b": losses(2)}
    material = SimpleNamespace(
        networks=kept, range_names=["a", "b"], experts=["a", "b"], inside=INSIDE, timesteps=TIMESTEPS
    )
    material.keep = lambda name, networks, make: {"losses": kept[networks[0]]}
    found = measure(material)
    assert list(found) == ["pretrained", "ensemble", "a", "b"]
    assert np.array_equal(found["ensemble"], np.concatenate([kept["a"][:2], kept["b"][2:]]))


def test_means_of_ranges_are_means_of_ratios_with_errors_over_blocks():
    """In closed form: the ratio is 1.1 and 1.3 in the first range, whatever the loss; its blocks are alike there and
    differ by ± 0.1 in the second one."""
    pretrained = np.array([[1.0], [100.0], [2.0], [2.0]]).repeat(16, 1)
    blocks = np.repeat(np.tile([-0.1, 0.1], 4), 2)
    factors = np.stack([np.full(16, 1.1), np.full(16, 1.3), 0.9 + blocks, 0.9 + blocks])
    means, errors = relative_means(factors * pretrained, pretrained, INSIDE)
    assert means == pytest.approx([1.2, 0.9, 1.05])
    error = np.std([-0.1, 0.1] * 4, ddof=1) / 8**0.5
    assert errors == pytest.approx([0, error, error / 2], abs=1e-12)
