import numpy as np
import pytest
import torch

from deme.analysis.task_vectors import cosines, statistics

BASE = {"mid_block.a.weight": torch.zeros(2, 2), "down_blocks.0.b": torch.ones(3), "conv_in.bias": torch.ones(1)}


def moved(mid, down, rest):
    values = dict(zip(BASE, (torch.tensor(mid), torch.tensor(down), torch.tensor(rest)), strict=True))
    return {name: base + values[name].reshape(base.shape) for name, base in BASE.items()}


def test_norms_cosines_signs_and_values_in_closed_form():
    networks = {"a": moved([3.0, 0, 0, 4], [1.0, 1, -1], [0.0]), "b": moved([-4.0, 0, 0, 3], [1.0, -1, 0], [2.0])}
    found = statistics(BASE, list(networks.values()))
    assert found["groups"].tolist() == ["down_blocks.0", "mid_block", "rest"]
    assert found["sizes"].tolist() == [3, 4, 1]
    assert np.diagonal(found["products"], axis1=1, axis2=2).tolist() == [[3, 2], [25, 25], [0, 4]]
    angles = cosines(found["products"])[:, 0, 1]
    assert angles[:2] == pytest.approx([0, 0])
    assert np.isnan(angles[2])
    assert found["moved"][:, 0, 1].tolist() == [2, 2, 0]  # by both
    assert found["opposed"][:, 0, 1].tolist() == [1, 1, 0]
    assert found["squares"].tolist() == [3, 0, 1]
    assert found["quantiles"][1, 0] == pytest.approx(np.quantile([3, 0, 0, 4], [0.05, 0.25, 0.5, 0.75, 0.95]))
