"""A merge method is one file: it is found by its name, and its settings are checked."""

import re

import pytest
import torch
from conftest import REPOSITORY

from deme.config.networks import MERGE_METHODS
from deme.errors import UserError
from deme.method import merging
from deme.method.task_vectors import merge_method, merge_tensors

DEFAULTS = {
    "ties": {"fraction": 0.2, "combine": "mean"},
    "magnitude_prune": {"density": 0.5},
    "breadcrumbs": {"smallest": 0.85, "largest": 0.01},
    "dare_linear": {"density": 0.5, "seed": 0},
    "dare_ties": {"density": 0.5, "seed": 0, "combine": "mean"},
    "della": {"density": 0.5, "epsilon": 0.2, "seed": 0, "combine": "mean"},
    "fisher": {"floor": 1e-6},
    "regmean": {"shrink": 0.9},
}


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_every_file_is_a_method_that_describes_itself(name):
    """What the record of a merge says of it."""
    settings = {f"{name}_{key}": value for key, value in DEFAULTS.get(name, {}).items()}
    assert merge_method(name, {}).describe() == {"method": name} | settings


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ties", {"fraction": 0}, "fraction=0.0: must lie in (0, 1]"),
        ("ties", {"fraction": "all"}, "fraction=all: Value 'all' of type 'str' could not be converted to Float"),
        ("ties", {"combine": "median"}, "combine=median: Invalid value 'median', expected one of ['mean', 'sum']"),
        ("ties", {"fractoin": 0.1}, "fractoin=0.1: Key 'fractoin' not in 'Ties'. Did you mean: 'fraction'?"),
        ("task_arithmetic", {"fraction": 0.1}, "fraction=0.1: Key 'fraction' not in 'TaskArithmetic'"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(name, settings, message):
    with pytest.raises(UserError) as error:
        merge_method(name, settings)
    assert str(error.value) == f"merge.settings.{message}"


def test_the_method_in_the_docs_works_as_it_stands(tmp_path, monkeypatch):
    """Where two of three task vectors disagree with the third, the pretrained weight stays."""
    [example] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "merging.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 30
    (tmp_path / "consensus.py").write_text(example)
    monkeypatch.setattr(merging, "__path__", [*merging.__path__, str(tmp_path)])
    method = merge_method("consensus", {"agreement": 1})
    experts = {"a": {"w": torch.tensor([1.0, 1.0])}, "b": {"w": torch.tensor([1.0, -1.0])}}
    merged = dict(merge_tensors({"w": torch.zeros(2)}, experts, {"w": [0.5, 0.5]}, method))
    assert merged["w"].tolist() == [1.0, 0.0]
    assert method.describe() == {"method": "consensus", "consensus_agreement": 1.0}
    with pytest.raises(UserError, match=r"^merge.settings.agreement=2.0: must lie in \[0, 1\]$"):
        merge_method("consensus", {"agreement": 2})
