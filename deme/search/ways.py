"""The ways to search, from the cheap answers to the best few candidates on many images."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from deme.config.experiment import Config
from deme.errors import UserError, naming
from deme.job.processes import in_main_process, locked_by_all
from deme.method.task_vectors import PUBLISHED
from deme.models.variants import OF_PRETRAINED
from deme.search.problem import Problem
from deme.search.solvers import Evaluated, closed_form, gradient_descent
from deme.search.study import Study, distinct, open_by_all

UNIFORM = (0.5, 1.0)  # beside 1 / the number of ranges
LONGER = 2.0  # the closed form, times this: it matches the experts, whose directions may be worth more
LINE = 8  # candidates along the line of self-trained networks
VALUE = attrgetter("value")
MOST_COLUMNS = 64  # coefficients up to which their closed form is cheap; with more the gradient is


@dataclass(frozen=True)
class Result:
    """The best candidate of a search, and the others."""

    coefficients: np.ndarray  # shape (groups, ranges)
    objective: str  # match, loss or fd
    value: float  # of the objective
    pretrained: float  # the pretrained network's value on the same images
    evaluated: list[Evaluated]  # the candidates, in order
    study: Study | None = None  # the one with the most candidates

    def as_yaml(self, patterns: Sequence[str]) -> dict[str, Any]:
        """The content of best.yaml, without the networks' hashes; `patterns` name the groups of tensors."""
        return {
            "coefficients": dict(zip(patterns, self.coefficients.tolist(), strict=True)),
            "objective": self.objective,
            "value": self.value,
            OF_PRETRAINED: self.pretrained,
            "passes": self.evaluated[-1].passes,
        }


def find(problem: Problem, folder: Path, digest: str) -> Result:
    """Search as `search.method` says, in a folder that keeps how far it has come; studies are named by the digest."""
    settings, shape = problem.settings, problem.shape
    if settings.method in ("closed_form", "gradient"):
        return _cheap_answer(problem, folder, settings.method == "gradient")
    objective = "fd" if settings.method == "multi_fidelity" else settings.objective
    storage = open_by_all(problem.processes, settings.storage, folder)
    evaluated, first = [], []
    if settings.sampler == "grid":
        with naming("search.trials", settings.trials):
            first = grid(settings.trials, problem.bounds, shape)
    elif settings.sampler != "random" and problem.config.merge.experts != ["ranges"]:
        first = line(problem.config, shape)
    elif settings.sampler != "random":
        answer = _cheap_answer(problem, folder, by_gradient=np.prod(shape) > MOST_COLUMNS)
        evaluated = answer.evaluated
        first = first_candidates(answer.coefficients, settings.interval)
    spent = evaluated[-1].passes if evaluated else 0
    if objective == "fd":
        spent += settings.control_images * problem.distance.drawing.passes
    else:
        problem.squares(objective)  # loaded before there is a trial that errors would fail
    name = f"{digest}-{objective}-{settings.num_images}"
    study = Study(
        problem, storage, name, objective, settings.num_images, spent, settings.sampler, first, settings.trials
    )
    tried = study.run()
    evaluated += tried
    if settings.method == "multi_fidelity":  # the best few on many images
        images, spent = settings.finalist_images, evaluated[-1].passes
        finals = Study(problem, storage, f"{digest}-finalists-{images}", "fd", images, spent, "finalists")
        best = distinct(row.coefficients for row in sorted(tried, key=VALUE))[: settings.finalists]
        in_main_process(problem.processes, lambda: finals.extend([np.zeros(shape), *best]))
        tried = finals.run()
        evaluated += tried
    best = min(tried, key=VALUE)
    pretrained = next((row.value for row in tried if not row.coefficients.any()), None)
    if pretrained is None:
        pretrained, _ = problem.value(objective, np.zeros(shape))
    return Result(best.coefficients, objective, best.value, pretrained, evaluated, study)


def _cheap_answer(problem: Problem, folder: Path, by_gradient: bool) -> Result:
    """The least of match or loss, in closed form or by gradient descent from the closed form of the ranges alone."""
    settings = problem.settings
    objective = settings.objective if settings.objective != "fd" else "match"
    squares = problem.squares(objective)
    # a job at a time: another one, on another machine, waits and reads what was found
    with locked_by_all(problem.processes, folder / "cheap", "search.output", wait=True):
        if not by_gradient:
            rows = closed_form(squares, settings, folder / f"closed-form-{objective}.npz")
        else:
            whole = copy(squares)
            whole.candidates = problem.candidates.ungrouped()
            file = folder / f"closed-form-of-the-ranges-{objective}.npz"
            rows = closed_form(whole, settings, file, "closed form of the ranges")
            start = np.broadcast_to(min(rows, key=VALUE).coefficients, problem.shape)
            held_out = problem.squares(objective, "held-out")
            file = folder / f"gradient-{objective}.npz"
            rows = gradient_descent(squares, held_out, settings, start, file, rows[-1].passes)
    best = min(rows, key=VALUE)
    return Result(best.coefficients, objective, best.value, 1.0, rows)


# --- where a study starts


def line(config: Config, shape: tuple[int, int]) -> list[np.ndarray]:
    """The pretrained network, and LINE equal coefficients of all self-trained networks down to their lower bound.

    The distance falls smoothly along this line and rises again. If the ranges' experts are merged, too, half of the
    candidates add them uniformly.
    """
    is_self = np.isin(config.merged_names, config.self_trained_names)
    rows = []
    for number, value in enumerate(np.linspace(0, config.search.self_interval[0], LINE + 1)):
        others = 0 if number % 2 == 0 else 1 / len(config.timesteps.ranges)
        rows.append(np.broadcast_to(np.where(is_self, value, others), shape))
    return rows


def grid(count: int, bounds: Sequence[tuple[float, float]], shape: tuple[int, int]) -> list[np.ndarray]:
    """A grid of at most `count` points over the bounds, their ends included."""
    dimensions = len(bounds)
    values = int(count ** (1 / dimensions) + 1e-9)  # per coefficient
    if values < 2:
        raise UserError(f"a grid of {dimensions} coefficients has at least 2 ** {dimensions} candidates")
    return [np.reshape(point, shape) for point in product(*(np.linspace(*pair, values) for pair in bounds))]


def first_candidates(cheap: np.ndarray, interval: tuple[float, float]) -> list[np.ndarray]:
    """The pretrained network, the cheap answer, uniform and published coefficients, if they are within the bounds."""
    ranges = cheap.shape[1]
    rows = [np.zeros_like(cheap), cheap, np.clip(LONGER * cheap, *interval)]
    rows += [np.full(cheap.shape, value) for value in dict.fromkeys((1 / ranges, *UNIFORM))]
    if len(PUBLISHED) == ranges:
        rows.append(np.broadcast_to(PUBLISHED, cheap.shape))
    low, high = interval
    return distinct(row for row in rows if low <= row.min() and row.max() <= high)
