import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from deme.method.losses import choose_ranges
from deme.method.process import DDPM


def seeded(seed: int, batch: int, ranges: list[tuple[int, int]]) -> torch.Tensor:
    torch.manual_seed(seed)
    return DDPM(DDPMScheduler()).draw(batch, ranges, "cpu")


@given(batch=st.integers(1, 50), low=st.integers(0, 900), width=st.integers(1, 300), seed=st.integers(0, 99))
def test_second_half_mirrors_the_first(batch, low, width, seed):
    """⌈B/2⌉ draws, then ⌊B/2⌋ mirror images: t' = low + high − 1 − t; all in [low, high)."""
    high = low + width
    timesteps = seeded(seed, batch, [(low, high)])
    assert timesteps.shape == (batch,)
    assert timesteps.dtype == torch.int64
    assert low <= timesteps.min()
    assert timesteps.max() < high
    half = batch // 2
    assert torch.equal(timesteps[batch - half :], low + high - 1 - timesteps[:half])


def test_draws_are_uniform():
    timesteps = seeded(0, 100_000, [(250, 500)])
    counts = torch.bincount(timesteps - 250, minlength=250).float()
    assert counts.min() > 0.75 * 400
    assert counts.max() < 1.25 * 400


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999999])
def test_probability_0_never_leaves_the_range_and_1_always_does(uniform):
    assert choose_ranges([(250, 500)], 1000, 0.0, uniform) == [(250, 500)]
    assert choose_ranges([(250, 500)], 1000, 1.0, uniform) == [(0, 1000)]


def test_probability_is_the_share_of_global_micro_batches():
    assert choose_ranges([(250, 500)], 1000, 0.3, 0.2999) == [(0, 1000)]
    assert choose_ranges([(250, 500)], 1000, 0.3, 0.3) == [(250, 500)]


@given(batch=st.integers(3, 40), seed=st.integers(0, 99))
def test_each_part_of_a_batch_is_antithetic_in_its_own_range(batch, seed):
    """Mirrored pairs, ranges of different widths: every part of even size stays in its range, pairs mean its middle."""
    ranges = [(0, 100), (100, 700), (700, 1000)]
    timesteps = seeded(seed, batch, ranges)
    assert timesteps.dtype == torch.int64
    parts = timesteps.tensor_split(3)
    assert sum(map(len, parts)) == batch
    for part, (low, high) in zip(parts, ranges, strict=True):
        assert low <= part.min()
        assert part.max() < high
        half = len(part) // 2
        assert torch.equal(part[len(part) - half :], low + high - 1 - part[:half])


def test_one_range_draws_what_it_always_drew():
    """So that the runs of a range are the same as before batches could be spread."""
    spread = seeded(5, 7, [(250, 500)])
    uniform = torch.randint(250, 500, (4,), generator=torch.Generator().manual_seed(5))
    assert torch.equal(spread, torch.cat([uniform, 749 - uniform[:3]]))
