"""The ways to search, from the cheap answers to the best few candidates on many images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deme.errors import naming
from deme.job.processes import in_main_process, locked_by_all
from deme.method.coefficients import PUBLISHED
from deme.models.searched import OF_PRETRAINED
from deme.search.problem import Problem
from deme.search.progress import Evaluated
from deme.search.solvers import closed_form, gradient_descent
from deme.search.storage import open_by_all
from deme.search.study import Study, distinct, grid_values

UNIFORM = (0.5, 1.0)  # beside 1 / the number of ranges
LONGER = 2.0  # the closed form, times this: it matches the experts, whose directions may be worth more
MOST_COLUMNS = 64  # coefficients up to which their closed form is cheap; with more the gradient is
CONTROLS = ("grid", "random")  # samplers that start from nothing


@dataclass(frozen=True)
class Result:
    """The best candidate of a search, and the others."""

    coefficients: np.ndarray  # shape (groups, ranges)
    objective: str  # match, loss or fd
    value: float  # of the objective
    pretrained: float  # the pretrained network's value on the same images
    evaluated: list[Evaluated]  # the candidates, in order
    study: Study | None = None  # the one with the most candidates

    @property
    def passes(self) -> int:
        """UNet passes that the search took."""
        return self.evaluated[-1].passes

    def as_yaml(self, patterns: Sequence[str]) -> dict[str, Any]:
        """The content of best.yaml, without the networks' hashes; `patterns` name the groups of tensors."""
        return {
            "coefficients": dict(zip(patterns, self.coefficients.tolist(), strict=True)),
            "objective": self.objective,
            "value": self.value,
            OF_PRETRAINED: self.pretrained,
            "passes": self.passes,
        }


def find(problem: Problem, folder: Path, digest: str) -> Result:
    """Search as `search.method` says, in a folder that keeps how far it has come; studies are named by the digest."""
    method = problem.settings.method
    if method in ("closed_form", "gradient"):
        return _cheap_answer(problem, folder, method == "gradient")
    if method == "optuna":
        return _one_after_another(problem, folder, digest, problem.settings.objective)
    return _multi_fidelity(problem, folder, digest)


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
            whole = replace(squares, candidates=problem.candidates.ungrouped())
            file = folder / f"closed-form-of-the-ranges-{objective}.npz"
            rows = closed_form(whole, settings, file, "closed form of the ranges")
            start = np.broadcast_to(_best(rows).coefficients, problem.shape)
            held_out = problem.squares(objective, "held-out")
            file = folder / f"gradient-{objective}.npz"
            rows = gradient_descent(squares, held_out, settings, start, file, rows[-1].passes)
    best = _best(rows)
    return Result(best.coefficients, objective, best.value, 1.0, rows)


def _one_after_another(problem: Problem, folder: Path, digest: str, objective: str) -> Result:
    """Candidates that a sampler proposes, given the values of those before."""
    settings = problem.settings
    storage = open_by_all(problem.processes, settings.storage, folder)
    evaluated, first = [], []
    if settings.sampler == "grid":
        with naming("search.trials", settings.trials):
            grid_values(settings.trials, int(np.prod(problem.shape)))
    if settings.sampler not in CONTROLS:
        answer = _cheap_answer(problem, folder, by_gradient=np.prod(problem.shape) > MOST_COLUMNS)
        evaluated = answer.evaluated
        first = first_candidates(answer.coefficients, settings.interval)
    name = f"{digest}-{objective}-{settings.num_images}"
    study = Study(storage, name, problem.space, first, settings.sampler, problem.stream, settings.trials)
    spent = evaluated[-1].passes if evaluated else 0
    spent += problem.prepare(objective)
    tried = _tried(problem, study, objective, settings.num_images, settings.sampler, spent)
    best, pretrained = _best(tried), _value_of_pretrained(tried)
    if pretrained is None:
        pretrained = problem.value(objective, np.zeros(problem.shape))
    return Result(best.coefficients, objective, best.value, pretrained, evaluated + tried, study)


def _multi_fidelity(problem: Problem, folder: Path, digest: str) -> Result:
    """The cheap answers, then candidates by their distance on few images, then the best few of them on many."""
    settings = problem.settings
    few = _one_after_another(problem, folder, digest, "fd")
    finals = Study(few.study.storage, f"{digest}-finalists-{settings.finalist_images}", problem.space)
    zeros = np.zeros(problem.shape)
    in_main_process(problem.processes, lambda: finals.extend([zeros, *few.study.best(settings.finalists)]))
    tried = _tried(problem, finals, "fd", settings.finalist_images, "finalists", few.passes)
    best = _best(tried)
    return Result(best.coefficients, "fd", best.value, _value_of_pretrained(tried), few.evaluated + tried, few.study)


def _tried(problem: Problem, study: Study, objective: str, images: int, way: str, spent: int) -> list[Evaluated]:
    """The candidates of a study after all were tried; fd draws so many images of each."""
    study.run(
        problem.processes,
        lambda coefficients: problem.value(objective, coefficients, images),
        lambda coefficients: problem.passes(objective, coefficients, images),
        f"{objective}, {'finalist' if way == 'finalists' else 'candidate'}",
    )
    label = f"fd of {images:,} images" if objective == "fd" else objective
    return in_main_process(problem.processes, lambda: study.evaluated(way, label, spent))


def _best(rows: list[Evaluated]) -> Evaluated:
    return min(rows, key=lambda row: row.value)


def _value_of_pretrained(rows: list[Evaluated]) -> float | None:
    return next((row.value for row in rows if not row.coefficients.any()), None)


def first_candidates(cheap: np.ndarray, interval: tuple[float, float]) -> list[np.ndarray]:
    """Where a study starts: the pretrained network, the cheap answer, uniform and published coefficients.

    Those outside of the bounds are left out.
    """
    ranges = cheap.shape[1]
    rows = [np.zeros_like(cheap), cheap, np.clip(LONGER * cheap, *interval)]
    rows += [np.full(cheap.shape, value) for value in dict.fromkeys((1 / ranges, *UNIFORM))]
    if len(PUBLISHED) == ranges:
        rows.append(np.broadcast_to(PUBLISHED, cheap.shape))
    low, high = interval
    return distinct(row for row in rows if low <= row.min() and row.max() <= high)
