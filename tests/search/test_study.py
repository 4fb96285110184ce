import os
import sqlite3
import subprocess
import sys

import numpy as np
import optuna
import pytest
from accelerate import Accelerator
from optuna.trial import TrialState

from deme.errors import UserError
from deme.search import study as module
from deme.search.storage import open_storage
from deme.search.study import Study, grid_point, grid_values
from deme.search.ways import CONTROLS, first_candidates

FIRST = [np.zeros((1, 2)), np.full((1, 2), 0.25)]
COUNTS = {"tpe": 7, "gp": 5, "cmaes": 15, "random": 4, "grid": 4}  # of cmaes, into its third generation


def make(folder, sampler: str = "random", count: int = 6, first=None, name: str = "s", seed: int = 0) -> Study:
    storage = open_storage(f"sqlite:///{folder / 'study.db'}")
    first = [] if sampler in CONTROLS else FIRST if first is None else first
    return Study(storage, name, ["a", "b"], (1, 2), (0.0, 1.5), first, sampler, (seed,), count)


def distance(w: np.ndarray) -> float:
    return float(np.square(w - [[0.7, 1.1]]).sum())


def search(study: Study, value=distance) -> list[tuple]:
    """Places, coefficients and values of the candidates, after trying what is left."""
    study.run(Accelerator(cpu=True), value, lambda _: 10, "candidate")
    return rows(study)


def rows(study: Study) -> list[tuple]:
    return [(trial.user_attrs["place"], tuple(trial.params.values()), trial.value) for trial in study.trials()]


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


@pytest.mark.parametrize("sampler", COUNTS)
def test_an_interruption_changes_no_candidate(sampler, tmp_path):
    """Which one is the n-th depends on the seed, n and the values before: also after two interruptions in a row."""
    count = COUNTS[sampler]
    whole = search(make(tmp_path, sampler, count, name="whole"))
    assert [row[0] for row in whole] == list(range(count))
    assert len({row[1] for row in whole}) == count
    for stop in (2, 0, count - 4):
        left = iter(range(stop))

        def interrupted(w: np.ndarray, left=left) -> float:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return distance(w)

        with pytest.raises(KeyboardInterrupt):
            search(make(tmp_path, sampler, count), interrupted)
    study = make(tmp_path, sampler, count)
    assert search(study) == whole
    assert len(study.study.get_trials(states=[TrialState.FAIL])) == 3
    if sampler not in CONTROLS:
        assert min(row[2] for row in whole[len(FIRST) :]) < min(row[2] for row in whole[: len(FIRST)])


def test_another_seed_gives_other_candidates(tmp_path):
    first, second = (search(make(tmp_path, count=2, name=str(seed), seed=seed)) for seed in (0, 1))
    assert not {row[1] for row in first} & {row[1] for row in second}


def test_more_trials_go_on_where_fewer_ended(tmp_path):
    few = search(make(tmp_path, "cmaes", 4))
    assert search(make(tmp_path, "cmaes", 6))[:4] == few


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_grid_covers_all_points(dimensions):
    values = grid_values(4**dimensions - 1, dimensions)
    points = {tuple(grid_point(n, values, dimensions, (0.0, 1.5))) for n in range(values**dimensions)}
    axis = [0, 0.75, 1.5]
    assert points == set(map(tuple, np.stack(np.meshgrid(*[axis] * dimensions), -1).reshape(-1, dimensions)))


def test_a_grid_of_one_value_is_refused():
    with pytest.raises(UserError, match=r"a grid of 4 coefficients has at least 2 \*\* 4 candidates"):
        grid_values(15, 4)
    assert grid_values(16, 4) == 2


def test_candidates_of_jobs_that_ended_are_tried_again(tmp_path, monkeypatch):
    """At once where the job ran on this machine; one that still runs, or ran elsewhere, is waited for."""
    host = module._place()
    owners = [f"process {ended_process()} on {host}", f"process {os.getppid()} on {host}", "process 1 on elsewhere"]
    study = make(tmp_path)
    for place, owner in enumerate(owners):
        monkeypatch.setattr(module, "_owner", lambda owner=owner: owner)
        assert study._next()[0] == (0 if place < 2 else place - 1)
        monkeypatch.undo()
    whole = search(make(tmp_path, name="whole"))
    other = make(tmp_path)
    for place in range(2, 6):
        found, coefficients = other._next()
        assert found == place
        other._tell(found, coefficients, distance(coefficients), 10, "candidate")
    assert other._next() == (None, None)
    assert rows(other) == whole[2:]
    assert [trial.state for trial in other.study.trials[:3]] == [
        TrialState.FAIL,
        TrialState.RUNNING,
        TrialState.RUNNING,
    ]


def test_a_job_that_is_killed_while_a_candidate_is_proposed_leaves_nothing_to_wait_for(tmp_path, monkeypatch):
    """Its trial has no coefficients yet, or lacks some."""
    host = module._place()
    study = make(tmp_path)
    monkeypatch.setattr(module, "_owner", lambda: f"process {ended_process()} on {host}")
    for parameters in range(2):
        asked = []

        def killed(self, name, distribution, asked=asked, parameters=parameters, suggest=module.Trial._suggest):
            asked.append(name)
            if len(asked) > parameters:
                raise KeyboardInterrupt
            return suggest(self, name, distribution)

        with monkeypatch.context() as patch:
            patch.setattr(module.Trial, "_suggest", killed)
            with pytest.raises(KeyboardInterrupt):
                study._next()
    monkeypatch.undo()
    assert search(make(tmp_path)) == search(make(tmp_path, name="whole"))


def test_jobs_share_candidates_without_trying_one_twice(tmp_path, monkeypatch):
    """Two jobs in turns: each takes the next place, and all are those of a single job."""
    jobs = [make(tmp_path), make(tmp_path)]
    living = [f"process {number} on {module._place()}" for number in (os.getppid(), 1)]
    for _ in range(3):
        taken = []
        for job, owner in zip(jobs, living, strict=True):
            monkeypatch.setattr(module, "_owner", lambda owner=owner: owner)
            taken.append(job._next())
        for job, (place, coefficients) in zip(jobs, taken, strict=True):
            job._tell(place, coefficients, distance(coefficients), 10, "candidate")
    monkeypatch.undo()
    assert len(jobs[0].study.trials) == 6
    assert jobs[1]._next() is None
    assert rows(jobs[0]) == search(make(tmp_path, name="alone"))


def test_of_two_jobs_that_take_the_same_place_at_once_the_first_keeps_it(tmp_path, monkeypatch):
    """The second one looks while the first has not taken it yet; it takes the next."""
    jobs = [make(tmp_path), make(tmp_path)]
    begin = Study._begin

    def overtaken(self, notes):
        monkeypatch.setattr(Study, "_begin", begin)
        monkeypatch.setattr(module, "_owner", lambda: f"process {os.getppid()} on {module._place()}")
        assert jobs[0]._next()[0] == 0
        monkeypatch.undo()
        return begin(self, notes)

    monkeypatch.setattr(Study, "_begin", overtaken)
    assert jobs[1]._next()[0] == 1


def test_more_candidates_keep_the_places_of_those_that_were_tried(tmp_path):
    a, b, c = (np.full((1, 2), value) for value in (0.1, 0.2, 0.3))
    study = make(tmp_path, count=0)
    study.extend([a, b])
    search(study)
    study = make(tmp_path, count=0)
    study.extend([b, c])
    assert [(place, params[0]) for place, params, _ in search(study)] == [(0, 0.1), (1, 0.2), (2, 0.3)]
    assert [row[0, 0] for row in study.best(2)] == [0.3, 0.2]


def test_a_value_that_is_not_a_number_or_infinite_is_the_worst(tmp_path):
    """And not tried for ever; the samplers go on from it."""
    for sampler in ("tpe", "gp", "cmaes"):
        study = make(tmp_path, sampler, 4, name=sampler)
        nothing = np.nan if sampler == "tpe" else np.inf
        found = search(study, lambda w, nothing=nothing: nothing if w.max() < 0.1 else distance(w))
        assert found[0][2] == np.inf
        assert study.best(1)[0].max() >= 0.1
        assert np.isfinite(list(study.importance().values())).all()


def test_a_search_starts_from_what_lies_within_the_bounds():
    cheap = np.array([[0.2, 0.9]])
    starts = [row.ravel().tolist() for row in first_candidates(cheap, (0.0, 1.5))]
    uniform = [[value] * 2 for value in (0.5, 1.0)]
    assert starts == [[0, 0], [0.2, 0.9], [0.4, 1.5], *uniform]
    narrow = [row.ravel().tolist() for row in first_candidates(cheap, (-1.0, 0.9))]
    assert narrow == [[0, 0], [0.2, 0.9], [0.4, 0.9], [0.5] * 2]
    four = [row.tolist() for row in first_candidates(np.full((2, 4), 0.3), (0.0, 1.5))]
    assert [[0.1, 0.1, 0.2, 0.5]] * 2 in four


def test_another_programs_database_is_refused_and_stays_as_it_is(tmp_path):
    file = tmp_path / "study.db"
    with sqlite3.connect(file) as database:
        database.execute("create table papers (title text)")
    database.close()
    before = file.read_bytes()
    with pytest.raises(UserError, match="a database of another program"):
        open_storage(f"sqlite:///{file}")
    assert file.read_bytes() == before


def test_a_study_of_another_program_is_refused(tmp_path):
    """Its trials hold other coefficients and notes, or it has two values: Optuna's, but not a search's."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(storage=url, study_name="s").optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=1)
    optuna.create_study(storage=url, study_name="two", directions=["minimize", "maximize"])
    for name in ("s", "two"):
        with pytest.raises(UserError, match=r"search\.storage=sqlite:.*/study\.db: damaged, or not of this search: "):
            search(make(tmp_path, name=name))


def test_a_storage_whose_tables_were_not_all_made_is_completed(tmp_path):
    """By a job that was killed, or whose disk was full."""
    make(tmp_path)
    with sqlite3.connect(tmp_path / "study.db") as database:
        [*tables] = database.execute("select name from sqlite_master where type = 'table' and name != 'studies'")
        for (name,) in tables:
            database.execute(f"drop table {name}")
        database.execute("delete from studies")
    database.close()
    assert len(search(make(tmp_path, count=1))) == 1
