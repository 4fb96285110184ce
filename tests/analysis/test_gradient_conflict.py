from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from noisy_images import noiser
from torch import nn

from deme.analysis.gradient_conflict import (
    both_cosines,
    count_sketch,
    gradient_products,
    pairs_within,
    products_of_ranges,
)
from deme.measure.noisy import CleanImages

TIMESTEPS = [50, 400, 950]


class Line(nn.Module):
    """It predicts a · x + b."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))
        self.b = nn.Parameter(torch.tensor(0.1))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (self.a * noisy + self.b,)


def clean(count: int = 20, batch_size: int = 8, accelerator=None):
    return CleanImages(noiser(accelerator or Accelerator(cpu=True)), (0, 4), count, batch_size)


def made(name, make):
    """Nothing is kept."""
    return make()


def conflict(network, images, size=10**6, keep=made) -> np.ndarray:
    material = SimpleNamespace(processes=Accelerator(cpu=True), timesteps=TIMESTEPS, networks={"pretrained": None})
    material.settings = SimpleNamespace(sketch=size)
    material.load, material.clean = lambda _: network, lambda *_: images
    return gradient_products(material, keep)


def test_cosines_of_a_linear_network_are_those_of_its_gradients_in_closed_form():
    """∂L/∂a = mean of 2 (a x + b − y) x and ∂L/∂b = mean of 2 (a x + b − y)."""
    network, images = Line(), clean()
    found = conflict(network, images)
    halves = []
    for among in (range(10), range(10, 20)):
        rows = []
        for timestep in TIMESTEPS:
            batches = [batch for _, batch in images.at(timestep, among)]
            x, y = (torch.cat([getattr(batch, name) for batch in batches]).double() for name in ("noisy", "target"))
            residual = 2 * (0.7 * x + 0.1 - y)
            rows.append([float((residual * x).mean()), float(residual.mean())])
        halves.append(rows)
    first, second = np.array(halves)
    whole = (first + second) / 2
    directions = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    [products] = found["products"]
    assert both_cosines(products)["as measured"] == pytest.approx(directions @ directions.T, abs=1e-5)
    crossed = (first @ second.T + second @ first.T) / 2
    lengths = np.sqrt(np.diag(crossed))
    assert both_cosines(products)["noise-corrected"] == pytest.approx(crossed / np.outer(lengths, lengths), abs=1e-4)
    assert found["exact"].tolist() == [True]


def test_a_sketch_keeps_inner_products_within_its_bound():
    """On the average it has no error, and a standard deviation of at most √(2 / size) ‖x‖ ‖y‖; parts may be short."""
    random = np.random.default_rng(0)
    x, y = (torch.from_numpy(random.normal(size=700) ** 3) for _ in range(2))
    y = y + 0.5 * x
    found = []
    for seed in range(400):
        sketches = [
            count_sketch([vector[:10], vector[10:].reshape(30, 23)], 64, np.random.default_rng(seed))
            for vector in (x, y)
        ]
        assert len(sketches[0]) == 64
        found.append(float(sketches[0] @ sketches[1]))
    bound = (2 / 64) ** 0.5 * float(x.norm() * y.norm())
    assert np.std(found) < 1.1 * bound
    assert abs(np.mean(found) - float(x @ y)) < 4 * bound / len(found) ** 0.5
    assert torch.equal(count_sketch([x[:30], x[30:]], 700, random), x)


def test_a_networks_sketched_gradients_are_near_the_exact_ones():
    """Block by block, within five standard deviations; small blocks are exact."""
    network, images = tiny_unet(), clean(8)
    exact, sketched = conflict(network, images), conflict(network, images, 4000)
    assert exact["exact"].all()
    assert 0 < sketched["exact"].sum() < len(sketched["exact"])
    blocks = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "rest"]
    assert exact["groups"].tolist() == blocks
    for one, other, is_exact in zip(exact["products"], sketched["products"], sketched["exact"], strict=True):
        norms = np.sqrt(np.einsum("htht->ht", one))
        bound = 1e-4 if is_exact else 5 * (2 / 4000) ** 0.5
        assert (np.abs(other - one) <= bound * np.multiply.outer(norms, norms)).all()


def test_two_halves_remove_the_bias_of_noise():
    """Gradients at an angle of 60°, and noise three times as long: the measured cosine is far too low."""
    random = np.random.default_rng(0)
    signal = np.zeros((2, 200))
    signal[0, 0], signal[1, :2] = 1, (0.5, 0.75**0.5)
    products = np.zeros((2, 2, 2, 2))
    repeats = 4000
    for _ in range(repeats):
        halves = signal + 3 / 200**0.5 * random.normal(size=(2, *signal.shape))
        products += np.einsum("htd,kud->htku", halves, halves) / repeats
    assert both_cosines(products)["as measured"][0, 1] == pytest.approx(0.5 / (1 + 9 / 2), abs=0.02)
    assert both_cosines(products)["noise-corrected"] == pytest.approx(np.array([[1, 0.5], [0.5, 1]]), abs=0.02)


def test_what_is_not_told_from_noise_is_no_number():
    products = np.zeros((2, 2, 2, 2))
    products[0, :, 0] = products[1, :, 1] = np.eye(2)
    products[0, :, 1] = products[1, :, 0] = [[-0.1, 0], [0, 0.1]]
    found = both_cosines(products)["noise-corrected"]
    assert np.isnan(found[0]).all()
    assert found[1, 1] == pytest.approx(1)


def test_gradients_of_ranges_are_sums_over_their_timesteps():
    vectors = np.random.default_rng(0).normal(size=(2, 4, 5))
    products = np.einsum("htd,kud->htku", vectors, vectors)
    sums = np.stack([vectors[:, :1].sum(1), vectors[:, 1:].sum(1)], axis=1)
    found = products_of_ranges(products[None], np.array([[True, False, False, False], [False, True, True, True]]))
    assert found[0] == pytest.approx(np.einsum("hrd,ksd->hrks", sums, sums))


def test_pairs_within_a_range_are_those_of_different_timesteps_in_it():
    assert np.argwhere(pairs_within(np.array([False, True, True, False]))).tolist() == [[1, 2]]


def test_what_is_kept_of_a_timestep_is_not_computed_again():
    store: dict[str, dict] = {}
    calls = []

    def keep(name, make):
        if name not in store:
            calls.append(name)
            store[name] = make()
        return store[name]

    first = conflict(Line(), clean(), keep=keep)
    assert calls == ["0050", "0400", "0950"]
    del store["0400"]
    again = conflict(Line(), clean(), keep=keep)
    assert calls[3:] == ["0400"]
    assert np.array_equal(first["products"], again["products"])
