import numpy as np
import pytest
from accelerate import Accelerator

from deme.job.processes import kept
from deme.job.records import MADE_FROM


def test_arrays_are_made_once_for_each_record(tmp_path, capsys):
    """Anew where the record differs or the file is damaged, which is said."""
    calls = []

    def make():
        calls.append(1)
        return {"a": np.array([1.5, float("nan")]), "names": np.array(["x", "yy"])}

    def get(**made_from):
        return kept(Accelerator(cpu=True), tmp_path / "deeper" / "a.npz", made_from, make)

    first = get(edges=[(0, 1)], seed=0)
    again = get(edges=[(0, 1)], seed=0)
    assert len(calls) == 1
    assert again.keys() == first.keys() == {"a", "names"}
    np.testing.assert_array_equal(again["a"], first["a"])
    assert again["names"].tolist() == ["x", "yy"]
    get(edges=[(0, 1)], seed=1)
    assert len(calls) == 2
    file = tmp_path / "deeper" / "a.npz"
    file.write_bytes(file.read_bytes()[:100])
    get(edges=[(0, 1)], seed=1)
    assert len(calls) == 3
    assert "unreadable, made anew" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["a.npz"]


ARRAYS = {"a": np.array([1.5, 2.5]), "b": np.arange(6).reshape(2, 3)}


@pytest.mark.parametrize(
    "damage",
    [
        {"a": None},
        {"a": np.array([1.5, np.nan])},
        {"a": np.array([1.5, 2.4])},
        {"a": np.array([1.5])},
        {"a": np.array(["1.5", "2.5"])},
        {"b": np.arange(6).reshape(3, 2)},
        {"b": np.arange(6.0).reshape(2, 3)},
        {"a": np.array([1.5, {}], dtype=object)},
        {"c": np.zeros(1)},
        {MADE_FROM: np.array("[]")},
        {MADE_FROM: None},
    ],
)
def test_arrays_that_were_not_written_so_are_made_anew(tmp_path, damage, capsys):
    """One that is missing, new, NaN, of another value, type or shape, or of Python objects."""
    file = tmp_path / "a.npz"
    calls = []

    def get():
        return kept(Accelerator(cpu=True), file, {"seed": 0}, lambda: calls.append(1) or dict(ARRAYS))

    get()
    with np.load(file) as content:
        found = {name: content[name] for name in content.files}
    np.savez(file, **{name: array for name, array in (found | damage).items() if array is not None})
    again = get()
    assert len(calls) == 2
    assert "unreadable, made anew" in capsys.readouterr().out
    assert all(np.array_equal(again[name], array) for name, array in ARRAYS.items())
    get()
    assert len(calls) == 2
