import numpy as np
import pytest
import torch
from accelerate import Accelerator
from noisy_images import RANGES, Linear, probes

from deme.analysis.landscape import axis, image_losses, plane_losses, range_sums
from deme.method.candidates import Candidates


def measured(points: int, keep=lambda name, make: make()):
    accelerator = Accelerator(cpu=True)
    networks = [Linear(seed) for seed in range(3)]
    base, first, second = (network.state_dict() for network in networks)
    candidates = Candidates(base, {"a": first, "b": second}, dict.fromkeys(base, 0), "cpu")
    batches = probes(accelerator)
    found = plane_losses(Linear(7), candidates, batches, len(RANGES), points, accelerator, keep)
    return found, [image_losses(network, batches) for network in networks], batches


def test_the_corners_are_the_three_networks_losses_exactly():
    """Those that are measured beside the plane, and those that a grid of 15 points meets."""
    found, losses, batches = measured(15)
    expected = np.stack([range_sums(values, batches, len(RANGES), Accelerator(cpu=True)) for values in losses]) / 15
    assert np.array_equal(found["corners"], expected)
    side = axis(15).tolist()
    zero, one = side.index(0), side.index(1)
    assert np.array_equal(found["losses"][zero, zero], expected[0])
    assert np.array_equal(found["losses"][one, zero], expected[1])
    assert np.array_equal(found["losses"][zero, one], expected[2])


def test_errors_of_the_experts_are_paired_by_image():
    found, losses, batches = measured(2)
    numbers = torch.cat([batch.ranges for batch in batches])
    pretrained, *experts = (torch.cat(values).double() for values in losses)
    for row, expert in zip(found["errors"], experts, strict=True):
        for k, error in enumerate(row):
            a, b = expert[numbers == k], pretrained[numbers == k]
            assert error == pytest.approx(float((a - b).std() / len(a) ** 0.5 / b.mean()))


def test_the_loss_of_a_linear_network_is_quadratic_on_the_plane():
    """All 25 points lie on the one quadratic form through them."""
    found, *_ = measured(5)
    first, second = (side.flatten() for side in np.meshgrid(axis(5), axis(5), indexing="ij"))
    columns = np.stack([np.ones(25), first, second, first**2, first * second, second**2], axis=1)
    losses = found["losses"].reshape(25, 2)
    solution, *_ = np.linalg.lstsq(columns, losses, rcond=None)
    assert columns @ solution == pytest.approx(losses, rel=1e-4)


def test_rows_are_kept():
    names = []
    measured(3, lambda name, make: names.append(name) or make())
    assert names == ["corners", "row-000", "row-001", "row-002"]
