import numpy as np
import pytest

from deme.errors import UserError
from deme.job.records import STATISTICS, Record
from deme.measure.metrics import statistics
from deme.measure.reference import Reference, load_reference, save_reference


def test_references_survive_saving(tmp_path):
    """The statistics are those of all features, read in parts, and few features are all kept."""
    features = np.random.default_rng(0).normal(100, 1, size=(20, 3)).astype(np.float32)
    reference = Reference.of([features[:7], features[7:8], features[8:]], 20)
    record = Record(STATISTICS, {"data": "digits"})
    save_reference(tmp_path / "a.npz", reference, record)
    loaded, found = load_reference(tmp_path / "a.npz")
    assert found == record
    for found, expected in zip((loaded.mu, loaded.sigma), statistics(features), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.array_equal(np.sort(loaded.features, axis=0), np.sort(features, axis=0))


def test_plain_pytorch_fid_files_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    reference, record = load_reference(tmp_path / "a.npz")
    assert record.made_from == {}
    assert reference.features is None


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", mean=np.zeros(2))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    np.save(tmp_path / "array.npy", np.zeros(2))
    for name in ("text.npz", "other.npz", "pickled.npz", "shapes.npz", "nan.npz", "array.npy", "absent.npz"):
        with pytest.raises(UserError, match="--save-stats"):
            load_reference(tmp_path / name)
