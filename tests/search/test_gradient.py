import numpy as np
import pytest
from conftest import stop_at_write
from noisy_images import Linear, linear_candidates, squares

from deme.config.sections import Search
from deme.search import gradient as module
from deme.search.closed_form import closed_form
from deme.search.gradient import GRADIENT_PASSES, gradient_descent

SETTINGS = {"gradient_steps": 60, "gradient_learning_rate": 0.05, "pull": 0.0, "bounds": [-10, 10]}


def descent(file, start=None, held_out_places: range = range(30), **settings):
    made, network = linear_candidates(), Linear(7)
    objective, held_out = squares("match", made, network), squares("match", made, network, held_out_places)
    start = np.zeros(made.shape) if start is None else start
    return gradient_descent(objective, held_out, made, network, Search(**(SETTINGS | settings)), start, file)


def test_it_converges_to_the_closed_form_of_a_linear_network(tmp_path):
    made, network = linear_candidates(), Linear(7)
    objective = squares("match", made, network)
    least = min(closed_form(objective, made, network, 0.0, 1, (-10.0, 10.0), tmp_path / "closed").values)
    found = descent(tmp_path / "state", gradient_steps=600, gradient_patience=60)
    assert found.values[0] == pytest.approx(1, abs=1e-5)
    assert min(found.values) == pytest.approx(least, abs=0.02 * (1 - least))
    assert found.passes[0] == 90  # the objective was made of two passes of each image
    assert found.passes[2] == 90 + 20 * GRADIENT_PASSES * 30 // 4 + 2 * 30  # 20 steps are five times all four batches


def test_it_starts_where_it_is_told_and_is_pulled_back_there(tmp_path):
    start = np.full((2, 2), 0.25)
    free = descent(tmp_path / "free", start)
    pulled = descent(tmp_path / "pulled", start, pull=1000.0)
    np.testing.assert_array_equal(free.coefficients[0], start)
    assert np.abs(pulled.coefficients[-1] - start).max() < 0.3 * np.abs(free.coefficients[-1] - start).max()


def test_it_stays_within_the_bounds(tmp_path):
    found = descent(tmp_path / "state", gradient_learning_rate=1.0, bounds=[0, 0.125])
    rows = np.array(found.coefficients)
    assert rows.min() == 0
    assert rows.max() == 0.125


def test_it_stops_once_the_held_out_images_are_no_better_for_long(tmp_path):
    """From the solution itself nothing gets better; the best is what it started from."""
    made, network = linear_candidates(), Linear(7)
    solved = closed_form(squares("match", made, network), made, network, 0.0, 1, (-10.0, 10.0), tmp_path / "closed")
    start = solved.coefficients[solved.best]
    found = descent(tmp_path / "state", start, gradient_learning_rate=0.5, gradient_patience=2)
    assert len(found.values) == 3
    assert found.best == 0


@pytest.mark.parametrize("stop", [1, 2, 4, 7])
def test_an_interruption_changes_no_bit(tmp_path, monkeypatch, stop):
    whole = descent(tmp_path / "whole")
    stop_at_write(monkeypatch, module, stop)
    with pytest.raises(KeyboardInterrupt):
        descent(tmp_path / "parts")
    monkeypatch.undo()
    parts = descent(tmp_path / "parts")
    assert (parts.passes, parts.values) == (whole.passes, whole.values)
    np.testing.assert_array_equal(parts.coefficients, whole.coefficients)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
