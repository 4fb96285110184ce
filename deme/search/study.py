"""Trying candidates one after another: an Optuna study in a storage that outlives the process and that jobs share."""

import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import cmaes
import numpy as np
import optuna
from accelerate import Accelerator
from optuna.distributions import FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from deme.data.draws import Stream
from deme.errors import UserError
from deme.job.locks import POLLED_EVERY, signs_of_life
from deme.job.processes import in_main_process
from deme.search.state import Evaluated
from deme.search.storage import HEARTBEAT, read_trials, reading

SIGMA = 0.25  # of the bounds' distance: CMA-ES's first step size
PLACE = "place"  # of a trial: which of the candidates it is, in the order of the search
OWNER = "owner"  # of a trial: the process that tries it
PASSES = "passes"

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=ExperimentalWarning)


class Study:
    """The candidates that were tried with one objective, and those that are to come.

    Which candidate is the n-th depends on the stream, n and the values of those before alone: an interrupted search
    goes on as if nothing had happened. Jobs that share the storage share the candidates.

    Args:
        names: of the coefficients, in row-major order.
        shape: (groups, ranges).
        interval: the bounds of each.
        first: candidates that are tried before the sampler's. Those of an earlier, shorter search keep their places.
        sampler: tpe, gp, cmaes, random or grid.
        stream: of all random draws.
        count: how many candidates are tried.
    """

    def __init__(
        self,
        storage: RDBStorage,
        name: str,
        names: Sequence[str],
        shape: tuple[int, int],
        interval: tuple[float, float],
        first: Sequence[np.ndarray] = (),
        sampler: str = "random",
        stream: Stream = (0,),
        count: int = 0,
    ):
        self.storage = storage
        self.names = list(names)
        self.shape = shape
        self.interval = interval
        self.first = list(first)
        self.sampler = sampler
        self.stream = stream
        self.count = count
        with reading(self.storage):
            self.study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self._alive = ExitStack()  # holds the signs of life of the running trial
        self.space = {name: FloatDistribution(*interval) for name in self.names}

    # --- what is there

    def trials(self) -> list[FrozenTrial]:
        """The tried candidates, by their place."""
        complete = {}
        for trial in self._read(TrialState.COMPLETE):
            complete.setdefault(trial.user_attrs[PLACE], trial)  # two jobs may have tried the same one
        return [complete[place] for place in sorted(complete)]

    def _read(self, *states: TrialState) -> list[FrozenTrial]:
        return read_trials(self.storage, self.study, self.names, states)

    def coefficients(self, trial: FrozenTrial) -> np.ndarray:
        """Of a trial: shape (groups, ranges)."""
        return np.array([trial.params[name] for name in self.names]).reshape(self.shape)

    def table(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The coefficients' names, the tried candidates (n, P) and their values (n,)."""
        trials = self.trials()
        rows = [self.coefficients(trial).ravel() for trial in trials]
        return self.names, np.array(rows), np.array([trial.value for trial in trials])

    def importance(self) -> dict[str, float]:
        """Each coefficient's share of the values' variance, the most important first; none where all are alike."""
        tried = [trial for trial in self.trials() if math.isfinite(trial.value)]
        if len({trial.value for trial in tried}) < 2:
            return {}
        finite = optuna.create_study()
        finite.add_trials(tried)
        return optuna.importance.get_param_importances(
            finite, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )

    def evaluated(self, way: str, objective: str, before: int) -> list[Evaluated]:
        """The tried candidates under the name of a way.

        Args:
            before: passes spent before the first of them.
        """
        found = []
        for trial in self.trials():
            before += trial.user_attrs[PASSES]
            found.append(Evaluated(way, objective, before, trial.value, self.coefficients(trial)))
        return found

    def best(self, count: int) -> list[np.ndarray]:
        """The candidates of the least values, the best first, no two the same."""
        ranked = sorted(self.trials(), key=lambda trial: trial.value)
        unique = {tuple(trial.params[name] for name in self.names): self.coefficients(trial) for trial in ranked}
        return list(unique.values())[:count]

    # --- trying

    def extend(self, candidates: Sequence[np.ndarray]) -> None:
        """Try these too, without the sampler; those that were tried before keep their places."""
        tried = {trial.user_attrs[PLACE]: self.coefficients(trial) for trial in self.trials()}
        rest = [row for row in candidates if not any(np.array_equal(row, other) for other in tried.values())]
        self.first = []
        while rest or len(self.first) <= max(tried, default=-1):
            place = len(self.first)
            # a place that another job left when it was killed is filled with one of the rest, or with what is known
            self.first.append(tried[place] if place in tried else rest.pop(0) if rest else np.zeros(self.shape))
        self.count = len(self.first)

    def run(
        self,
        accelerator: Accelerator,
        value: Callable[[np.ndarray], float],
        passes: Callable[[np.ndarray], int],
        said: str,
    ) -> None:
        """Try candidates until all are tried, together with the other jobs that share the storage.

        Args:
            value: of a candidate; called in every process.
            passes: of a candidate: UNet passes that its value takes.
            said: what the lines that are printed begin with.
        """
        while True:
            found = in_main_process(accelerator, self._next)
            if found is None:
                break
            place, coefficients = found
            if place is None:  # only other jobs have some to try
                time.sleep(POLLED_EVERY)
                continue
            scored = value(coefficients)
            in_main_process(accelerator, partial(self._tell, place, coefficients, scored, passes(coefficients), said))

    def _next(self) -> tuple[int | None, np.ndarray | None] | None:
        """The next candidate's place and coefficients; no place while others try the last, None when all are tried."""
        return self._start()

    def _start(self) -> tuple[int | None, np.ndarray | None] | None:
        self._fail_the_dead()
        trials = self._read(TrialState.COMPLETE, TrialState.RUNNING)
        taken = {trial.user_attrs.get(PLACE) for trial in trials}
        free = [place for place in range(self.count) if place not in taken]
        if not free:
            mine = [trial for trial in trials if trial.user_attrs.get(PLACE, 0) < self.count]
            return None if all(trial.state is TrialState.COMPLETE for trial in mine) else (None, None)
        place = free[0]
        self.study.sampler = self._sampler(place)
        with reading(self.storage):
            trial = self._begin({OWNER: _owner(), PLACE: place})
        if trial is None:
            return self._start()
        self.trial = trial
        self._alive.enter_context(signs_of_life(self._renew, HEARTBEAT))
        return place, np.array([self.trial.params[name] for name in self.names]).reshape(self.shape)

    def _begin(self, notes: dict[str, Any]) -> Trial | None:
        """A running trial, or None where another job was faster to take its place.

        It has its notes from the first moment on: without an owner it would be nobody's for ever if it were killed now,
        and of two trials of a place each job sees which one came first.
        """
        storage = self.study._storage  # with a cache, which has to know the trial
        running = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=notes)
        number = storage.create_new_trial(self.study._study_id, running)
        self.storage.record_heartbeat(number)
        for other in self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.RUNNING]):
            if other.user_attrs.get(PLACE) == notes[PLACE] and other._trial_id < number:
                storage.set_trial_state_values(number, TrialState.FAIL)
                return None
        trial = Trial(self.study, number)  # as `Study.ask`, which takes no notes
        for name, distribution in self.space.items():
            trial._suggest(name, distribution)
        return trial

    def _tell(self, place: int, coefficients: np.ndarray, value: float, passes: int, said: str) -> None:
        self._alive.close()
        value = math.inf if math.isnan(value) else value  # of a NaN Optuna would have the place tried for ever
        with (
            reading(self.storage),
            suppress(optuna.exceptions.UpdateFinishedTrialError),
        ):  # taken for dead: another job's now
            self.trial.set_user_attr(PASSES, passes)
            self.study.tell(self.trial, value)
        best = min(trial.value for trial in self.trials())
        shown = np.round(coefficients, 3).tolist()[0] if len(coefficients) == 1 else f"{coefficients.size} coefficients"
        print(f"{said} {place + 1} of {self.count}: {value:.4f} at {shown}; the best: {best:.4f}", flush=True)

    def _renew(self) -> None:
        with suppress(Exception):  # a storage that is not there for a while
            self.storage.record_heartbeat(self.trial._trial_id)

    def _fail_the_dead(self) -> None:
        """Give up the trials of jobs that were killed: at once where they were on this machine."""
        with reading(self.storage):
            optuna.storages.fail_stale_trials(self.study)
        for trial in self._read(TrialState.RUNNING):
            if _has_ended(str(trial.user_attrs.get(OWNER, ""))):
                with suppress(Exception):  # another job did it
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    # --- which candidate is the n-th

    def _sampler(self, place: int) -> optuna.samplers.BaseSampler:
        """What draws the candidate of this place."""
        seed = int(np.random.default_rng((*self.stream, place)).integers(2**31))
        if place < len(self.first):
            return self._fixed(self.first[place].ravel())
        match self.sampler:
            case "tpe":
                return optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=len(self.first), multivariate=True, constant_liar=True
                )
            case "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=len(self.first))
            case "cmaes":
                return self._fixed(self._cmaes(place - len(self.first)))
            case "grid":
                values = grid_values(self.count, len(self.names))
                if place < values ** len(self.names):
                    return self._fixed(grid_point(place, values, len(self.names), self.interval))
        return optuna.samplers.RandomSampler(seed)

    def _fixed(self, coefficients: np.ndarray) -> optuna.samplers.BaseSampler:
        """A sampler of one candidate."""
        low, high = self.interval
        fixed = {name: float(np.clip(w, low, high)) for name, w in zip(self.names, coefficients, strict=True)}
        return optuna.samplers.PartialFixedSampler(fixed, optuna.samplers.RandomSampler(0))

    def _cmaes(self, number: int) -> np.ndarray:
        """The candidate of this number by CMA-ES (Hansen 2016), about the best of the first ones: shape (P,).

        Its state follows from the stream and the values so far; Optuna's own sampler would pickle it into the storage.
        """
        tried = {trial.user_attrs[PLACE] - len(self.first): trial for trial in self.trials()}
        started = [trial for place, trial in tried.items() if place < 0]
        low, high = self.interval
        mean = np.full(len(self.names), (low + high) / 2)
        if started:
            mean = self.coefficients(min(started, key=lambda trial: trial.value)).ravel()
        bounds = np.tile([low, high], (len(self.names), 1))
        seed = int(np.random.default_rng(self.stream).integers(2**31))
        optimizer = cmaes.CMA(np.clip(mean, low, high), SIGMA * (high - low), bounds, seed=seed)
        size = optimizer.population_size
        generation = 0
        while True:
            numbers = range(generation * size, (generation + 1) * size)
            asked = [optimizer.ask() for _ in numbers]
            if number in numbers or not all(n in tried for n in numbers):
                return asked[number % size]  # of a generation that other jobs have not finished: what is known so far
            optimizer.tell([(self.coefficients(tried[n]).ravel(), min(tried[n].value, 1e30)) for n in numbers])
            generation += 1


def grid_point(number: int, values: int, dimensions: int, interval: tuple[float, float]) -> np.ndarray:
    """The n-th of the values ** dimensions points of a grid over the bounds, their ends included: (dimensions,)."""
    digits = [number // values**place % values for place in reversed(range(dimensions))]
    return np.linspace(*interval, values)[digits]


def grid_values(count: int, dimensions: int) -> int:
    """How many values per coefficient a grid of at most `count` points has."""
    values = int(count ** (1 / dimensions) + 1e-9)
    if values < 2:
        raise UserError(f"a grid of {dimensions} coefficients has at least 2 ** {dimensions} candidates")
    return values


def _owner() -> str:
    return f"process {os.getpid()} on {_place()}"


def _place() -> str:
    """Where a process number means something: this host, and on Linux this container."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _has_ended(owner: str) -> bool:
    """Whether the process that tried a candidate is gone, as far as can be seen from this machine."""
    number, _, host = owner.removeprefix("process ").partition(" on ")
    if host != _place() or not number.isdigit():
        return False
    if int(number) == os.getpid():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
