import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deme.config import UserError
from deme.task_vectors import (
    PROJECTION_SUFFIX,
    Ties,
    magnitude_threshold,
    merge_tensor,
    merge_tensors,
    with_identity_projections,
)

numbers = st.floats(-10, 10, width=32)
tensors = st.lists(numbers, min_size=3, max_size=3).map(torch.tensor)
models = st.lists(st.tuples(tensors, numbers), min_size=1, max_size=5)


def merge(pretrained, finetuned, coefficients, ties=None):
    groups = coefficients if isinstance(coefficients, dict) else {"*": coefficients}
    return dict(merge_tensors(pretrained, {f"range {k}": f for k, f in enumerate(finetuned)}, groups, ties))


@given(base=tensors, experts=models)
def test_equals_the_formula_in_float64(base, experts):
    """pretrained + Σ_k w_k (finetuned_k − pretrained)."""
    finetuned, coefficients = zip(*experts, strict=True)
    expected = base.double() + sum(w * (f.double() - base.double()) for f, w in experts)
    torch.testing.assert_close(merge_tensor(base, finetuned, coefficients).double(), expected, rtol=1e-5, atol=1e-3)


@given(base=tensors, experts=models)
def test_coefficients_of_0_give_the_pretrained_model(base, experts):
    finetuned = [f for f, _ in experts]
    assert torch.equal(merge_tensor(base, finetuned, [0.0] * len(finetuned)), base)


@given(base=tensors, expert=tensors)
def test_a_coefficient_of_1_gives_the_finetuned_model(base, expert):
    torch.testing.assert_close(merge_tensor(base, [expert], [1.0]), expert, rtol=1e-5, atol=1e-5)


@given(base=tensors, experts=models)
def test_the_order_of_the_ranges_does_not_matter(base, experts):
    forward, backward = (merge_tensor(base, *zip(*order, strict=True)) for order in (experts, experts[::-1]))
    torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-3)


@given(base=tensors, expert=tensors, w=numbers)
def test_splitting_a_coefficient_changes_nothing(base, expert, w):
    whole, halves = merge_tensor(base, [expert], [w]), merge_tensor(base, [expert] * 2, [w / 2] * 2)
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-3)


def test_sums_are_float32_and_the_stored_type_is_kept():
    """In float16, 1 + 8 × 0.0002 would lose every term: each is below half a unit in the last place."""
    base, finetuned = torch.tensor([1.0], dtype=torch.float16), torch.tensor([1.002], dtype=torch.float16)
    step = finetuned.float() - 1
    merged = merge_tensor(base, [finetuned] * 8, [0.2] * 8)
    assert merged.dtype == torch.float16
    assert torch.equal(merged, (1 + 1.6 * step).half())


def test_inputs_are_left_alone():
    base, finetuned = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    merge(base, [finetuned], [1.0])
    assert torch.equal(base["w"], torch.ones(2))
    assert torch.equal(finetuned["w"], torch.zeros(2))


def test_missing_projections_are_identities():
    name = f"mid_block{PROJECTION_SUFFIX}"
    finetuned = {"w": torch.ones(1), name: 3 * torch.eye(2)[:, :, None, None]}
    base = with_identity_projections({"w": torch.zeros(1)}, finetuned)
    assert torch.equal(base[name], torch.eye(2)[:, :, None, None])
    assert torch.equal(merge(base, [finetuned], [0.5])[name], 2 * torch.eye(2)[:, :, None, None])


@pytest.mark.parametrize(
    ("finetuned", "message"),
    [
        ({}, "range 0: the pretrained model's tensor w is missing"),
        ({"w": torch.ones(2), "v": torch.ones(1)}, "range 0: tensor v is not in the pretrained model"),
        ({"w": torch.ones(2, 1)}, r"range 0: tensor w has the shape \(2, 1\), in the pretrained model \(2,\)"),
        ({"w": torch.tensor([1.0, float("nan")])}, "range 0: tensor w holds NaN or infinite values"),
        ({"w": torch.tensor([1.0, float("inf")])}, "range 0: tensor w holds NaN or infinite values"),
    ],
)
def test_unfit_models_are_refused_by_name(finetuned, message):
    with pytest.raises(UserError, match=message):
        merge({"w": torch.ones(2)}, [finetuned], [1.0])


def test_a_nan_in_the_pretrained_model_is_refused():
    with pytest.raises(UserError, match="the pretrained model: tensor w holds NaN"):
        merge({"w": torch.tensor([float("nan")])}, [{"w": torch.ones(1)}], [1.0])


def ties_in_numpy(base, finetuned, coefficients, fraction, combine):
    """TIES-Merging after the paper's algorithm 1, on flat float64 vectors, element by element."""
    vectors = []
    for expert, coefficient in zip(finetuned, coefficients, strict=True):
        vector = expert - base
        keep = int(np.ceil(fraction * len(vector)))
        smallest_kept = np.sort(np.abs(vector))[::-1][keep - 1]
        vectors.append(coefficient * np.where(np.abs(vector) >= smallest_kept, vector, 0))
    merged = base.copy()
    for i in range(len(base)):
        values = [vector[i] for vector in vectors]
        elected = np.sign(sum(values))
        agreeing = [value for value in values if value != 0 and np.sign(value) == elected]
        if agreeing:
            merged[i] += np.mean(agreeing) if combine == "mean" else np.sum(agreeing)
    return merged


@given(
    seed=st.integers(0, 10_000),
    experts=st.integers(1, 5),
    fraction=st.floats(0.01, 1),
    combine=st.sampled_from(["mean", "sum"]),
)
def test_ties_equals_the_papers_algorithm(seed, experts, fraction, combine):
    """Two tensors, trimmed by one threshold per whole task vector; half of the coefficients negative."""
    random = np.random.default_rng(seed)
    base, *finetuned = random.normal(size=(experts + 1, 30)).astype(np.float32)
    coefficients = random.uniform(-1, 1, size=experts).tolist()
    expected = ties_in_numpy(*(np.float32(base), np.float32(finetuned)), coefficients, fraction, combine)

    def split(vector):
        vector = torch.from_numpy(vector)
        return {"a": vector[:10].reshape(2, 5), "b": vector[10:]}

    merged = merge(split(base), [split(f) for f in finetuned], coefficients, Ties(fraction, combine))
    found = torch.cat([merged["a"].flatten(), merged["b"]])
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=60),
    cut=st.integers(0, 60),
    fraction=st.floats(0.001, 1),
)
def test_the_threshold_is_exact(values, cut, fraction):
    """The ⌈fraction · n⌉-th largest magnitude, whatever way the vector is cut into tensors, ties and zeros included."""
    vector = torch.tensor(values)
    keep = int(np.ceil(fraction * len(values)))
    expected = float(vector.abs().sort(descending=True).values[keep - 1])
    assert magnitude_threshold(lambda: iter([vector[:cut], vector[cut:]]), fraction) == expected


def test_the_first_pattern_that_fits_a_tensor_counts():
    names = ("down_blocks.0.w", "mid_block.w", "conv_in.w")
    base, expert = ({name: torch.full((1,), value) for name in names} for value in (0.0, 1.0))
    merged = merge(base, [expert], {"down_blocks.*": [0.5], "*": [0.25], "mid_block.*": [9]})
    assert [merged[name].item() for name in names] == [0.5, 0.25, 0.25]
    with pytest.raises(UserError, match=r"no pattern fits the tensor mid_block\.w"):
        merge(base, [expert], {"down_blocks.*": [0.5]})
