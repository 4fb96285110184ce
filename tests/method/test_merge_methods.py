"""Each merge method in closed form, beside the properties that all of them have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deme.config.networks import MERGE_METHODS, WITH_STATISTICS
from deme.errors import UserError
from deme.method.task_vectors import merge_method, merge_tensors

TWO = [0.5, 0.5]
METHODS = sorted({*MERGE_METHODS} - {*WITH_STATISTICS})  # tests/measure/test_merge_statistics.py has the others
SHAPES = [(), (1,), (7,), (2, 3), (4, 6), (3, 2, 3, 3)]
NOTHING = {"dare_ties": {"density": 1}, "della": {"density": 1, "epsilon": 0}}  # is dropped


def merged(name, base, experts, coefficients, key="w", **given):
    """The tensor that a method makes of tensors or nested lists."""
    base, *experts = (torch.as_tensor(values, dtype=torch.float32) for values in (base, *experts))
    named = {f"expert {k}": {key: tensor} for k, tensor in enumerate(experts)}
    [(_, tensor)] = merge_tensors({key: base}, named, {key: coefficients}, merge_method(name, given))
    return tensor


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(METHODS), seed=st.integers(0, 999), shape=st.sampled_from(SHAPES))
def test_networks_that_equal_the_pretrained_one_merge_to_it(name, seed, shape):
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tensor = merged(name, base, [base, base], TWO)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor, base, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(METHODS), seed=st.integers(0, 999), shape=st.sampled_from(SHAPES))
def test_the_same_merge_twice_gives_the_same_bits(name, seed, shape):
    base, *experts = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
    first, second = (merged(name, base, experts, TWO) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(METHODS), seed=st.integers(0, 999))
def test_a_scalar_is_a_vector_with_one_entry(name, seed):
    """Such as a logit_scale."""
    base, *experts = torch.randn(3, 1, generator=torch.Generator().manual_seed(seed))
    scalar = merged(name, base[0], [expert[0] for expert in experts], TWO)
    assert scalar.shape == ()
    assert torch.equal(scalar, merged(name, base, experts, TWO)[0])


@pytest.mark.parametrize(
    ("name", "everything"),
    [
        ("magnitude_prune", {"density": 1}),
        ("breadcrumbs", {"smallest": 0, "largest": 0}),
        ("dare_linear", {"density": 1}),
    ],
)
def test_without_dropping_it_is_task_arithmetic(name, everything):
    base, *experts = torch.randn(4, 5, 6)
    coefficients = [0.7, -0.2, 1.5]
    expected = merged("task_arithmetic", base, experts, coefficients)
    torch.testing.assert_close(merged(name, base, experts, coefficients, **everything), expected)


@pytest.mark.parametrize(
    ("name", "everything"), [("dare_ties", {"density": 1}), ("della", {"density": 1, "epsilon": 0})]
)
def test_without_dropping_it_is_ties(name, everything):
    base, *experts = torch.randn(4, 5, 6)
    coefficients = [0.7, -0.2, 1.5]
    expected = merged("ties", base, experts, coefficients, fraction=1)
    torch.testing.assert_close(merged(name, base, experts, coefficients, **NOTHING[name]), expected)


def test_magnitude_prune_keeps_the_largest():
    tensor = merged("magnitude_prune", [1, 1, 1, 1.0], [[2, 1.5, -3, 1]], [2], density=0.5)
    assert tensor.tolist() == [3, 1, -7, 1]  # of the vector 1, 0.5, −4, 0


def test_breadcrumbs_leave_out_both_ends():
    tensor = merged("breadcrumbs", torch.zeros(100), [torch.arange(1, 101.0)], [1])
    assert tensor.nonzero().flatten().tolist() == list(range(85, 99))


def test_dare_keeps_a_random_share_and_rescales_it():
    vector = torch.randn(20_000) + 3
    tensor = merged("dare_linear", torch.zeros(20_000), [vector], [1], density=0.25)
    kept = tensor != 0
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 20_000))
    torch.testing.assert_close(tensor[kept], 4 * vector[kept])
    assert not torch.equal(tensor, merged("dare_linear", torch.zeros(20_000), [vector], [1], density=0.25, seed=1))
    assert not torch.equal(tensor, merged("dare_linear", torch.zeros(20_000), [vector], [1], "v", density=0.25))


def test_della_keeps_larger_numbers_of_a_row_more_often_and_divides_by_their_chance():
    rows = torch.arange(1, 12.0).repeat(4_000, 1)  # chances 0.4, 0.42, …, 0.6
    tensor = merged("della", torch.zeros_like(rows), [rows], [1], density=0.5, epsilon=0.2)
    chances = torch.linspace(0.4, 0.6, 11)
    shares = (tensor != 0).float().mean(dim=0)
    assert (shares - chances).abs().max() < 5 * math.sqrt(0.25 / 4_000)
    torch.testing.assert_close(tensor.max(dim=0).values, torch.arange(1, 12.0) / chances)


def test_slerp_goes_along_the_arc():
    north, east = [0, 2.0], [2.0, 0]
    assert merged("slerp", [9, 9.0], [north, east], TWO).tolist() == pytest.approx([math.sqrt(2)] * 2)
    third = merged("slerp", [9, 9.0], [north, east], [2 / 3, 1 / 3])
    assert third.tolist() == pytest.approx([1, math.sqrt(3)])
    assert merged("slerp", [9, 9.0], [north, east], [1, 0]).tolist() == pytest.approx(north)
    assert merged("slerp", [9, 9.0], [north, [0, 4]], TWO).tolist() == pytest.approx([0, 3])  # parallel: a line
    with pytest.raises(UserError, match="takes two networks, not 1"):
        merged("slerp", [9, 9.0], [north], [1])
    with pytest.raises(UserError, match=r"needs the coefficients 1 − t and t, not \[1, 1\]"):
        merged("slerp", [9, 9.0], [north, east], [1, 1])


@pytest.mark.parametrize(
    ("other", "share"),
    [([1, 0], 1), ([0, 1], 0), ([0.5, math.sqrt(0.75)], 2 / 3), ([-1, 0], 0)],  # 2 · 0.5 / (1 + 0.5)
)
def test_model_stock_shrinks_by_the_angle_between_the_networks(other, share):
    expected = share * (torch.tensor([1.0, 0]) + torch.tensor(other)) / 2
    tensor = merged("model_stock", [0, 0.0], [[1, 0], other], TWO)
    torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert merged("model_stock", [0, 0.0], [[3, 4]], [1]).tolist() == [3, 4]  # nothing to disagree with


def test_tsv_adds_task_vectors_that_do_not_interfere_and_makes_others_orthogonal():
    first, second = torch.zeros(2, 4, 4)
    first[:2, :2], second[2:, 2:] = torch.tensor([[3.0, 1], [0, 2]]), torch.tensor([[1.0, 0], [4, 5]])
    torch.testing.assert_close(merged("tsv", torch.zeros(4, 4), [first, second], [1, 2]), first + 2 * second)
    experts = torch.randn(2, 6, 4)
    values = torch.linalg.svdvals(merged("tsv", torch.zeros(6, 4), experts, [1, 1]))
    kept = torch.cat([torch.linalg.svdvals(expert)[:2] for expert in experts])
    torch.testing.assert_close(values, kept.sort(descending=True).values)  # as if no direction were shared
    torch.testing.assert_close(merged("tsv", torch.zeros(6, 4), experts[:1], [1]), experts[0], rtol=1e-4, atol=1e-5)


def test_iso_c_gives_the_sum_equal_singular_values():
    experts = torch.randn(2, 6, 2, 2, 2)
    total = (experts[0] - 0.5 * experts[1]).flatten(1)
    tensor = merged("iso_c", torch.zeros(6, 2, 2, 2), experts, [1, -0.5]).flatten(1)
    values = torch.linalg.svdvals(total)
    torch.testing.assert_close(torch.linalg.svdvals(tensor), values.mean().expand(6))
    assert float((tensor * total).sum()) == pytest.approx(float(values.mean() * values.sum()), rel=1e-4)  # same vectors


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("magnitude_prune", {"density": 0}, r"density=0.0: must lie in \(0, 1\]"),
        ("breadcrumbs", {"largest": 1}, r"largest=1.0: must lie in \[0, 1\)"),
        ("breadcrumbs", {"largest": 0.15}, "largest=0.15: leaves nothing beside smallest=0.85"),
        ("dare_linear", {"density": 1.5}, r"density=1.5: must lie in \(0, 1\]"),
        ("dare_ties", {"combine": "median"}, "combine=median: Invalid value"),
        ("della", {"epsilon": 1.0}, r"epsilon=1.0: density=0.5 ± epsilon / 2 must lie in \(0, 1\]"),
    ],
)
def test_settings_out_of_bounds_are_named(name, given, message):
    with pytest.raises(UserError, match=rf"merge\.settings\.{message}"):
        merge_method(name, given)
