import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deme.errors import UserError
from deme.method.merging.task_arithmetic import TaskArithmetic
from deme.method.merging.ties import Ties
from deme.method.task_vectors import Moved, merge_method, merge_tensors

numbers = st.floats(-10, 10, width=32)
tensors = st.lists(numbers, min_size=3, max_size=3).map(torch.tensor)
models = st.lists(st.tuples(tensors, numbers), min_size=1, max_size=5)


METHODS = [TaskArithmetic(), Ties(0.5, "mean")]


def merge_tensor(base, finetuned, coefficients):
    [(_, merged)] = merge_tensors(
        {"w": base},
        {str(k): {"w": tensor} for k, tensor in enumerate(finetuned)},
        {"w": coefficients},
        TaskArithmetic(),
    )
    return merged


def merge(pretrained, finetuned, coefficients, method=METHODS[0]):
    named = {f"range {k}": tensors for k, tensors in enumerate(finetuned)}
    return dict(merge_tensors(pretrained, named, dict.fromkeys(pretrained, coefficients), method))


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


@pytest.mark.parametrize(
    ("finetuned", "message"),
    [
        ({}, "range 0: the pretrained model's tensor w is missing"),
        ({"w": torch.ones(2), "v": torch.ones(1)}, "range 0: tensor v is not in the pretrained model"),
        ({"w": torch.ones(2, 1)}, r"range 0: tensor w has the shape \(2, 1\), in the pretrained model \(2,\)"),
        ({"w": torch.ones(2, dtype=torch.int8)}, "range 0: tensor w is of the type int8, which can't be merged"),
        ({"w": torch.ones(2, dtype=torch.bool)}, "range 0: tensor w is of the type bool, which can't be merged"),
        ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, "range 0: tensor w is of the type float8_e4m3fn, which"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "range 0: tensor w is of the type complex64, which can't"),
        ({"w": torch.tensor([1.0, float("nan")])}, "range 0: tensor w holds NaN or infinite values"),
        ({"w": torch.tensor([1.0, float("inf")])}, "range 0: tensor w holds NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("method", METHODS, ids=["task arithmetic", "ties"])
def test_unfit_models_are_refused_by_name(finetuned, message, method):
    with pytest.raises(UserError, match=message):
        merge({"w": torch.ones(2)}, [finetuned], [1.0], method)


@pytest.mark.parametrize("method", METHODS, ids=["task arithmetic", "ties"])
def test_a_nan_in_the_pretrained_model_is_refused(method):
    with pytest.raises(UserError, match="the pretrained model: tensor w holds NaN"):
        merge({"w": torch.tensor([1, float("nan")])}, [{"w": torch.ones(2)}], [0.0], method)


def test_coefficients_that_overflow_are_refused():
    with pytest.raises(OverflowError, match=r"^\[3e\+38, 3e\+38\]: too large for tensor w, which overflows$"):
        merge({"w": torch.zeros(2)}, [{"w": torch.ones(2)}] * 2, [3e38, 3e38])


def test_methods_describe_themselves():
    """What the record of a merge says of them."""
    assert METHODS[0].describe() == {"method": "task_arithmetic"}
    assert METHODS[1].describe() == {"method": "ties", "ties_fraction": 0.5, "ties_combine": "mean"}


def test_what_each_network_moves_is_the_norm_of_its_scaled_task_vector_by_block():
    """Over parts and all tensors of a block; negative where more is subtracted; blocks in the order of the network."""
    torch.manual_seed(0)
    shapes = {"conv_in.weight": (3,), "mid_block.a": (2, 2), "up_blocks.0.a": (700, 800), "down_blocks.10.a": (3,)}
    shapes |= {"down_blocks.2.a": (3,), "down_blocks.2.b": (2, 5), "text_encoder.text_model.a": (4,)}
    base = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    vectors = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    networks = {str(k): {name: base[name].float() + part for name, part in vectors[k].items()} for k in range(2)}
    weights = {name: [0.5, -2.0] for name in base} | {"down_blocks.2.b": [-3.0, 1.0], "conv_in.weight": [0.0, 1.0]}
    moved = Moved()
    merged = dict(merge_tensors(base, networks, weights, merge_method("task_arithmetic", {}), moved))
    assert merged.keys() == base.keys()
    rows = moved.by_block
    assert list(rows) == ["down_blocks.2", "down_blocks.10", "mid_block", "up_blocks.0", "rest", "text_encoder"]
    for block, names in {
        "up_blocks.0": ["up_blocks.0.a"],
        "down_blocks.2": ["down_blocks.2.a", "down_blocks.2.b"],
    }.items():
        for k in range(2):
            parts = [weights[name][k] * vectors[k][name].double().flatten() for name in names]
            assert abs(rows[block][k]) == pytest.approx(float(torch.cat(parts).norm()), rel=1e-3)
    assert rows["mid_block"][0] > 0 > rows["mid_block"][1]
    assert rows["down_blocks.2"][0] < 0  # −3 times a longer vector outweighs 0.5
    assert rows["rest"][0] == 0
