import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deme.method.timesteps import choose_interval, sample_timesteps


@given(batch=st.integers(1, 50), low=st.integers(0, 900), width=st.integers(1, 300), seed=st.integers(0, 99))
def test_second_half_mirrors_the_first(batch, low, width, seed):
    """⌈B/2⌉ draws, then ⌊B/2⌋ mirror images: t' = low + high − 1 − t; all in [low, high)."""
    high = low + width
    timesteps = sample_timesteps(batch, low, high, "cpu", torch.Generator().manual_seed(seed))
    assert timesteps.shape == (batch,)
    assert timesteps.dtype == torch.int64
    assert low <= timesteps.min()
    assert timesteps.max() < high
    half = batch // 2
    assert torch.equal(timesteps[batch - half :], low + high - 1 - timesteps[:half])


def test_draws_are_uniform():
    timesteps = sample_timesteps(100_000, 250, 500, "cpu", torch.Generator().manual_seed(0))
    counts = torch.bincount(timesteps - 250, minlength=250).float()
    assert counts.min() > 0.75 * 400
    assert counts.max() < 1.25 * 400


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.999999])
def test_probability_0_never_leaves_the_range_and_1_always_does(uniform):
    assert choose_interval((250, 500), 1000, 0.0, uniform) == (250, 500)
    assert choose_interval((250, 500), 1000, 1.0, uniform) == (0, 1000)


def test_probability_is_the_share_of_global_micro_batches():
    assert choose_interval((250, 500), 1000, 0.3, 0.2999) == (0, 1000)
    assert choose_interval((250, 500), 1000, 0.3, 0.3) == (250, 500)
