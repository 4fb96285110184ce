"""The ways to search, from the cheapest answer to the best few on many images, behind one interface."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from optuna.storages import RDBStorage

from deme.errors import naming
from deme.job.processes import in_main_process, locked_by_all
from deme.method.candidates import Candidates
from deme.method.coefficients import PUBLISHED
from deme.search.closed_form import closed_form
from deme.search.gradient import gradient_descent
from deme.search.problem import Coefficients, Problem
from deme.search.state import Evaluated
from deme.search.study import Study, grid_values

UNIFORM = (0.5, 1.0)  # beside 1 / the number of ranges
LONGER = 2.0  # the closed form, times this: it matches the experts, whose directions may be worth more
MOST_COLUMNS = 64  # coefficients up to which their closed form is cheap; with more the gradient is
CONTROLS = ("grid", "random")  # samplers that start from nothing


@dataclass(frozen=True)
class Found:
    """What a search found."""

    coefficients: Coefficients
    objective: str  # match, loss or fd
    value: float  # of the objective
    pretrained: float  # the pretrained network's, on the same images
    evaluated: list[Evaluated]  # the candidates, in order
    study: Study | None = None  # the one with the most candidates

    def curves(self) -> list[tuple[str, str, list[int], list[float]]]:
        """Way, objective, passes and values of the candidates of each way, in order."""
        found = []
        for way in dict.fromkeys(row.way for row in self.evaluated):
            rows = [row for row in self.evaluated if row.way == way]
            found.append((way, rows[0].objective, [row.passes for row in rows], [row.value for row in rows]))
        return found


def find(problem: Problem, folder: Path, storage: Callable[[], RDBStorage], digest: str) -> Found:
    """Search as `search.method` says, in a folder that keeps how far it has come.

    Args:
        storage: opens it.
        digest: of what is searched; studies are called by it.
    """
    match problem.settings.method:
        case "closed_form":
            return cheap_answer(problem, folder, by_gradient=False)
        case "gradient":
            return cheap_answer(problem, folder, by_gradient=True)
        case "optuna":
            return one_after_another(problem, folder, storage(), digest, problem.settings.objective)
    return multi_fidelity(problem, folder, storage(), digest)


def cheap_answer(problem: Problem, folder: Path, by_gradient: bool) -> Found:
    """The least of match or loss, in closed form or by gradient descent from the closed form of the ranges alone."""
    settings = problem.settings
    objective = settings.objective if settings.objective != "fd" else "match"

    def in_closed_form(candidates: Candidates, way: str) -> list[Evaluated]:
        file = folder / f"{way.replace(' ', '-')}-{objective}.safetensors"
        solving = (settings.ridge, settings.gauss_newton, settings.interval, file)
        rows = closed_form(problem.squares(objective), candidates, problem.network, *solving).evaluated(way, objective)
        return [replace(row, coefficients=np.broadcast_to(row.coefficients, problem.shape)) for row in rows]

    # a job at a time: another one, on another machine, waits and reads what was found
    with locked_by_all(problem.accelerator, folder / "cheap", "search.output", wait=True):
        if not by_gradient:
            rows = in_closed_form(problem.candidates, "closed form")
        else:
            before = in_closed_form(problem.candidates.ungrouped(), "closed form of the ranges")
            start = min(before, key=lambda row: row.value).coefficients
            squares = (problem.squares(objective), problem.squares(objective, "held-out"))
            file = folder / f"gradient-{objective}.safetensors"
            descent = gradient_descent(*squares, problem.candidates, problem.network, settings, start, file)
            spent = before[-1].passes
            rows = [
                replace(row, passes=row.passes + spent)
                for row in descent.evaluated("gradient", f"{objective}, held-out images")
            ]
    best = min(rows, key=lambda row: row.value)
    return Found(best.coefficients, objective, best.value, 1.0, rows)


def one_after_another(problem: Problem, folder: Path, storage: RDBStorage, digest: str, objective: str) -> Found:
    """Candidates that a sampler proposes, from the values of those before."""
    settings = problem.settings
    evaluated: list[Evaluated] = []
    first: list[Coefficients] = []
    if settings.sampler not in CONTROLS:
        answer = cheap_answer(problem, folder, by_gradient=np.prod(problem.shape) > MOST_COLUMNS)
        evaluated = answer.evaluated
        first = first_candidates(answer.coefficients, settings.interval)
    if settings.sampler == "grid":
        with naming("search.trials", settings.trials):
            grid_values(settings.trials, len(problem.names))
    seeds = problem.seeds(settings.num_images)
    name = f"{digest}-{objective}-{len(seeds)}"
    study = Study(storage, name, problem.space, first, settings.sampler, problem.stream, settings.trials)
    spent = evaluated[-1].passes if evaluated else 0
    if objective == "fd":
        spent += problem.distance.passes(settings.control_images)

    def passes(coefficients: Coefficients) -> int:
        return problem.passes(objective, coefficients, len(seeds))

    study.run(problem.accelerator, lambda w: problem.value(objective, w, seeds), passes, f"{objective}, candidate")
    named = f"fd of {len(seeds):,} images" if objective == "fd" else objective
    tried = in_main_process(problem.accelerator, lambda: study.evaluated(settings.sampler, named, spent))
    best = min(tried, key=lambda row: row.value)
    zeros = np.zeros(problem.shape)
    known = [row.value for row in tried if not row.coefficients.any()]
    pretrained = known[0] if known else problem.value(objective, zeros, seeds)
    return Found(best.coefficients, objective, best.value, pretrained, evaluated + tried, study)


def multi_fidelity(problem: Problem, folder: Path, storage: RDBStorage, digest: str) -> Found:
    """The cheap answers, then candidates by their distance on few images, then the best few of them on many."""
    settings = problem.settings
    few = one_after_another(problem, folder, storage, digest, "fd")
    seeds = problem.seeds(settings.finalist_images)
    finals = Study(storage, f"{digest}-finalists-{len(seeds)}", problem.space)
    zeros = np.zeros(problem.shape)
    in_main_process(problem.accelerator, lambda: finals.extend([zeros, *few.study.best(settings.finalists)]))

    def passes(coefficients: Coefficients) -> int:
        return problem.passes("fd", coefficients, len(seeds))

    finals.run(problem.accelerator, lambda w: problem.value("fd", w, seeds), passes, "fd, finalist")
    named = f"fd of {len(seeds):,} images"
    tried = in_main_process(problem.accelerator, lambda: finals.evaluated("finalists", named, few.evaluated[-1].passes))
    best = min(tried, key=lambda row: row.value)
    pretrained = next(row.value for row in tried if not row.coefficients.any())
    return Found(best.coefficients, "fd", best.value, pretrained, few.evaluated + tried, few.study)


def first_candidates(cheap: Coefficients, interval: tuple[float, float]) -> list[Coefficients]:
    """Where a study starts: the pretrained network, the cheap answer, uniform and published coefficients.

    Those that lie outside of the bounds are left out.
    """
    ranges = cheap.shape[1]
    rows = [np.zeros_like(cheap), cheap, np.clip(LONGER * cheap, *interval)]
    rows += [np.full(cheap.shape, value) for value in dict.fromkeys((1 / ranges, *UNIFORM))]
    if len(PUBLISHED) == ranges:
        rows.append(np.broadcast_to(PUBLISHED, cheap.shape))
    low, high = interval
    inside = [row for row in rows if low <= row.min() and row.max() <= high]
    return list({tuple(row.ravel()): row for row in inside}.values())
