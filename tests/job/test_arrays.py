import numpy as np
from accelerate import Accelerator

from deme.job.arrays import kept
from deme.job.records import ANALYSIS, Record


def test_arrays_are_made_once_for_each_record(tmp_path, capsys):
    """Anew where the record differs or the file is damaged, which is said."""
    calls = []

    def make():
        calls.append(1)
        return {"a": np.array([1.5, float("nan")]), "names": np.array(["x", "yy"])}

    def get(**made_from):
        return kept(Accelerator(cpu=True), tmp_path / "deeper" / "a.npz", Record(ANALYSIS, made_from), make)

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
