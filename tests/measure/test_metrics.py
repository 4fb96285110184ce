import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_fid.fid_score import calculate_frechet_distance

from deme.measure.scores import (
    frechet_distance,
    kernel_distances,
    precision_and_recall,
    statistics,
)


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


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), size=st.integers(2, 6))
def test_kid_is_the_unbiased_mmd_of_the_papers_kernel(seed, size):
    """Summed pair by pair: k(x, y) = (x·y / D + 1)³, without the diagonals; the reference's subsets take turns."""
    random = np.random.default_rng(seed)
    features, reference = (random.normal(size=(n * size + 1, 3)).astype(np.float32) for n in (3, 2))

    def kernel(x, y):
        return (float(x.astype(np.float64) @ y.astype(np.float64)) / 3 + 1) ** 3

    for i, found in enumerate(kernel_distances(features, reference, size)):
        xs = features[i * size : (i + 1) * size]
        ys = reference[i % 2 * size : (i % 2 + 1) * size]
        within = sum(kernel(a[j], a[k]) for a in (xs, ys) for j in range(size) for k in range(size) if j != k)
        between = sum(kernel(x, y) for x in xs for y in ys)
        assert found == pytest.approx(within / (size * (size - 1)) - 2 * between / size**2, rel=1e-6, abs=1e-6)


def test_kid_of_the_same_distribution_is_0_within_its_standard_error():
    random = np.random.default_rng(0)
    same, other = (random.normal(shift, 1, size=(2000, 8)).astype(np.float32) for shift in (0, 0.3))
    reference = random.normal(size=(2000, 8)).astype(np.float32)
    distances = kernel_distances(same, reference, 200)
    assert len(distances) == 10
    assert abs(distances.mean()) < 3 * distances.std(ddof=1) / 10**0.5
    assert kernel_distances(other, reference, 200).mean() > 5 * distances.std(ddof=1)


def test_precision_and_recall_of_a_subset_and_of_strangers():
    """Samples that cover the left third of the real images: all realistic, a third of the data recalled."""
    real = np.linspace(0, 3, 301, dtype=np.float32)[:, None]
    precision, recall = precision_and_recall(np.linspace(0, 1, 101, dtype=np.float32)[:, None], real)
    assert precision == 1
    assert recall == pytest.approx(1 / 3, abs=0.02)
    assert precision_and_recall(real + 100, real) == (0, 0)
