from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from noisy_images import RANGES, probes, squares

from deme.errors import UserError
from deme.method.candidates import Candidates
from deme.search.probes import LOSS_BINS, make_squares

BASE = tiny_unet().state_dict()


def candidates(experts: int) -> Candidates:
    made = {f"range {k}": tiny_unet(k + 1).state_dict() for k in range(experts)}
    return Candidates(BASE, made, dict.fromkeys(BASE, 0), "cpu")


@pytest.mark.parametrize("name", ["match", "loss"])
def test_the_pretrained_network_has_the_value_1(name):
    network = tiny_unet(7)
    objective = squares(name, candidates(2), network, range(60))
    assert objective.value(tiny_unet()) == pytest.approx(1, abs=1e-5)
    assert objective.passes == 60


def test_match_is_0_for_an_expert_of_all_timesteps_and_the_share_of_its_range_for_one_of_several():
    made, network = candidates(1), tiny_unet(7)
    accelerator = Accelerator(cpu=True)
    objective = make_squares("match", probes(accelerator, ranges=[(0, 1000)]), made, network, 1000, accelerator)
    assert objective.value(tiny_unet(1)) < 1e-9
    ranges = squares("match", candidates(2), network)
    ranges.batches = [batch.part(batch.ranges == 0) for batch in ranges.batches]
    assert ranges.value(tiny_unet(1)) < 1e-9
    assert ranges.value(tiny_unet()) == pytest.approx(0.5, abs=1e-5)


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
    assert objective.value(tiny_unet(1)) == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-4)


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
    made.form(network, [[1e30, 1e30]])
    assert objective.value(network) == float("inf")


def test_an_expert_that_predicts_what_the_pretrained_network_does_is_refused():
    accelerator = Accelerator(cpu=True)
    network = tiny_unet()
    same = Candidates(BASE, {"a": tiny_unet(1).state_dict(), "b": BASE}, dict.fromkeys(BASE, 0), "cpu")
    with pytest.raises(UserError, match=r"^the expert of range 1 predicts what the pretrained network does$"):
        make_squares("match", probes(accelerator), same, network, 1000, accelerator)
    with pytest.raises(UserError, match=r"^no image falls into bin \d+ of 16 bins of timesteps$"):
        make_squares("loss", probes(accelerator, range(2), RANGES), same, network, 1000, accelerator)
