import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_fid.fid_score import calculate_frechet_distance

from deme.config import UserError
from deme.metrics import frechet_distance, load_statistics, save_statistics, statistics


def gaussian(seed: int, dimensions: int = 6, count: int = 200):
    random = np.random.default_rng(seed)
    return statistics(random.normal(size=(count, dimensions)) @ random.normal(size=(dimensions, dimensions)))


def test_commuting_covariances_have_a_closed_form():
    """Diagonal: ‖μ₁ − μ₂‖² + Σ (√a − √b)²."""
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.0, 1.0])
    mu = np.array([1.0, 2.0, 2.0])
    expected = 9 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(mu, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_agrees_with_pytorch_fid_where_that_is_stable(seed):
    first, second = gaussian(seed), gaussian(seed + 1)
    assert frechet_distance(*first, *second) == pytest.approx(calculate_frechet_distance(*first, *second), rel=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_is_symmetric_and_0_for_equal_sets(seed):
    first, second = gaussian(seed), gaussian(seed + 1)
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), rel=1e-6)
    assert frechet_distance(*first, *first) == pytest.approx(0, abs=1e-5)


def test_dead_and_repeated_features_are_harmless():
    features = np.random.default_rng(0).normal(size=(50, 4))
    with_dead = np.concatenate([features, np.zeros((50, 2))], axis=1)
    shifted = with_dead + np.array([1, 0, 0, 0, 0, 0])
    assert frechet_distance(*statistics(with_dead), *statistics(shifted)) == pytest.approx(1, abs=1e-6)


def test_statistics_survive_saving(tmp_path):
    mu, sigma = gaussian(0)
    save_statistics(tmp_path / "a.npz", mu, sigma, {"data": "digits"})
    loaded = load_statistics(tmp_path / "a.npz")
    assert np.array_equal(loaded[0], mu)
    assert np.array_equal(loaded[1], sigma)
    assert loaded[2] == {"data": "digits"}


def test_plain_pytorch_fid_files_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert load_statistics(tmp_path / "a.npz")[2] == {}


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", mean=np.zeros(2))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.save(tmp_path / "array.npy", np.zeros(2))
    for name in ("text.npz", "other.npz", "pickled.npz", "array.npy", "absent.npz"):
        with pytest.raises(UserError, match=name):
            load_statistics(tmp_path / name)
