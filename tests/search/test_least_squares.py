import numpy as np
import pytest
import torch
from conftest import tiny_unet
from hypothesis import given
from hypothesis import strategies as st
from noisy_images import Linear, linear_candidates, squares
from scipy.optimize import minimize

from deme.config.sections import Search
from deme.method.task_vectors import Candidates
from deme.search import least_squares
from deme.search.least_squares import (
    GRADIENT_PASSES,
    Progress,
    closed_form,
    gradient_descent,
    linearized,
    ridge_step,
)

EXACT = Search(ridge=0.0, gauss_newton=1, bounds=[-100, 100])


def best(rows):
    return min(rows, key=lambda row: row.value)


def stop_at_save(monkeypatch, number: int) -> None:
    """Interrupt a solver before it saves its progress for the n-th time."""
    save, saves = Progress.save, []

    def interrupted(self) -> None:
        saves.append(1)
        if len(saves) == number:
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(Progress, "save", interrupted)


def equal(one, other) -> bool:
    """Whether two solvers scored the same candidates, bit for bit."""
    return all(
        (a.passes, a.value) == (b.passes, b.value) and np.array_equal(a.coefficients, b.coefficients)
        for a, b in zip(one, other, strict=True)
    )


# --- closed form


def by_numpy(objective, candidates) -> np.ndarray:
    """Least squares by numpy, from the network's definition."""
    networks = [Linear(seed) for seed in (0, 1, 2)]
    rows, values = [], []
    with torch.no_grad():
        for batch in objective.batches:
            scale = batch.weights.sqrt()[:, None, None, None]
            columns = []
            for part in ("near", "far"):
                for expert in networks[1:]:
                    change = Linear(0)
                    change.near.weight.zero_()
                    change.far.weight.zero_()
                    getattr(change, part).weight += getattr(expert, part).weight - getattr(networks[0], part).weight
                    columns.append((scale * batch.predict(change)).flatten())
            rows.append(torch.stack(columns, 1))
            values.append((scale * (batch.target - batch.predict(networks[0]))).flatten())
    matrix, right = (torch.cat(parts).double().numpy() for parts in (rows, values))
    return np.linalg.lstsq(matrix, right, rcond=None)[0].reshape(candidates.shape)


@pytest.mark.parametrize("name", ["match", "loss"])
def test_a_linear_network_is_solved_exactly_in_one_step(name, tmp_path):
    """As least squares by numpy; a second step changes nothing. Its value is what was predicted: the least."""
    made, network = linear_candidates(), Linear(7)
    objective = squares(name, made, network, range(120))
    first, *rows = closed_form(objective, EXACT, tmp_path / "state")
    expected = by_numpy(objective, made)
    for row in rows:
        np.testing.assert_allclose(row.coefficients, expected, rtol=2e-3, atol=2e-4)
    assert first.value == 1
    least = best(rows).value
    assert least == pytest.approx(objective.value(expected), rel=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert objective.value(expected + 0.05 * rng.standard_normal(made.shape)) > least


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_normal_equations_are_those_of_finite_differences(layout):
    """Of a network that is not linear, about coefficients that are not 0; channels last, as on a GPU, too."""
    base, experts = tiny_unet(), {f"range {k}": tiny_unet(k + 1).state_dict() for k in range(2)}
    made = Candidates(base.state_dict(), experts, dict.fromkeys(base.state_dict(), 0), "cpu")
    network, about, step = tiny_unet(7).to(memory_format=layout), np.array([[0.3, 0.1]]), 1e-2
    batch = squares("match", made, network).batches[0]

    def prediction(w: np.ndarray) -> torch.Tensor:
        made.form(network, w)
        with torch.no_grad():
            return (batch.weights.sqrt()[:, None, None, None] * batch.predict(network)).double().flatten()

    changes = [np.array([[step, 0.0]]), np.array([[0.0, step]])]
    columns = torch.stack([(prediction(about + d) - prediction(about - d)) / (2 * step) for d in changes])
    target = (batch.weights.sqrt()[:, None, None, None] * batch.target).double().flatten()
    residual = target - prediction(about)
    made.form(network, about)
    curvature, slope = linearized(batch, made, network)
    torch.testing.assert_close(curvature, columns @ columns.T, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(slope, columns @ residual, rtol=1e-2, atol=1e-4)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 5), pull=st.sampled_from([1e-3, 1.0]))
def test_without_active_bounds_a_step_solves_the_ridge_equations(seed, size, pull):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2 * size, size))
    curvature, slope, about = rows.T @ rows, rng.standard_normal(size), rng.standard_normal(size)
    expected = np.linalg.solve(curvature + pull * np.eye(size), curvature @ about + slope)
    found = ridge_step(curvature, slope, about, pull, (-1e6, 1e6))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@given(seed=st.integers(0, 2**32 - 1))
def test_within_bounds_a_step_is_the_least_of_the_quadratic(seed):
    """Compared with scipy's L-BFGS-B; clipping the free solution is worse where coefficients depend on each other."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((4, 3))
    curvature, slope, about, pull = rows.T @ rows, 3 * rng.standard_normal(3), rng.uniform(0, 1, 3), 0.1

    def cost(w: np.ndarray) -> float:
        return (w - about) @ curvature @ (w - about) - 2 * slope @ (w - about) + pull * w @ w

    found = ridge_step(curvature, slope, about, pull, (0.0, 1.0))
    assert ((found >= 0) & (found <= 1)).all()
    expected = minimize(cost, about, bounds=[(0, 1)] * 3, method="L-BFGS-B", options={"ftol": 1e-14})
    assert cost(found) <= expected.fun + 1e-6 * (1 + abs(expected.fun))


def test_coefficients_that_change_nothing_stay_at_0():
    """Two groups, one of which the experts share with the pretrained network, without a pull."""
    found = ridge_step(np.diag([1.0, 0.0]), np.array([0.5, 0.0]), np.zeros(2), 0.0, (-1.0, 1.0))
    np.testing.assert_allclose(found, [0.5, 0], atol=1e-9)


@pytest.mark.parametrize("stop", [1, 3, 5, 10])
def test_an_interruption_changes_no_number(tmp_path, monkeypatch, stop):
    """Before the given write of the state, within a step or between two."""
    base, experts = tiny_unet(), {f"range {k}": tiny_unet(k + 1).state_dict() for k in range(2)}
    made = Candidates(base.state_dict(), experts, dict.fromkeys(base.state_dict(), 0), "cpu")
    network = tiny_unet(7)
    objective = squares("match", made, network)
    settings = Search(ridge=1e-3, gauss_newton=2)
    whole = closed_form(objective, settings, tmp_path / "whole")
    stop_at_save(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        closed_form(objective, settings, tmp_path / "parts")
    monkeypatch.undo()
    counted = []
    monkeypatch.setattr(least_squares, "linearized", lambda *a: counted.append(1) or linearized(*a))
    assert equal(closed_form(objective, settings, tmp_path / "parts"), whole)
    steps = len(whole) - 1
    done = (stop - 1) // 5 * 4 + min((stop - 1) % 5, 4)  # batches, each step's 4 and its end
    assert len(counted) == 4 * steps - done
    counted.clear()
    assert equal(closed_form(objective, settings, tmp_path / "parts"), whole)
    assert counted == []


def test_a_damaged_state_is_said_and_made_anew(tmp_path, capsys):
    solving = (squares("match", linear_candidates(), Linear(7)), EXACT, tmp_path / "state")
    whole = closed_form(*solving)
    content = (tmp_path / "state").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text"):
        (tmp_path / "state").write_bytes(damaged)
        assert equal(closed_form(*solving), whole)
        assert f"{tmp_path / 'state'}: unreadable, made anew (" in capsys.readouterr().out


# --- gradient descent


SETTINGS = {"gradient_steps": 60, "gradient_learning_rate": 0.05, "pull": 0.0, "bounds": [-10, 10]}


def descent(file, start=None, held_out_places: range = range(30), **settings):
    made, network = linear_candidates(), Linear(7)
    objective, held_out = squares("match", made, network), squares("match", made, network, held_out_places)
    start = np.zeros(made.shape) if start is None else start
    return gradient_descent(objective, held_out, Search(**(SETTINGS | settings)), start, file)


def test_it_converges_to_the_closed_form_of_a_linear_network(tmp_path):
    made, network = linear_candidates(), Linear(7)
    objective = squares("match", made, network)
    least = best(closed_form(objective, EXACT, tmp_path / "closed")).value
    rows = descent(tmp_path / "state", gradient_steps=600, gradient_patience=60)
    assert rows[0].value == pytest.approx(1, abs=1e-5)
    assert best(rows).value == pytest.approx(least, abs=0.02 * (1 - least))
    assert rows[0].passes == 90  # the objective was made of two passes of each image
    assert rows[2].passes == 90 + 20 * GRADIENT_PASSES * 30 // 4 + 2 * 30  # 20 steps are five times all four batches


def test_it_starts_where_it_is_told_and_is_pulled_back_there(tmp_path):
    start = np.full((2, 2), 0.25)
    free = descent(tmp_path / "free", start)
    pulled = descent(tmp_path / "pulled", start, pull=1000.0)
    np.testing.assert_array_equal(free[0].coefficients, start)
    assert np.abs(pulled[-1].coefficients - start).max() < 0.3 * np.abs(free[-1].coefficients - start).max()


def test_it_stays_within_the_bounds(tmp_path):
    found = descent(tmp_path / "state", gradient_learning_rate=1.0, bounds=[0, 0.125])
    rows = np.array([row.coefficients for row in found])
    assert rows.min() == 0
    assert rows.max() == 0.125


def test_it_stops_once_the_held_out_images_are_no_better_for_long(tmp_path):
    """From the solution itself nothing gets better; the best is what it started from."""
    made, network = linear_candidates(), Linear(7)
    start = best(closed_form(squares("match", made, network), EXACT, tmp_path / "closed")).coefficients
    rows = descent(tmp_path / "state", start, gradient_learning_rate=0.5, gradient_patience=2)
    assert len(rows) == 3
    assert best(rows) is rows[0]


@pytest.mark.parametrize("stop", [1, 2, 4, 7])
def test_an_interruption_of_the_descent_changes_no_bit(tmp_path, monkeypatch, stop):
    whole = descent(tmp_path / "whole")
    stop_at_save(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        descent(tmp_path / "parts")
    monkeypatch.undo()
    assert equal(descent(tmp_path / "parts"), whole)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
