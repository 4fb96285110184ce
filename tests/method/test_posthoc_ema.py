import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from deme.config.trainings import LARGEST_WIDTH, LEAST_WIDTH
from deme.method.posthoc_ema import combination, combine, decay, exponent, inner_products

WIDTHS = st.integers(round(1000 * LEAST_WIDTH), round(1000 * LARGEST_WIDTH)).map(lambda thousandths: thousandths / 1000)
TRACKED = (0.05, 0.1)


def kept(steps) -> list[tuple[int, float]]:
    return [(step, width) for step in steps for width in TRACKED]


def power_function(step, width):
    gamma = exponent(width)
    return lambda tau: (gamma + 1) * (tau / step) ** gamma / step if tau <= step else 0.0


@given(WIDTHS)
def test_the_width_is_the_standard_deviation_of_the_power_function(width):
    """As a share of its length, from its moments by quadrature."""
    weight = power_function(1.0, width)
    mean, square = (quad(lambda tau, n=n: weight(tau) * tau**n, 0, 1, epsabs=1e-12)[0] for n in (1, 2))
    assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=1e-4)


def test_updates_weigh_each_step_by_the_area_under_the_power_function():
    """Of step s: the integral from s − 1 to s; the weights before the training do not count."""
    weights = np.zeros(31)
    for step in range(1, 31):
        weights *= decay(0.1, step)
        weights[step] += 1 - decay(0.1, step)
    areas = [quad(power_function(30, 0.1), step - 1, step)[0] for step in range(1, 31)]
    assert weights == pytest.approx([0, *areas], abs=1e-12)


@given(WIDTHS, WIDTHS, st.integers(1, 50), st.integers(1, 50))
def test_inner_products_are_the_integrals(width, other, step, other_step):
    first, second = power_function(step, width), power_function(other_step, other)
    expected = quad(lambda tau: first(tau) * second(tau), 0, min(step, other_step), epsabs=1e-12)[0]
    assert inner_products([(step, width)], [(other_step, other)])[0, 0] == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("index", [0, 1, 30, 31])
def test_a_width_that_was_tracked_is_its_snapshot(index):
    profiles = kept(range(100, 1601, 100))
    coefficients, error = combination(profiles, profiles[index])
    assert coefficients.tolist() == np.eye(32)[index].tolist()
    assert error < 1e-6


@given(WIDTHS, st.integers(1, 40), st.integers(1, 1000))
def test_coefficients_add_up_to_one_and_more_snapshots_fit_better(width, count, step):
    errors = []
    for every in (2 * step, step):
        coefficients, error = combination(kept(range(every, 2 * step * count + 1, every)), (2 * step * count, width))
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        errors.append(error)
    assert errors[1] <= errors[0] + 1e-6


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.2])
def test_a_random_walk_comes_back_at_any_width_and_step(width):
    """The worst path: to 1e-3 of the change at a snapshot's step, and to 5e-3 between two."""
    steps = np.arange(1, 2001)
    path = torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 50)).cumsum(axis=0))
    start = 1000.0  # of weights that change by little

    def averages(widths):
        found = {width: torch.zeros(50, dtype=torch.float64) for width in widths}
        for step, weights in zip(steps.tolist(), path + start, strict=True):
            for each, average in found.items():
                average.lerp_(weights, 1 - decay(each, step))
                yield (step, each), average.clone()

    tracked = dict(averages([*TRACKED, width]))
    profiles = kept(range(50, 2001, 50))
    for step, error in ((2000, 1e-3), (1730, 5e-3)):
        coefficients, _ = combination(profiles, (step, width))
        found = combine([{"weight": tracked[profile]} for profile in profiles], coefficients)["weight"]
        expected = tracked[step, width]
        assert (found - expected).norm() < error * (expected - start).norm()
