"""The distance with a control, on features that are drawn instead of images."""

import numpy as np
import pytest

from deme.measure.feature_space import FeatureSpace
from deme.measure.metrics import frechet_distance, statistics
from deme.measure.reference import Reference
from deme.search.distance import FrechetDistance

SIZE, COUNT = 8, 4_000
RANDOM = np.random.default_rng(0)
REAL = Reference(*statistics(RANDOM.normal(size=(COUNT, SIZE)) * 1.2), None)
PRETRAINED = RANDOM.normal(size=(COUNT, SIZE)) + 0.3
CANDIDATE = 0.95 * PRETRAINED + 0.02 * RANDOM.normal(size=(COUNT, SIZE))  # the same seeds give nearly the same images


def distance(control: np.ndarray | None) -> FrechetDistance:
    return FrechetDistance(None, None, FeatureSpace("classifier", None, REAL, None), [], 8, control)


def plain(features: np.ndarray) -> float:
    return frechet_distance(*statistics(features), REAL.mu, REAL.sigma)


@pytest.mark.parametrize("count", [10, 50, 500, COUNT])
def test_the_pretrained_network_has_the_distance_of_all_images_of_the_control(count):
    found = distance(PRETRAINED).of_features(PRETRAINED[:count])
    assert found == pytest.approx(plain(PRETRAINED), rel=1e-9)


def test_as_many_images_as_the_control_need_no_correction():
    assert distance(PRETRAINED).of_features(CANDIDATE) == pytest.approx(plain(CANDIDATE), rel=1e-9)
    assert distance(None).of_features(CANDIDATE) == plain(CANDIDATE)


def test_a_candidate_that_shares_little_with_the_control_is_not_punished_for_it():
    """Images that are as good as the pretrained network's but have nothing to do with them: no bias."""
    other = RANDOM.normal(size=(COUNT, SIZE)) + 0.3
    found = []
    for start in range(0, COUNT, 100):
        order = np.r_[start:COUNT, 0:start]
        found.append(distance(PRETRAINED[order]).of_features(other[order][:100]))
    error = np.std(found) / len(found) ** 0.5
    assert np.mean(found) == pytest.approx(plain(other), abs=3 * error + 0.02)


def test_a_control_lets_few_images_tell_as_much_as_many():
    """Over 20 subsets of 100 images, the error is a tenth of that of the subset's own distance."""
    errors = {"with": [], "without": []}
    for start in range(0, 2_000, 100):
        order = np.r_[start:COUNT, 0:start]
        few, control = CANDIDATE[order][:100], PRETRAINED[order]
        errors["with"].append(distance(control).of_features(few) - plain(CANDIDATE))
        errors["without"].append(plain(few) - plain(CANDIDATE))
    with_control, without = (np.sqrt(np.mean(np.square(found))) for found in errors.values())
    assert with_control < 0.1 * without
