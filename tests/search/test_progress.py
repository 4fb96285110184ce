import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from robustness.mutations import damaged
from safetensors.torch import load_file, save_file

from deme.search.progress import Progress, load_state


def progress(file) -> Progress:
    return Progress(Accelerator(cpu=True), file, "gradient", "match", {"spent": torch.tensor(0), "mean": torch.ones(2)})


@pytest.fixture
def file(tmp_path):
    made = progress(tmp_path / "a.safetensors")
    for number in range(3):
        made.state["spent"] += 10
        made.add(1.0 - number, np.full((2, 2), number / 2))
    made.save()
    return made.file


def test_a_state_survives_saving(file):
    again = progress(file)
    assert again.state["spent"] == 30
    assert torch.equal(again.state["mean"], torch.ones(2))
    assert [(row.way, row.objective, row.passes, row.value) for row in again.rows] == [
        ("gradient", "match", 10, 1.0),
        ("gradient", "match", 20, 0.0),
        ("gradient", "match", 30, -1.0),
    ]
    assert [row.coefficients.tolist() for row in again.rows] == [np.full((2, 2), n / 2).tolist() for n in range(3)]
    assert again.best is again.rows[2]


def test_a_state_without_its_hash_is_begun_anew(file, capsys):
    save_file(load_file(file), file)
    assert progress(file).rows == []
    assert "unreadable, starting anew (its tensors are not those that were written)" in capsys.readouterr().out


def test_a_damaged_state_is_begun_anew(file):
    """Whatever bytes are damaged, what is read is what was written."""
    whole, content = load_state(Accelerator(cpu=True), file), file.read_bytes()
    for number in range(300):
        file.write_bytes(damaged(random.Random(number), content))
        found = load_state(Accelerator(cpu=True), file)
        assert found is None or all(torch.equal(found[name], tensor) for name, tensor in whole.items())
