import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from robustness.mutations import damaged
from safetensors.torch import load_file, save_file

from deme.search.state import Trace, load_state, save_state

LIKE = {"step": torch.tensor(3), "mean": torch.ones(2, 2, dtype=torch.float64)}


def trace() -> Trace:
    found = Trace()
    for number in range(3):
        found.add(10 * number, 1.0 - number, np.full((2, 2), number / 2))
    return found


@pytest.fixture
def file(tmp_path):
    save_state(Accelerator(cpu=True), tmp_path / "a.safetensors", LIKE | trace().tensors())
    return tmp_path / "a.safetensors"


def load(file):
    return load_state(Accelerator(cpu=True), file, LIKE, (2, 2))


def test_a_state_survives_saving(file):
    found = load(file)
    assert found["step"] == 3
    again = Trace.of(found)
    assert (again.passes, again.values) == (trace().passes, trace().values)
    assert np.array_equal(again.coefficients, trace().coefficients)


@pytest.mark.parametrize(
    "damage",
    [
        {"step": None},
        {"step": torch.tensor(3.0)},
        {"mean": torch.ones(4, dtype=torch.float64)},
        {"mean": torch.full((2, 2), torch.nan, dtype=torch.float64)},
        {"trace.passes": torch.tensor([1, 2])},
        {"trace.values": torch.tensor([1.0, torch.nan, 0.0])},
        {"trace.values": None},
        {"trace.coefficients": torch.zeros(3, 2)},
        {"trace.coefficients": torch.full((3, 2, 2), torch.inf)},
    ],
)
def test_a_state_of_another_form_is_begun_anew(file, damage, capsys):
    """Also one without a hash, as older ones are."""
    tensors = {name: tensor for name, tensor in (load_file(file) | damage).items() if tensor is not None}
    save_file(tensors, file)
    assert load(file) is None
    assert "unreadable, starting anew" in capsys.readouterr().out


def test_a_damaged_state_is_begun_anew(file):
    """Whatever bytes are other ones: what is read is what was written."""
    whole, content = load(file), file.read_bytes()
    for number in range(300):
        file.write_bytes(damaged(random.Random(number), content))
        found = load(file)
        assert found is None or all(torch.equal(found[name], tensor) for name, tensor in whole.items())
