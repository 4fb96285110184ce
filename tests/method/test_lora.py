import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deme.errors import UserError
from deme.method.lora import ALL, Factors, merge_by, merge_loras, nearest, weighted_sum
from deme.method.task_vectors import merge_method, merge_tensors

LINEAR, CONV = (7, 5), (6, 4, 3, 3)  # shapes of weights


def random_factors(seed: int, rank: int, shape: tuple[int, ...]) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return Factors(down, torch.randn(shape[0], rank, generator=generator))


def dense(factors: Factors) -> torch.Tensor:
    """ΔW in float64."""
    return Factors(factors.down.double(), factors.up.double()).change()


shapes = st.sampled_from([LINEAR, CONV])
ranks = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(shape=shapes, ranks=ranks, seed=st.integers(0, 999), weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_a_sum_of_loras_is_a_lora_of_the_summed_rank(shape, ranks, seed, weights):
    terms = [(weights[k], random_factors(seed + k, rank, shape)) for k, rank in enumerate(ranks)]
    merged = weighted_sum(terms)
    counted = [factors.rank for weight, factors in terms if weight != 0]
    if not counted:
        assert merged is None
        return
    assert merged.rank == sum(counted)
    expected = sum(weight * dense(factors) for weight, factors in terms)
    torch.testing.assert_close(dense(merged), expected, rtol=1e-6, atol=1e-6)
    assert merged.norm() == pytest.approx(float(expected.norm()), rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(shape=shapes, rank=st.integers(1, 12), kept=st.integers(1, 14), seed=st.integers(0, 999))
def test_truncation_is_that_of_the_dense_matrix(shape, rank, kept, seed):
    """As Eckart and Young: the error is the root of the sum of the squares of the singular values that are left out."""
    factors = random_factors(seed, rank, shape)
    truncated, error = factors.truncated(kept)
    values = torch.linalg.svdvals(dense(factors).flatten(1))
    assert error == pytest.approx(float(values[kept:].square().sum().sqrt()), abs=1e-6 * float(values[0]))
    assert truncated.shape == shape
    assert truncated.rank <= min(kept, rank, shape[0])
    difference = float((dense(truncated) - dense(factors)).norm())
    assert difference == pytest.approx(error, abs=1e-5 * float(values[0]))


def test_padding_changes_the_rank_alone():
    factors = random_factors(0, 2, CONV)
    assert factors.padded(5).rank == 5
    torch.testing.assert_close(factors.padded(5).change(), factors.change())


def test_layers_are_merged_with_the_coefficients_of_their_names_and_left_alone_by_loras_without_them():
    a = {"x": random_factors(0, 2, LINEAR), "y": random_factors(1, 2, LINEAR)}
    b = {"x": random_factors(2, 3, LINEAR), "z": random_factors(3, 1, LINEAR)}
    merged, errors = merge_loras({"a": a, "b": b}, {"x": [2, -1], "y": [0.5, 9], "z": [7, 0]})
    assert list(merged) == ["x", "y"]  # z has the coefficient 0
    torch.testing.assert_close(merged["x"].change(), 2 * a["x"].change() - b["x"].change())
    torch.testing.assert_close(merged["y"].change(), 0.5 * a["y"].change())
    assert errors == {}


def test_the_relative_error_of_truncated_layers_is_told():
    exact = Factors(torch.eye(3), torch.diag(torch.tensor([3.0, 4.0, 12.0])))
    merged, errors = merge_loras({"a": {"x": exact, "y": random_factors(0, 2, LINEAR)}}, {"x": [1], "y": [1]}, rank=2)
    total = 13**2 + float(merged["y"].change().square().sum())
    assert errors == {"x": pytest.approx(3 / 13), ALL: pytest.approx((9 / total) ** 0.5)}  # 13² = 3² + 4² + 12²
    assert merged["x"].rank == 2
    torch.testing.assert_close(merged["x"].change(), torch.diag(torch.tensor([0.0, 4.0, 12.0])))


@settings(deadline=None, max_examples=40)
@given(shape=st.sampled_from([LINEAR, LINEAR[::-1], CONV]), rank=st.integers(1, 12), kept=st.integers(1, 14))
def test_the_nearest_lora_of_a_change_is_that_of_its_singular_values(shape, rank, kept):
    change = random_factors(rank, rank, shape).change()
    factors, error = nearest(change, kept)
    values = torch.linalg.svdvals(change.double().flatten(1))
    assert (error is None) == (kept >= len(values))
    lost = float(values[kept:].square().sum().sqrt())
    assert (error or 0) == pytest.approx(lost, abs=1e-6 * float(values[0]))
    assert (factors.shape, factors.rank) == (shape, min(kept, len(values)))
    assert float((factors.change() - change).norm()) == pytest.approx(lost, abs=1e-5 * float(values[0]))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "tsv", "slerp"])
def test_other_methods_change_what_they_change_in_the_weights_themselves(method):
    torch.manual_seed(0)
    pretrained = {"x": torch.randn(LINEAR), "y": torch.randn(CONV), "z": torch.randn(CONV)}
    loras = {
        "a": {"x": random_factors(1, 2, LINEAR), "y": random_factors(2, 2, CONV)},
        "b": {"x": random_factors(3, 1, LINEAR), "z": random_factors(4, 3, CONV)},
    }
    coefficients = {key: [0.4, 0.6] for key in pretrained}
    given = {
        name: {key: base + lora[key].change() if key in lora else base for key, base in pretrained.items()}
        for name, lora in loras.items()
    }
    expected = dict(merge_tensors(pretrained, given, coefficients, merge_method(method, {})))
    whole, errors = merge_by(merge_method(method, {}), pretrained, loras, coefficients, rank=99)
    assert errors == {}
    for name, base in pretrained.items():
        torch.testing.assert_close(base + whole[name].change(), expected[name], rtol=1e-5, atol=1e-5)

    truncated, errors = merge_by(merge_method(method, {}), pretrained, loras, coefficients)
    assert {name: factors.rank for name, factors in truncated.items()} == {"x": 3, "y": 2, "z": 3}
    for name, factors in truncated.items():
        change = expected[name] - pretrained[name]
        error = float((factors.change() - change).norm() / change.norm())
        assert error == pytest.approx(errors[name], abs=1e-5)


def test_layers_that_a_method_leaves_alone_are_left_out():
    pretrained, loras = {"x": torch.ones(LINEAR)}, {"a": {"x": random_factors(0, 2, LINEAR)}}
    assert merge_by(merge_method("ties", {}), pretrained, loras, {"x": [0.0]}) == ({}, {})
    with pytest.raises(UserError, match=r"\[1e\+39\] are too large for x"):
        merge_by(merge_method("ties", {}), pretrained, loras, {"x": [1e39]})


def test_loras_that_cannot_be_added_are_refused_by_name():
    good = {"x": random_factors(0, 2, LINEAR)}
    with pytest.raises(UserError, match=r"b: x has the shape \(7, 6\), in a \(7, 5\)"):
        merge_loras({"a": good, "b": {"x": random_factors(0, 2, (7, 6))}}, {"x": [1, 1]})
    bad = {"x": Factors(torch.full((2, 5), torch.nan), torch.ones(7, 2))}
    with pytest.raises(UserError, match="b: A of x holds NaN or infinite values"):
        merge_loras({"a": good, "b": bad}, {"x": [1, 1]})
    with pytest.raises(UserError, match=r"coefficients \[1e\+39\] are too large for x"):
        merge_loras({"a": good}, {"x": [1e39]})
