import numpy as np
import pytest
import torch
from conftest import tiny_unet
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from deme.config.networks import MERGE_METHODS, SLERP, WITH_STATISTICS
from deme.errors import UserError
from deme.method.merging.task_arithmetic import TaskArithmetic
from deme.method.task_vectors import Candidates, merge_method, merge_tensors, pattern_of, patterns_of

BASE = tiny_unet().state_dict()
EXPERTS = {f"range {k}": tiny_unet(k + 1).state_dict() for k in range(2)}
GROUPS = ["range", "block", ["conv_*", "*.bias", "*"]]
numbers = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-3, 3))


def candidates(groups="block") -> Candidates:
    patterns = patterns_of(groups, list(BASE))
    group_of = {name: patterns.index(pattern_of(name, patterns)) for name in BASE}
    return Candidates(BASE, EXPERTS, group_of, "cpu")


def merged(made: Candidates, coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """What merge.py writes."""
    rows = {name: coefficients[made.group_of[name]].tolist() for name in BASE}
    return dict(merge_tensors(BASE, EXPERTS, rows, TaskArithmetic()))


def some(made: Candidates, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 1.5, made.shape)


@pytest.mark.parametrize("name", sorted({*MERGE_METHODS} - {*WITH_STATISTICS, SLERP}))
def test_each_merge_method_forms_what_merge_py_writes(name):
    """Experts and the pretrained network stay what they are."""
    plain = candidates()
    made, network = Candidates(BASE, EXPERTS, plain.group_of, "cpu", merge_method(name, {})), tiny_unet(7)
    coefficients = some(made)
    rows = {name: coefficients[made.group_of[name]].tolist() for name in BASE}
    expected = dict(merge_tensors(BASE, EXPERTS, rows, merge_method(name, {})))
    made.form(network, coefficients)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    made.form(network, np.zeros(2))
    assert all(torch.equal(tensor, BASE[name]) for name, tensor in network.state_dict().items())
    made.form_expert(network, 1)
    torch.testing.assert_close(dict(network.state_dict()), dict(EXPERTS["range 1"]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(data=st.data(), groups=st.sampled_from(GROUPS))
def test_a_candidate_is_bit_for_bit_what_merge_py_writes(dtype, data, groups):
    """In half precision that, rounded once; nothing stays of what the network held."""
    made = candidates(groups)
    row = st.lists(numbers, min_size=2, max_size=2)
    coefficients = np.array(data.draw(st.lists(row, min_size=made.shape[0], max_size=made.shape[0])))
    network = tiny_unet(7).to(dtype)
    made.form(network, coefficients)
    expected = merged(made, coefficients)
    found = network.state_dict()
    assert [name for name in BASE if not torch.equal(found[name], expected[name].to(dtype))] == []


def test_coefficients_of_0_are_the_pretrained_network_and_of_1_an_expert():
    made, network = candidates(), tiny_unet(7)
    for number, expert in enumerate(EXPERTS.values()):
        made.form_expert(network, number)
        torch.testing.assert_close(dict(network.state_dict()), dict(expert), rtol=1e-6, atol=1e-7)
    made.form(network, np.zeros(made.shape))
    assert [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, BASE[name])] == []


def test_a_second_candidate_has_no_trace_of_the_first():
    """Also where the first is not finite, and in a network that lies channels last, as on a GPU."""
    made = candidates()
    expected = merged(made, some(made))
    network = tiny_unet(7).to(memory_format=torch.channels_last)
    assert not network.conv_out.weight.is_contiguous()
    made.form(network, np.full(made.shape, np.inf))
    made.form(network, some(made))
    found = network.state_dict()
    assert [name for name in BASE if not torch.equal(found[name], expected[name])] == []


def test_ungrouped_candidates_have_one_coefficient_per_range():
    made, network, other = candidates(), tiny_unet(7), tiny_unet(8)
    whole = made.ungrouped()
    assert (made.shape, whole.shape) == ((6, 2), (1, 2))
    whole.form(network, [[0.25, 0.5]])
    made.form(other, [[0.25, 0.5]] * 6)
    assert [name for name, tensor in network.state_dict().items() if not tensor.equal(other.state_dict()[name])] == []


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_the_gradient_is_that_of_a_graph_over_merged_weights(groups):
    """And agrees with finite differences of the loss, which the graph is too."""
    made, network = candidates(groups), tiny_unet(7)
    noisy, at = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 500, 999])
    w = torch.tensor(some(made), requires_grad=True)

    def loss(w: torch.Tensor) -> torch.Tensor:
        double = {name: tensor.double() for name, tensor in BASE.items()}
        vectors = [{name: expert[name].double() - double[name] for name in BASE} for expert in EXPERTS.values()]
        weights = {
            name: double[name] + sum(w[made.group_of[name], k] * vectors[k][name] for k in range(2)) for name in BASE
        }
        return functional_call(network.double(), weights, (noisy.double(), at)).sample.square().sum()

    [expected] = torch.autograd.grad(loss(w), w)
    step = torch.zeros_like(w)
    step[-1, 0] = 1e-4
    slope = (loss(w + step) - loss(w - step)).item() / 2e-4
    assert slope == pytest.approx(expected[-1, 0].item(), rel=1e-4)

    network.float().requires_grad_(True)
    made.form(network, w.detach())
    network(noisy, at).sample.square().sum().backward()
    torch.testing.assert_close(made.gradient(network), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_task_vectors_of_the_groups_make_up_that_of_the_range():
    made = candidates()
    parts = [made.task_vector(group, 1) for group in range(made.shape[0])]
    for name, base in BASE.items():
        [found] = [part[name] for part in parts if name in part]
        assert torch.equal(found, EXPERTS["range 1"][name] - base)


def test_networks_of_other_tensors_are_refused_by_name():
    other = EXPERTS | {"range 1": {name: tensor for name, tensor in BASE.items() if name != "conv_in.bias"}}
    with pytest.raises(UserError, match=r"^range 1: the pretrained model's tensor conv_in\.bias is missing$"):
        Candidates(BASE, other, dict.fromkeys(BASE, 0), "cpu")
