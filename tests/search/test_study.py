import sqlite3
import threading
import time
from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
import yaml
from noisy_images import problem_of
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import TrialState

from deme.config.experiment import Config
from deme.config.paths import with_schedule
from deme.config.sections import Sample, Search
from deme.errors import RunError, UserError
from deme.measure.scores import Score, compared
from deme.models.variants import write_denoiser
from deme.models.weights import weights_hash
from deme.search.least_squares import Evaluated
from deme.search.starts import first_candidates, grid, spread, starts
from deme.search.study import Study, grown, open_storage
from deme.search.ways import Result, verdict

FIRST = [np.zeros((1, 2)), np.full((1, 2), 0.25)]
COUNTS = {"tpe": 7, "gp": 5, "random": 4, "grid": 4}
THIRD = {"tpe": (0.59211797, 0.90829558), "gp": (0.50487690, 0.50506273), "random": (0.68783039, 0.52598777)}


def make(folder, sampler: str = "random", count: int = 6, name: str = "s", seed: int = 0, grows: bool = False) -> Study:
    problem = problem_of(["a", "b"], seed)
    first = {"random": [], "grid": grid(4, problem.bounds, (1, 2))}.get(sampler, FIRST)
    storage = open_storage(f"sqlite:///{folder / 'study.db'}")
    return Study(problem, storage, name, "match", 0, 0, sampler, first, count, grows=grows)


def distance(w: np.ndarray) -> float:
    return float(np.square(w - [[0.7, 1.1]]).sum())


def slow(w: np.ndarray) -> float:
    time.sleep(0.05)
    return distance(w)


def search(study: Study, value=distance) -> list[tuple]:
    """Coefficients and values of the candidates, after trying what is left."""
    study.problem.value = lambda objective, w, images: (value(w), 10)
    study.run()
    return rows(study)


def rows(study: Study) -> list[tuple]:
    return [(tuple(row.coefficients.ravel()), row.value) for row in study.rows()]


@pytest.mark.parametrize("sampler", COUNTS)
def test_an_interruption_changes_no_candidate(sampler, tmp_path):
    """Candidate n depends on the seed, n and the earlier values: also after two interruptions in a row."""
    count = COUNTS[sampler]
    whole = search(make(tmp_path, sampler, count, name="whole"))
    assert len({row[0] for row in whole}) == count
    for stop in (2, 0, count - 4):
        left = iter(range(stop))

        def interrupted(w: np.ndarray, left=left) -> float:
            if next(left, None) is None:
                raise SystemExit  # not an Exception: Optuna leaves the trial running, as after a kill
            return distance(w)

        with pytest.raises(SystemExit):
            search(make(tmp_path, sampler, count), interrupted)
    study = make(tmp_path, sampler, count)
    assert search(study) == whole
    assert len(study.study.get_trials(states=[TrialState.FAIL])) == 3
    if sampler in ("tpe", "gp"):
        assert min(row[1] for row in whole[len(FIRST) :]) < min(row[1] for row in whole[: len(FIRST)])


def test_candidates_stay_the_same_over_versions(tmp_path):
    """The samplers' seeds and settings are part of a search's result."""
    for sampler, third in THIRD.items():
        found = search(make(tmp_path, sampler, 3, name=sampler))
        np.testing.assert_allclose(found[2][0], third, rtol=1e-3)


def test_another_seed_gives_other_candidates(tmp_path):
    first, second = (search(make(tmp_path, count=2, name=str(seed), seed=seed)) for seed in (0, 1))
    assert not {row[0] for row in first} & {row[0] for row in second}


def test_more_trials_go_on_where_fewer_ended(tmp_path):
    few = search(make(tmp_path, "tpe", 4))
    assert search(make(tmp_path, "tpe", 6))[:4] == few


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_grid_covers_all_points(dimensions):
    points = {tuple(point.ravel()) for point in grid(4**dimensions - 1, [(0.0, 1.5)] * dimensions, (1, dimensions))}
    axis = [0, 0.75, 1.5]
    assert points == set(map(tuple, np.stack(np.meshgrid(*[axis] * dimensions), -1).reshape(-1, dimensions)))


def test_a_grid_of_one_value_is_refused():
    with pytest.raises(UserError, match=r"a grid of 4 coefficients has at least 2 \*\* 4 candidates"):
        grid(15, [(0.0, 1.5)] * 4, (2, 2))
    assert len(grid(16, [(0.0, 1.5)] * 4, (2, 2))) == 16


def test_bounds_move_away_from_the_best_candidate_that_lies_at_one():
    """By half of the first width each time that another best lies there, once the first candidates are tried."""
    points = [(0, 0), (0.3, 1.5), (1.5, 0.01), (1, 1), (1.5, -0.75), (1, -1), (9, 9)]
    values = [3, 2, 1, 1, 0.5, 0.7, 0.4]
    tried = [Evaluated("gp", "match", 0, value, np.array([point])) for point, value in zip(points, values, strict=True)]
    start, upper = [(0.0, 1.5), (0.0, 1.5)], [(0.0, 1.5), (0.0, 2.25)]
    both, last = [(0.0, 2.25), (-0.75, 2.25)], [(0.0, 2.25), (-1.5, 2.25)]
    found = [grown(start, FIRST, tried[:count]) for count in range(7)]
    assert found == [start, start, upper, both, both, last, last]
    assert grown(start, [*FIRST, np.array([[2.0, -1.0]])], tried[:2]) == [(0.0, 2.0), (-1.0, 1.5)]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_search_whose_bounds_grow_finds_what_lies_beyond_them(sampler, tmp_path, capsys):
    """It says so, an interruption changes nothing, and the best many are tried as they are."""
    beyond = {"value": lambda w: float(np.square(w - [[2.5, -1]]).sum())}
    whole = search(make(tmp_path, sampler, 14, name="whole", grows=True), **beyond)
    told = capsys.readouterr().out
    assert "the best lies at a bound: b is searched within [-0.75, 1.5], not [0, 1.5]\n" in told
    assert [row[0] for row in whole[: len(FIRST)]] == [(0, 0), (0.25, 0.25)]
    few = search(make(tmp_path, sampler, 9, grows=True), **beyond)
    study = make(tmp_path, sampler, 14, grows=True)
    assert few == whole[:9]
    assert search(study, **beyond) == whole
    best = min(study.rows(), key=lambda row: row.value)
    assert best.value < np.square([1.5 - 2.5, 1]).sum()  # that of the corner
    assert best.coefficients.max() > 1.5
    assert best.coefficients.min() < 0
    assert set(study.importance()) == {"a", "b"}
    finals = make(tmp_path, "finalists", 0, name="finals")
    finals.within = study.bounds(study.rows())
    finals.extend([best.coefficients])
    assert search(finals, **beyond) == [(tuple(best.coefficients.ravel()), best.value)]


def test_a_candidate_that_is_proposed_again_costs_nothing(tmp_path):
    """Here it is the corner, where the sampler expects the least value."""
    study, drawn = make(tmp_path, "gp", 14), []
    found = search(study, lambda w: drawn.append(tuple(w.ravel())) or -float(w.sum()))
    assert len(found) == 14
    assert drawn == list(dict.fromkeys(row[0] for row in found))
    assert len(drawn) < 14
    assert all(value == -sum(candidate) for candidate, value in found)
    assert study.rows()[-1].passes == 10 * len(drawn)


def test_jobs_share_candidates_without_trying_one_twice(tmp_path):
    """Three at once, while each has a candidate; all are those of a single job."""
    jobs = [make(tmp_path, count=12) for _ in range(3)]
    threads = [Thread(target=search, args=(job, slow)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(rows(jobs[0])) == sorted(search(make(tmp_path, count=12, name="alone")))


def test_a_job_waits_for_the_last_candidate_of_another(tmp_path):
    """And does not take it for a killed job's."""
    first, second = make(tmp_path, count=1), make(tmp_path, count=1)
    found = []

    def value(w: np.ndarray) -> float:
        thread.start()
        time.sleep(0.5)
        return distance(w)

    thread = Thread(target=lambda: found.extend(search(second, lambda w: pytest.fail("tried twice"))))
    whole = search(first, value)
    thread.join()
    assert found == whole
    assert len(first.study.trials) == 1


def test_the_candidate_of_a_killed_job_on_another_machine_is_tried_again(tmp_path, monkeypatch):
    """Once its heartbeat is old; the job itself, if it was only suspended, stops in one line."""
    whole = search(make(tmp_path, name="whole"))
    suspended, other = make(tmp_path), make(tmp_path)

    def value(w: np.ndarray) -> float:
        with sqlite3.connect(tmp_path / "study.db") as database:
            database.execute("update trial_heartbeats set heartbeat = '2000-01-01'")
        database.close()
        search(other)
        return distance(w)

    with pytest.raises(RunError, match=r"^search\.storage: no sign of life for 300 seconds, so another job tries"):
        search(suspended, value)
    assert sorted(rows(other)) == sorted(whole)


def test_a_job_that_was_killed_before_its_first_heartbeat_is_not_waited_for_for_ever(tmp_path):
    study = make(tmp_path, count=2)
    study.study.add_trial(optuna.create_trial(state=TrialState.RUNNING))
    study._joined = nullcontext  # another job holds the lock
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("update trials set datetime_start = '2000-01-01 00:00:00'")
    database.close()
    assert len(search(study)) == 2
    assert [trial.state for trial in study.study.trials] == [TrialState.FAIL, *[TrialState.COMPLETE] * 2]


def test_an_error_of_the_value_is_not_the_storages(tmp_path):
    def value(w: np.ndarray) -> float:
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        search(make(tmp_path), value)


def test_more_candidates_keep_the_places_of_those_that_were_tried(tmp_path):
    a, b, c = (np.full((1, 2), value) for value in (0.1, 0.2, 0.3))
    study = make(tmp_path, count=0)
    study.extend([a, b])
    search(study)
    study = make(tmp_path, count=0)
    study.extend([b, c])
    assert [params[0] for params, _ in search(study)] == [0.1, 0.2, 0.3]


def test_a_value_that_is_not_a_number_or_infinite_is_the_worst(tmp_path):
    """And not tried for ever; the samplers go on from it."""
    for sampler in ("tpe", "gp"):
        study = make(tmp_path, sampler, 4, name=sampler)
        nothing = np.nan if sampler == "tpe" else np.inf
        found = search(study, lambda w, nothing=nothing: nothing if w.max() < 0.1 else distance(w))
        assert found[0][1] == np.inf
        assert max(min(found, key=lambda row: row[1])[0]) >= 0.1
        assert np.isfinite(list(study.importance().values())).all()


def test_a_search_starts_from_what_lies_within_the_bounds():
    cheap = np.array([[0.2, 0.9]])
    first = [row.ravel().tolist() for row in first_candidates(cheap, (0.0, 1.5))]
    uniform = [[value] * 2 for value in (0.5, 1.0)]
    assert first == [[0, 0], [0.2, 0.9], [0.4, 1.5], *uniform]
    narrow = [row.ravel().tolist() for row in first_candidates(cheap, (-1.0, 0.9))]
    assert narrow == [[0, 0], [0.2, 0.9], [0.4, 0.9], [0.5] * 2]
    few = [row.ravel().tolist() for row in first_candidates(np.full((1, 4), 0.3), (0.0, 1.5), is_few=True)]
    assert few == [[0] * 4, [0.3] * 4, [0.6] * 4, [0.25] * 4]
    four = [row.tolist() for row in first_candidates(np.full((2, 4), 0.3), (0.0, 1.5))]
    assert [[0.1, 0.1, 0.2, 0.5]] * 2 in four


def test_candidates_can_be_spread_over_the_bounds():
    """Each of as many equal parts of each interval holds one; another search has others."""
    bounds, widths = [(0.0, 1.5), (-1.0, 1.0), (-3.0, 0.5)], [1.5, 2.0, 3.5]
    points = [spread(5, bounds, (1, 3), (seed,)) for seed in (0, 0, 1)]
    parts = (np.concatenate(points[0]) - [low for low, _ in bounds]) / widths * 5
    assert np.sort(parts.astype(int), axis=0).T.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert np.array_equal(points[0], points[1])
    assert not np.array_equal(points[0], points[2])
    assert spread(0, bounds, (1, 3), (0,)) == []


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


def test_the_report_says_whether_the_gain_carries_over_to_other_schedules():
    """By the paired differences with each; the schedule of sample, whose rows have no suffix, is one of them."""

    def words(gains: dict[str, float], result: float = 0.8) -> list[str]:
        scores: list[Score] = []
        for schedule, gain in gains.items():
            for name, shift in (("pretrained", 0.0), ("best", gain)):
                blocks = [2.0 + 0.01 * number * shift + shift for number in range(5)]
                row = Score(with_schedule(name, schedule), None, 10, 2.0 + shift, blocks, 2.0 + shift, 0.1)
                scores.append(compared(row, scores))
        settings = Search(schedules=[{"steps": 20}, {"steps": 20, "scheduler": "euler"}])
        config = Config(search=settings, sample=Sample(num_inference_steps=50))
        coefficients = np.full((1, 2), 0.5)
        found = Result(coefficients, "fd", result, 1.0, [], dict.fromkeys("ab", (0.0, 1.5)))
        return verdict(config, found, scores, None)

    told = words({"": -0.2, "ddim-20": -0.4, "euler-20": -0.6, "ddim-10": -0.1})
    assert told[0].startswith("the best is better than the pretrained model: -0.2")
    assert [line.split(":")[0] for line in told[1:5]] == [
        "by ddim-20, searched",
        "by euler-20, searched",
        "by ddim-10, not searched",
        "by ddim-50, not searched",
    ]
    assert told[5].endswith("relative to the pretrained model's: 0.8000 where it was searched, 0.7500 on fresh seeds")
    assert told[6] == "the gain carries over: clear with 2 of 2 schedules that were not searched"
    told = words({"": 0.2, "ddim-20": -0.4, "euler-20": 0.0, "ddim-10": -0.1})
    assert told[0].startswith("the best is WORSE than the pretrained model: +0.2")
    assert told[6] == "the gain does NOT carry over to all: clear with 1 of 2 schedules that were not searched"
    told = words({"": -0.2, "ddim-20": 0.0, "euler-20": 0.1})
    assert told[1].startswith("by ddim-20, searched: NOT clearly better, +0.0000")
    assert told[5] == "no clear gain with the searched schedules: clear with 1 of 1 schedules that were not searched"


def test_other_searches_are_where_a_study_starts(tmp_path):
    """One network's coefficients hold for every group; both files together are tried, too."""
    folders = [tmp_path / name / "unet" for name in ("expert", "own", "pretrained")]
    for seed, folder in enumerate(folders):
        write_denoiser(folder.parent, {"weight": torch.full((2,), float(seed))}, {})
    expert, own, _ = map(weights_hash, folders)

    def start(*files: dict, grows: bool = False) -> list[list[list[float]]]:
        paths = [tmp_path / f"{number}.yaml" for number in range(len(files))]
        for path, content in zip(paths, files, strict=True):
            path.write_text(yaml.safe_dump(content))
        settings = SimpleNamespace(start=list(map(str, paths)), grow_bounds=grows)
        config = SimpleNamespace(paths=SimpleNamespace(finetuned=folders[:2]))
        problem = SimpleNamespace(config=config, settings=settings, patterns=["a.*", "*"], shape=(2, 2))
        problem.bounds, problem.pipeline = [(0.0, 1.5), (-3.0, 0.5)] * 2, folders[2].parent
        return [row.tolist() for row in starts(problem)]

    by_group = {"coefficients": {"a.*": [0.25], "*": [1.0]}, "finetuned": [expert]}
    whole = {"coefficients": {"*": [-1.0]}, "finetuned": [own]}
    both = [[[0.25, 0], [1, 0]], [[0, -1], [0, -1]], [[0.25, -1], [1, -1]]]
    assert start(by_group, whole) == both
    assert start(whole) == [both[1]]
    assert start(whole, whole, whole, whole)[4:] == []  # their sum is out of bounds
    assert start(whole, whole, whole, whole, grows=True)[4:] == [[[0, -4], [0, -4]]]
    for reason, content in {
        "for other networks": whole | {"finetuned": ["another"]},
        "has no 1 coefficients for a": {"coefficients": {"b.*": [1.0], "*": [1.0]}, "finetuned": [expert]},
        "has other groups": {"coefficients": {"a.*": [1.0], "b.*": [1.0], "*": [1.0]}, "finetuned": [expert]},
        "outside of search.bounds": {"coefficients": {"*": [1.6]}, "finetuned": [expert]},
        "for other networks than model.pretrained": whole | {"pretrained": expert},
    }.items():
        with pytest.raises(UserError, match=f"search.start=.*0.yaml: .*{reason}"):
            start(content)
    folders[1] = folders[0]
    with pytest.raises(UserError, match="have equal weights"):
        start(by_group)


def test_a_heartbeat_that_nothing_ends_does_not_hold_the_process(tmp_path):
    """As a signal leaves it that comes within its start."""
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    heartbeat = get_heartbeat_thread(optuna.create_study(storage=storage).ask()._trial_id, storage)
    heartbeat.start()
    assert heartbeat._thread.daemon
    heartbeat.join()


def test_an_error_of_the_storage_in_a_heartbeat_prints_no_traceback(tmp_path, monkeypatch):
    """As that of a database which a signal interrupts while a heartbeat is written."""
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    tried, printed = [], []
    monkeypatch.setattr(threading, "excepthook", printed.append)

    def record(trial: int) -> None:
        tried.append(trial)
        raise sqlite3.OperationalError("interrupted")

    monkeypatch.setattr(storage, "record_heartbeat", record)
    heartbeat = get_heartbeat_thread(optuna.create_study(storage=storage).ask()._trial_id, storage)
    heartbeat.start()
    heartbeat.join()
    assert tried
    assert not printed
