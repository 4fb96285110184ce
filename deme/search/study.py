"""Candidates one after another: an Optuna study, in a storage that outlives the process and that jobs share."""

import fcntl
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from operator import attrgetter
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import optuna
from optuna import exceptions, samplers
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, _heartbeat
from optuna.trial import Trial, TrialState
from sqlalchemy import create_engine, inspect

from deme.config.section import without_password
from deme.errors import RunError, UserError, naming, one_line
from deme.job.files import POLLED_EVERY
from deme.job.processes import Processes, in_main_process, locked_by_all
from deme.search.least_squares import Evaluated
from deme.search.problem import Problem

Bounds = list[tuple[float, float]]  # of each coefficient
PASSES = "passes"  # attribute of a trial: UNet passes that its value took
NEAR = 0.05  # of an interval's width, within which a coefficient lies at a bound
GROWTH = 0.5  # of that width
HEARTBEAT = 30  # seconds between two heartbeats of a running trial
GRACE = 300  # seconds without a heartbeat after which a trial's candidate is tried again

optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)  # a signal within a query would print a traceback
warnings.filterwarnings("ignore", category=exceptions.ExperimentalWarning)


class QuietThread(Thread):
    """A thread that neither holds the process nor prints a traceback.

    A signal within its start leaves a heartbeat without an end. What the storage raises in it the search meets itself.
    """

    def __init__(self, **given: Any):
        super().__init__(**given, daemon=True)

    def run(self) -> None:
        with suppress(Exception):
            super().run()


_heartbeat.Thread = QuietThread


@dataclass(eq=False)
class Study:
    """Candidates that were tried with one objective, and those still to be tried.

    With one job, candidate n is a function of the stream, n and the earlier values: an interrupted search goes on as
    if nothing had happened. Several jobs share the candidates; which they are then depends on the jobs' timing, too.
    Of `count` candidates the `first` ones are given, and the sampler draws the others.
    """

    problem: Problem
    storage: RDBStorage
    name: str
    objective: str
    images: int  # that fd draws of each candidate
    spent: int  # UNet passes before
    sampler: str
    first: Sequence[np.ndarray] = ()
    count: int = 0
    within: Bounds | None = None  # where candidates begin; None: the problem's bounds
    grows: bool = False  # the bounds, where the best lies at one

    def __post_init__(self):
        with reading(self.storage):
            self.study = optuna.create_study(storage=self.storage, study_name=self.name, load_if_exists=True)
            if self.study.directions != [optuna.study.StudyDirection.MINIMIZE]:
                raise ValueError(f"study {self.name} does not minimize one value")
        self._trials = partial(self.study.get_trials, False)  # no deep copies
        self.within = self.problem.bounds if self.within is None else self.within

    # --- what was tried

    def rows(self) -> list[Evaluated]:
        """The candidates with a value, in order."""
        label = f"fd of {self.images:,} images" if self.objective == "fd" else self.objective
        if schedules := self.problem.settings.schedules:
            label = f"{label}, relative, mean of {len(schedules)} schedule(s)"
        rows, spent = [], self.spent
        with reading(self.storage):
            for trial in self._trials([TrialState.COMPLETE]):
                passes, row = trial.user_attrs[PASSES], [trial.params[name] for name in self.problem.names]
                if not (np.isfinite([passes, *row]).all() and passes >= 0 and isinstance(trial.value, float)):
                    raise ValueError(f"trial {trial.number} is not a candidate")
                spent += passes
                rows.append(Evaluated(self.sampler, label, spent, trial.value, np.reshape(row, self.problem.shape)))
        return rows

    def importance(self) -> dict[str, float]:
        """Each coefficient's share of the values' variance, the largest first; empty if the values do not differ."""
        if len({row.value for row in self.rows() if math.isfinite(row.value)}) < 2:
            return {}
        fanova = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(self._copy(self.bounds(self.rows())), evaluator=fanova)

    def bounds(self, rows: Sequence[Evaluated]) -> Bounds:
        """The bounds of the candidate after these."""
        return grown(self.within, self.first, rows) if self.grows else self.within

    def _copy(self, bounds: Bounds, sampler: samplers.BaseSampler | None = None) -> optuna.Study:
        """The study in memory as if these had been the bounds all along: samplers take no candidates of others."""
        within = self._distributions(bounds)
        copy = optuna.create_study(sampler=sampler)
        for trial in self._trials([TrialState.COMPLETE, TrialState.RUNNING]):
            if trial.params.keys() == within.keys():
                known = {"state": trial.state, "value": trial.value, "params": trial.params}
                copy.add_trial(optuna.create_trial(**known, distributions=within))
        return copy

    def _distributions(self, bounds: Bounds) -> dict[str, FloatDistribution]:
        return {name: FloatDistribution(*pair) for name, pair in zip(self.problem.names, bounds, strict=True)}

    # --- trying

    def extend(self, candidates: Sequence[np.ndarray]) -> None:
        """Try these candidates, without the sampler, after those that were tried before."""
        self.first = distinct([*(row.coefficients for row in self.rows()), *candidates])
        self.count = len(self.first)

    def run(self) -> list[Evaluated]:
        """Try candidates until all are tried, with the other jobs that share the storage; all of them, in order."""
        processes = self.problem.processes
        with self._joined() if processes.is_main_process else nullcontext():
            while True:
                told = in_main_process(processes, self._try_all)  # a candidate if `_score` of the main process tells it
                if isinstance(told, np.ndarray):
                    self.problem.value(self.objective, told, self.images)
                elif told:
                    return in_main_process(processes, self.rows)
                else:  # other jobs still try the last candidates
                    time.sleep(POLLED_EVERY)

    @contextmanager
    def _joined(self) -> Iterator[None]:
        """Hold a lock beside an SQLite file with the other jobs that use it.

        A job that is alone there gives up what killed jobs left running; it is tried again as the same candidates.
        """
        url = self.storage.engine.url
        if url.get_backend_name() != "sqlite":
            yield
            return
        with open(f"{url.database}.lock", "a") as file:
            with suppress(OSError):  # another job holds it, or the disk has no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with reading(self.storage):
                    for trial in self._trials([TrialState.RUNNING]):
                        self.study.tell(trial.number, state=TrialState.FAIL)
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def _try_all(self) -> bool:
        """Try candidates while there are free ones. Returns whether all are complete."""
        while True:
            with reading(self.storage):
                optuna.storages.fail_stale_trials(self.study)  # the candidates of killed jobs are tried again
                oldest = datetime.now() - timedelta(seconds=GRACE)
                for trial in self._trials([TrialState.RUNNING]):
                    if not trial.params and trial.datetime_start < oldest:  # killed before its first heartbeat
                        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                trials = self._trials([TrialState.COMPLETE, TrialState.RUNNING])
            if len(trials) >= self.count:
                return sum(trial.state is TrialState.COMPLETE for trial in trials) >= self.count
            raised: list[Exception] = []
            try:
                with reading(self.storage):
                    self.study.optimize(partial(self._score, raised=raised), n_trials=1)
            finally:
                if raised:  # not by the storage
                    raise raised[0] from None

    def _score(self, trial: Trial, raised: list[Exception]) -> float:
        """The value of the candidate that a trial gets; what computing it raises is also put into a list."""
        place = sum(one.number < trial.number and one.state is not TrialState.FAIL for one in self._trials())
        if place >= self.count:  # another job took the last candidate at the same time
            return math.nan  # for Optuna a failure
        problem = self.problem
        bounds = self._told_bounds()
        self.study.sampler = self._sampler(place, bounds)  # Optuna samples at the first suggestion
        values = [trial.suggest_float(name, *pair) for name, pair in zip(problem.names, bounds, strict=True)]
        coefficients = np.reshape(values, problem.shape)
        try:
            value, passes = self._known(coefficients), 0
            if value is None:
                # tells the other processes, which wait in `run`
                in_main_process(problem.processes, lambda: coefficients)
                value, passes = problem.value(self.objective, coefficients, self.images)
                value = math.inf if math.isnan(value) else value
            with reading(self.storage):
                trial.set_user_attr(PASSES, passes)
        except Exception as error:
            raised.append(error)
            raise
        label = f"{self.objective}, {'finalist' if self.sampler == 'finalists' else 'candidate'}"
        at = np.round(values, 3).tolist() if problem.shape[0] == 1 else f"{len(values)} coefficients"
        best = min([value, *(row.value for row in self.rows())])
        print(f"{label} {place + 1} of {self.count}: {value:.4f} at {at}; the best: {best:.4f}", flush=True)
        return value

    def _known(self, coefficients: np.ndarray) -> float | None:
        """The value of an earlier candidate that is the same network: samplers repeat one of which they expect most."""
        network = self.problem.network_of(coefficients)
        same = (row.value for row in self.rows() if np.array_equal(self.problem.network_of(row.coefficients), network))
        return next(same, None)

    def _told_bounds(self) -> Bounds:
        """The bounds of the next candidate; what has grown since the last one is told."""
        rows = self.rows()
        bounds = self.bounds(rows)
        for name, before, now in zip(self.problem.names, self.bounds(rows[:-1]), bounds, strict=True):
            if before != now:
                told = [f"[{low:g}, {high:g}]" for low, high in (before, now)]
                print(f"the best lies at a bound: {name} is searched within {told[1]}, not {told[0]}", flush=True)
        return bounds

    def _sampler(self, place: int, bounds: Bounds) -> samplers.BaseSampler:
        """What draws the candidate of this place, counted from 0, within the bounds."""
        startup = len(self.first)
        if place < startup:
            clipped = np.clip(self.first[place].ravel(), *np.transpose(bounds)).tolist()
            return _fixed(dict(zip(self.problem.names, clipped, strict=True)))
        seed = int(np.random.default_rng((*self.problem.stream, place)).integers(2**31))
        sampler: samplers.BaseSampler = samplers.RandomSampler(seed)
        if self.sampler == "tpe":
            sampler = samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
        if self.sampler == "gp":
            sampler = samplers.GPSampler(seed=seed, n_startup_trials=startup)
        if bounds == self.within:
            return sampler
        return _fixed(self._copy(bounds, sampler).ask(self._distributions(bounds)).params)


def _fixed(coefficients: dict[str, float]) -> samplers.BaseSampler:
    return samplers.PartialFixedSampler(coefficients, samplers.RandomSampler(0))


def grown(bounds: Bounds, first: Sequence[np.ndarray], rows: Sequence[Evaluated]) -> Bounds:
    """The bounds after these candidates: they hold the first ones, and move away where the best lies at one of them.

    So do they each time that another best lies there, once the first are tried, by GROWTH of an interval's width.
    """
    held = np.array([*np.transpose(bounds), *(row.ravel() for row in first)])
    low, high = held.min(0), held.max(0)
    step = GROWTH * (high - low)
    for count in range(max(1, len(first)), len(rows) + 1):
        best = min(rows[:count], key=attrgetter("value")).coefficients.ravel()
        at_low, at_high = is_at(best, low, high)
        low, high = low - step * at_low, high + step * at_high
    return list(zip(low.tolist(), high.tolist(), strict=True))


def is_at(value: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """Whether coefficients lie at the lower bound, and at the upper one."""
    near = NEAR * (high - low)
    return value <= low + near, value >= high - near


def distinct(candidates: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The coefficients without repetitions, in order."""
    return list({tuple(row.ravel()): row for row in candidates}.values())


# --- the storage


def open_storage(url: str) -> RDBStorage:
    """Open or create an Optuna storage."""
    try:
        if url.startswith("sqlite"):
            engine = create_engine(url)
            tables = inspect(engine).get_table_names()
            engine.dispose()
            if tables and "studies" not in tables:  # the first one that Optuna creates
                raise UserError("a database of another program")
        retry = RetryHeartbeatStaleTrialCallback()
        return RDBStorage(url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry)
    except Exception as error:  # SQLAlchemy and the database drivers raise their own
        reason = one_line(error).replace(url, without_password(url))
        raise UserError(f"no Optuna storage can be opened there: {reason}") from None


def open_by_all(processes: Processes, url: str | None, folder: Path) -> RDBStorage:
    """Open `search.storage`, or study.db of the search's folder, in every process."""
    where = url or f"sqlite:///{folder / 'study.db'}"
    with (
        locked_by_all(processes, folder / "storage", "search.output", wait=True),  # two at once would fail
        naming("search.storage", without_password(url) or folder / "study.db"),
    ):
        in_main_process(processes, lambda: open_storage(where))
    return open_storage(where)


@contextmanager
def reading(storage: RDBStorage) -> Iterator[None]:
    """Explain errors of the storage without its password: RunError if it is gone, full or locked for long."""
    try:
        yield
    except (UserError, RunError):
        raise
    except (exceptions.StorageInternalError, exceptions.UpdateFinishedTrialError) as error:
        is_stale = isinstance(error, exceptions.UpdateFinishedTrialError)
        stale = f"no sign of life for {GRACE} seconds, so another job tries this job's candidate"
        raise RunError(f"search.storage: {stale if is_stale else one_line(error)}; the same command goes on") from error
    except Exception as error:  # damaged rows lead to any error of Optuna and SQLAlchemy
        place = storage.engine.url.render_as_string(hide_password=True)
        raise UserError(f"search.storage={place}: damaged, or not of this search: {one_line(error)}") from error
