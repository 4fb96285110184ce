import numpy as np
import torch
from accelerate import Accelerator

from deme.search.progress import Progress


def progress(file) -> Progress:
    return Progress(Accelerator(cpu=True), file, "gradient", "match", {"spent": torch.tensor(0), "mean": torch.ones(2)})


def test_a_state_survives_saving(tmp_path):
    """tests/job/test_arrays.py damages such files."""
    made = progress(tmp_path / "a.npz")
    for number in range(3):
        made.state["spent"] += 10
        made.add(1.0 - number, np.full((2, 2), number / 2))
    made.save()
    again = progress(made.file)
    assert again.state["spent"] == 30
    assert torch.equal(again.state["mean"], torch.ones(2))
    assert [(row.way, row.objective, row.passes, row.value) for row in again.rows] == [
        ("gradient", "match", 10, 1.0),
        ("gradient", "match", 20, 0.0),
        ("gradient", "match", 30, -1.0),
    ]
    assert [row.coefficients.tolist() for row in again.rows] == [np.full((2, 2), n / 2).tolist() for n in range(3)]
    assert again.best is again.rows[2]
