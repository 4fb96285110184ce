from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from noisy_images import RANGES, Linear, probes

from deme.analysis.landscape import axis, marks, plane_losses
from deme.config.experiment import Config
from deme.config.networks import Merge


def measured(points: int, keep=lambda name, make: make()):
    accelerator = Accelerator(cpu=True)
    networks = [Linear(seed) for seed in range(3)]
    batches = probes(accelerator)
    material = SimpleNamespace(processes=accelerator, network=Linear(7), ranges=RANGES, range_names=["a", "b"])
    material.experts = ["a", "b"]
    tensors = {name: network.state_dict() for name, network in zip(("pretrained", "a", "b"), networks, strict=True)}
    material.tensors, material.spread = tensors.get, lambda *_: batches
    material.settings = SimpleNamespace(landscape_ranges=None, landscape_points=points, landscape_images=30)
    found = plane_losses(material, keep)
    with torch.no_grad():
        losses = [torch.cat([batch.losses(network) for batch in batches]).double() for network in networks]
    return found, losses, torch.cat([batch.ranges for batch in batches])


def test_the_corners_are_the_three_networks_losses_exactly():
    """Those that are measured beside the plane, and those that a grid of 15 points meets."""
    found, losses, ranges = measured(15)
    expected = found["corners"]
    for row, values in zip(expected, losses, strict=True):
        assert row == pytest.approx([float(values[ranges == k].mean()) for k in range(len(RANGES))], rel=1e-12)
    side = axis(15).tolist()
    zero, one = side.index(0), side.index(1)
    assert np.array_equal(found["losses"][zero, zero], expected[0])
    assert np.array_equal(found["losses"][one, zero], expected[1])
    assert np.array_equal(found["losses"][zero, one], expected[2])


def test_errors_of_the_experts_are_paired_by_image():
    found, [pretrained, *experts], ranges = measured(2)
    for row, expert in zip(found["errors"], experts, strict=True):
        for k, error in enumerate(row):
            a, b = expert[ranges == k], pretrained[ranges == k]
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


def test_searched_coefficients_of_the_ranges_are_marked_whatever_is_merged(tmp_path):
    config = Config(output_dir=str(tmp_path), merge=Merge(experts=["self"]))
    names = config.timesteps.names
    hashes = {name: f"hash of {name}" for name in ("pretrained", *names)}
    content = {"coefficients": {"*": [0.1, 0.2, 0.3, 0.4]}, "pretrained": hashes["pretrained"]}
    content["finetuned"] = [hashes[name] for name in names]
    config.paths.search.mkdir(parents=True)
    config.paths.best_coefficients.write_text(yaml.safe_dump(content))
    material = SimpleNamespace(config=config, ranges=config.timesteps.ranges, range_names=names, hashes=hashes)
    material.settings, material.experts = config.analyze, names
    assert marks(material)["searched"] == (0.1, 0.4)
