"""Candidates one after another: an Optuna study, in a storage that outlives the process and that jobs share."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import optuna
from optuna.samplers import GPSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from deme.data.images import Stream
from deme.errors import UserError
from deme.job.locks import POLLED_EVERY
from deme.job.processes import Processes, in_main_process
from deme.search.progress import Evaluated
from deme.search.storage import GRACE, joined, reading

PASSES = "passes"  # attribute of a trial: UNet passes that its value took


class Surplus(Exception):
    """Another job took the last candidate at the same time."""


@dataclass(frozen=True)
class Space:
    """The coefficients that are searched."""

    names: Sequence[str]  # in row-major order
    shape: tuple[int, int]  # (groups, ranges)
    interval: tuple[float, float]  # bounds of each coefficient


@dataclass(eq=False)
class Study:
    """Candidates that were tried with one objective, and those still to be tried.

    With one job, candidate n is a function of the stream, n and the earlier values: an interrupted search goes on as
    if nothing had happened. Several jobs share the candidates; which they are then depends on the jobs' timing, too.
    Of `count` candidates the `first` ones are given, and the sampler draws the others.
    """

    storage: RDBStorage
    name: str
    space: Space
    first: Sequence[np.ndarray] = ()
    sampler: str = "random"
    stream: Stream = (0,)
    count: int = 0

    def __post_init__(self):
        with reading(self.storage):
            self.study = optuna.create_study(storage=self.storage, study_name=self.name, load_if_exists=True)
            if self.study.directions != [StudyDirection.MINIMIZE]:
                raise ValueError(f"study {self.name} does not minimize one value")

    # --- what was tried

    def trials(self) -> list[FrozenTrial]:
        """The complete trials, in order."""
        with reading(self.storage):
            trials = self._read(TrialState.COMPLETE)
            for trial in trials:
                read = [trial.user_attrs[PASSES], *(trial.params[name] for name in self.space.names)]
                if not (np.isfinite(read).all() and read[0] >= 0 and isinstance(trial.value, float)):
                    raise ValueError(f"trial {trial.number} is not a candidate")
        return trials

    def _read(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def coefficients(self, trial: FrozenTrial) -> np.ndarray:
        """The coefficients of a trial: shape (groups, ranges)."""
        return np.array([trial.params[name] for name in self.space.names]).reshape(self.space.shape)

    def table(self) -> tuple[Sequence[str], np.ndarray, np.ndarray]:
        """The coefficients' names, the candidates (n, P) and their values (n,)."""
        trials = self.trials()
        rows = np.array([self.coefficients(trial).ravel() for trial in trials])
        return self.space.names, rows, np.array([trial.value for trial in trials])

    def importance(self) -> dict[str, float]:
        """Each coefficient's share of the values' variance, the largest first; empty if the values do not differ."""
        if len({trial.value for trial in self.trials() if math.isfinite(trial.value)}) < 2:
            return {}
        fanova = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(self.study, evaluator=fanova)

    def evaluated(self, way: str, objective: str, spent: int) -> list[Evaluated]:
        """The candidates as rows of a search that had spent so many UNet passes before."""
        rows = []
        for trial in self.trials():
            spent += trial.user_attrs[PASSES]
            rows.append(Evaluated(way, objective, spent, trial.value, self.coefficients(trial)))
        return rows

    def best(self, count: int) -> list[np.ndarray]:
        """The different candidates with the lowest values, the best first."""
        ranked = sorted(self.trials(), key=lambda trial: trial.value)
        return distinct(map(self.coefficients, ranked))[:count]

    # --- trying

    def extend(self, candidates: Sequence[np.ndarray]) -> None:
        """Try these candidates, without the sampler, after those that were tried before."""
        tried = [self.coefficients(trial) for trial in self.trials()]
        self.first = tried + [row for row in candidates if not any(np.array_equal(row, other) for other in tried)]
        self.count = len(self.first)

    def run(
        self,
        processes: Processes,
        value: Callable[[np.ndarray], float],
        passes: Callable[[np.ndarray], int],
        label: str,
    ) -> None:
        """Try candidates until all are tried, together with the other jobs that share the storage.

        `value` is called in every process; `passes` gives the UNet passes that it takes.
        """

        def score(coefficients: np.ndarray) -> tuple[float, int]:
            in_main_process(processes, lambda: coefficients)  # `told` in the other processes
            return value(coefficients), passes(coefficients)

        with joined(self.storage, self._fail_running) if processes.is_main_process else nullcontext():
            while True:
                told = in_main_process(processes, lambda: self._try_all(score, label))
                if isinstance(told, np.ndarray):
                    value(told)
                elif told:
                    break
                else:  # other jobs still try the last candidates
                    time.sleep(POLLED_EVERY)

    def _try_all(self, score: Callable[[np.ndarray], tuple[float, int]], label: str) -> bool:
        """Try candidates while there are free ones. Returns whether all are complete."""
        while True:
            with reading(self.storage):
                self._retry_stale()
                trials = self._read(TrialState.COMPLETE, TrialState.RUNNING)
            if len(trials) >= self.count:
                return sum(trial.state is TrialState.COMPLETE for trial in trials) >= self.count
            self._try_one(score, label)

    def _try_one(self, score: Callable[[np.ndarray], tuple[float, int]], label: str) -> None:
        raised: list[Exception] = []

        def objective(trial: Trial) -> float:
            place = self._place(trial)
            if place >= self.count:
                raise Surplus
            self.study.sampler = self._sampler(place)  # Optuna samples at the first suggestion
            values = [trial.suggest_float(name, *self.space.interval) for name in self.space.names]
            coefficients = np.array(values).reshape(self.space.shape)
            try:
                value, passes = score(coefficients)
                value = math.inf if math.isnan(value) else value  # Optuna would take NaN for a failure
                with reading(self.storage):
                    trial.set_user_attr(PASSES, passes)
            except Exception as error:  # not the storage's
                raised.append(error)
                raise
            best = min([value, *(trial.value for trial in self.trials())])
            few = len(coefficients) == 1
            at = np.round(coefficients, 3).tolist()[0] if few else f"{coefficients.size} coefficients"
            print(f"{label} {place + 1} of {self.count}: {value:.4f} at {at}; the best: {best:.4f}", flush=True)
            return value

        try:
            with reading(self.storage):
                self.study.optimize(objective, n_trials=1, catch=Surplus)
        except Exception:
            if raised:
                raise raised[0] from None
            raise

    def _fail_running(self) -> None:
        """Give up what killed jobs left running; it is tried again as the same candidate."""
        with reading(self.storage):
            for trial in self._read(TrialState.RUNNING):
                self.study.tell(trial.number, state=TrialState.FAIL)

    def _retry_stale(self) -> None:
        """Have the candidates of killed jobs tried again."""
        optuna.storages.fail_stale_trials(self.study)
        oldest = datetime.now() - timedelta(seconds=GRACE)
        for trial in self._read(TrialState.RUNNING):
            if not trial.params and trial.datetime_start < oldest:  # killed before its first heartbeat
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    # --- which candidate is the n-th

    def _place(self, trial: Trial) -> int:
        """Which candidate a trial is, counted from 0; failed trials don't count."""
        others = self.study.get_trials(deepcopy=False)
        return sum(other.number < trial.number and other.state is not TrialState.FAIL for other in others)

    def _sampler(self, place: int) -> optuna.samplers.BaseSampler:
        """What draws the candidate of this place."""
        seed = int(np.random.default_rng((*self.stream, place)).integers(2**31))
        startup = len(self.first)
        size = len(self.space.names)
        if place < startup:
            return self._fixed(self.first[place].ravel())
        if self.sampler == "tpe":
            return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
        if self.sampler == "gp":
            return GPSampler(seed=seed, n_startup_trials=startup)
        if self.sampler == "grid" and place < grid_values(self.count, size) ** size:
            return self._fixed(grid_point(place, grid_values(self.count, size), size, self.space.interval))
        return RandomSampler(seed)

    def _fixed(self, coefficients: np.ndarray) -> optuna.samplers.BaseSampler:
        """A sampler of one candidate."""
        clipped = np.clip(coefficients, *self.space.interval).tolist()
        return PartialFixedSampler(dict(zip(self.space.names, clipped, strict=True)), RandomSampler(0))


def distinct(rows: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The coefficients without repetitions, in order."""
    return list({tuple(row.ravel()): row for row in rows}.values())


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
