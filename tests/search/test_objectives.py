from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from noisy_images import RANGES, probes, squares

from deme.config.sections import Sample
from deme.errors import UserError
from deme.measure.scores import FeatureSpace, Reference, frechet_distance, statistics
from deme.method.task_vectors import Candidates
from deme.search.distance import FrechetDistance
from deme.search.least_squares import LOSS_BINS, Squares
from deme.search.problem import Problem

BASE = tiny_unet().state_dict()
ZEROS = np.zeros((1, 2))
SIZE, COUNT = 8, 4_000
RANDOM = np.random.default_rng(0)
REAL = Reference(*statistics(RANDOM.normal(size=(COUNT, SIZE)) * 1.2), None)
PRETRAINED = RANDOM.normal(size=(COUNT, SIZE)) + 0.3
CANDIDATE = 0.95 * PRETRAINED + 0.02 * RANDOM.normal(size=(COUNT, SIZE))  # the same seeds give nearly the same images


def candidates(experts: int) -> Candidates:
    made = {f"range {k}": tiny_unet(k + 1).state_dict() for k in range(experts)}
    return Candidates(BASE, made, dict.fromkeys(BASE, 0), "cpu")


@pytest.mark.parametrize("name", ["match", "loss"])
def test_the_pretrained_network_has_the_value_1(name):
    network = tiny_unet(7)
    objective = squares(name, candidates(2), network, range(60))
    assert objective.value(ZEROS) == pytest.approx(1, abs=1e-5)
    assert objective.images == 60


def test_match_is_0_for_an_expert_of_all_timesteps_and_the_share_of_its_range_for_one_of_several():
    made, network = candidates(1), tiny_unet(7)
    accelerator = Accelerator(cpu=True)
    objective = Squares("match", probes(accelerator, ranges=[(0, 1000)]), made, network, 1000, accelerator)
    assert objective.value(np.ones((1, 1))) < 1e-9
    ranges = squares("match", candidates(2), network)
    ranges.batches = [batch.part(batch.ranges == 0) for batch in ranges.batches]
    assert ranges.value(np.array([[1, 0]])) < 1e-9
    assert ranges.value(ZEROS) == pytest.approx(0.5, abs=1e-5)


def test_loss_is_the_mean_over_bins_of_the_denoising_loss_relative_to_the_pretrained_network():
    made, network = candidates(2), tiny_unet(7)
    batches = probes(Accelerator(cpu=True), range(60))
    objective = squares("loss", made, network, range(60))
    losses = {}
    for seed in (0, 1):
        with torch.no_grad():
            parts = [(batch.predict(tiny_unet(seed)) - batch.target).square().flatten(1).sum(1) for batch in batches]
        losses[seed] = torch.cat(parts)
    bins = torch.cat([batch.timesteps for batch in batches]) * LOSS_BINS // 1000
    ratios = [losses[1][bins == n].sum() / losses[0][bins == n].sum() for n in range(LOSS_BINS)]
    assert objective.value(np.array([[1, 0]])) == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-4)


@pytest.mark.parametrize("count", [2, 30, 31])
def test_timesteps_are_spread_evenly_over_each_range(count):
    """One in each of as many equal parts of the range as it has images; the ranges differ by at most one image."""
    batches = probes(Accelerator(cpu=True), range(count), [(0, 300), (300, 1000)])
    timesteps, ranges = (torch.cat([getattr(b, name) for b in batches]) for name in ("timesteps", "ranges"))
    assert abs(int((ranges == 0).sum()) - int((ranges == 1).sum())) <= 1
    for number, (low, high) in enumerate([(0, 300), (300, 1000)]):
        mine = timesteps[ranges == number]
        parts = (mine - low) * len(mine) // (high - low)
        assert sorted(parts.tolist()) == list(range(len(mine)))


def test_the_shares_of_processes_make_up_the_batch_of_one():
    """Whatever is random in it; other positions give other noise."""
    whole = probes(SimpleNamespace(process_index=0, num_processes=1))
    shares = [probes(SimpleNamespace(process_index=rank, num_processes=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for name in ("noisy", "timesteps", "ranges", "target", "weights"):
            merged = torch.empty_like(getattr(batch, name))
            for rank, part in enumerate(parts):
                merged[rank::2] = getattr(part, name)
            assert torch.equal(merged, getattr(batch, name)), name
    other = probes(SimpleNamespace(process_index=0, num_processes=1), range(30, 60))
    assert not torch.equal(other[0].noisy, whole[0].noisy)


def test_a_network_that_is_not_finite_is_the_worst():
    """Not the best, which NaN is for numpy."""
    made, network = candidates(2), tiny_unet(7)
    objective = squares("match", made, network)
    assert objective.value(np.full((1, 2), 1e30)) == float("inf")


def test_an_expert_that_predicts_what_the_pretrained_network_does_is_refused():
    accelerator = Accelerator(cpu=True)
    network = tiny_unet()
    same = Candidates(BASE, {"a": tiny_unet(1).state_dict(), "b": BASE}, dict.fromkeys(BASE, 0), "cpu")
    with pytest.raises(UserError, match=r"^the expert of range 1 predicts what the pretrained network does$"):
        Squares("match", probes(accelerator), same, network, 1000, accelerator)
    with pytest.raises(UserError, match=r"^no image falls into bin \d+ of 16 bins of timesteps$"):
        Squares("loss", probes(accelerator, range(2), RANGES), same, network, 1000, accelerator)


# --- the distance with a control, on features that are drawn instead of images


def distance(control: np.ndarray | None) -> FrechetDistance:
    return FrechetDistance(None, None, FeatureSpace("classifier", None, REAL, None), [], control)


def plain(features: np.ndarray) -> float:
    return frechet_distance(*statistics(features), REAL.mu, REAL.sigma)


@pytest.mark.parametrize("count", [10, 50, 500, COUNT])
def test_the_pretrained_network_has_the_distance_of_all_images_of_the_control(count):
    found = distance(PRETRAINED).of_features(PRETRAINED[:count])
    assert found == pytest.approx(plain(PRETRAINED), rel=1e-9)


def test_as_many_images_as_the_control_need_no_correction():
    assert distance(PRETRAINED).of_features(CANDIDATE) == pytest.approx(plain(CANDIDATE), rel=1e-9)
    assert distance(None).of_features(CANDIDATE) == plain(CANDIDATE)


def test_a_candidate_that_shares_little_with_the_control_is_not_punished_for_it():
    """Images that are as good as the pretrained network's but have nothing to do with them: no bias."""
    other = RANDOM.normal(size=(COUNT, SIZE)) + 0.3
    found = []
    for start in range(0, COUNT, 100):
        order = np.r_[start:COUNT, 0:start]
        found.append(distance(PRETRAINED[order]).of_features(other[order][:100]))
    error = np.std(found) / len(found) ** 0.5
    assert np.mean(found) == pytest.approx(plain(other), abs=3 * error + 0.02)


def test_a_control_lets_few_images_tell_as_much_as_many():
    """Over 20 subsets of 100 images, the error is a tenth of that of the subset's own distance."""
    errors = {"with": [], "without": []}
    for start in range(0, 2_000, 100):
        order = np.r_[start:COUNT, 0:start]
        few, control = CANDIDATE[order][:100], PRETRAINED[order]
        errors["with"].append(distance(control).of_features(few) - plain(CANDIDATE))
        errors["without"].append(plain(few) - plain(CANDIDATE))
    with_control, without = (np.sqrt(np.mean(np.square(found))) for found in errors.values())
    assert with_control < 0.1 * without


def test_images_of_another_size_are_another_control():
    """Where the network takes any size, no other setting tells."""
    processes = SimpleNamespace(num_processes=1, device=torch.device("cpu"))

    def drawn_from(side: int) -> dict:
        drawing = SimpleNamespace(settings=Sample(), scales=(), shape=(16, side, side))
        plain = SimpleNamespace(drawing=drawing, conditions=[], space=SimpleNamespace(made_from={}))
        return Problem._drawn_from(SimpleNamespace(processes=processes), plain, range(8))

    assert drawn_from(32) == drawn_from(32) != drawn_from(64)
