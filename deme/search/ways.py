"""The ways to search, from cheap answers to a few candidates on many images, and what the result is worth."""

from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from deme.config.experiment import Config
from deme.config.paths import with_schedule, without_schedule
from deme.config.trainings import CONTINUED, DISTILLED, EMA_WIDTH
from deme.errors import UserError, naming
from deme.job.files import read_json
from deme.job.processes import in_main_process, locked_by_all
from deme.measure.scores import Difference, Score, compared, load_scores, save_scores, score
from deme.method.sampling import NetworkAt
from deme.method.task_vectors import PUBLISHED
from deme.models.weights import weights_hash
from deme.search.least_squares import Evaluated, closed_form, gradient_descent
from deme.search.problem import Problem
from deme.search.starts import LINE, first_candidates, grid, line, spread, starts
from deme.search.study import Study, distinct, is_at, open_by_all

VALUE = attrgetter("value")
PAIR = ("pretrained", "best")  # that are scored with every schedule
TRAINED = (CONTINUED, DISTILLED)  # networks that a result has to beat, too
MOST_NAMED = 8  # coefficients
MOST_COLUMNS = 64  # coefficients up to which their closed form is cheap; with more the gradient is


@dataclass(frozen=True)
class Result:
    """The best candidate of a search, and the others."""

    coefficients: np.ndarray  # shape (groups, ranges)
    objective: str  # match, loss or fd
    value: float  # of the objective
    pretrained: float  # the pretrained network's value on the same images
    evaluated: list[Evaluated]  # the candidates, in order
    bounds: dict[str, tuple[float, float]]  # within which the last candidate was looked for
    study: Study | None = None  # the one with the most candidates

    @property
    def at_bounds(self) -> list[str]:
        """The best coefficients that lie at a bound, as name=value."""
        rows = zip(self.bounds.items(), self.coefficients.ravel().tolist(), strict=True)
        found = {name: value for (name, bounds), value in rows if is_at(value, *bounds) != (False, False)}
        return [f"{name}={value:g}" for name, value in found.items() if name != EMA_WIDTH]


def find(problem: Problem, folder: Path, digest: str) -> Result:
    """Search as `search.method` says, in a folder that keeps how far it has come; studies are named by the digest."""
    settings, shape = problem.settings, problem.shape
    if settings.method in ("closed_form", "gradient"):
        evaluated = _cheap_answer(problem, folder, settings.method == "gradient")
        best = min(evaluated, key=VALUE)
        bounds = dict(zip(problem.names, problem.bounds, strict=True))
        return Result(best.coefficients, settings.objective, best.value, 1.0, evaluated, bounds)
    objective = "fd" if settings.method == "multi_fidelity" else settings.objective
    storage = open_by_all(problem.processes, settings.storage, folder)
    evaluated, first = [], []
    if settings.sampler == "grid":
        with naming("search.trials", settings.trials):
            first = grid(settings.trials, problem.bounds, shape)
    elif settings.sampler != "random" and problem.config.searches_scales:
        values = np.round(np.linspace(*settings.interval, LINE), 9)  # 0 among them is the pretrained network
        first = distinct(np.full(shape, value) for value in (0.0, *values))
    elif settings.sampler != "random" and not problem.config.has_cheap_answer:
        rows = line(problem.config, (shape[0], len(problem.config.merged_names)))
        first = [*starts(problem), *(problem.at_width(row, place) for place, row in enumerate(rows))]
    elif settings.sampler != "random":
        evaluated = _cheap_answer(problem, folder, np.prod(shape) > MOST_COLUMNS)
        cheap = min(evaluated, key=VALUE).coefficients
        first = [*starts(problem), *first_candidates(cheap, settings.interval, settings.spread > 0)]
    first += spread(settings.spread, problem.bounds, shape, problem.stream)
    spent = evaluated[-1].passes if evaluated else 0
    if objective == "fd":
        spent += settings.control_images * problem.passes
    else:
        problem.squares(objective)  # loaded before there is a trial that errors would fail
    name, images = f"{digest}-{objective}-{settings.num_images}", settings.num_images
    sampled = settings.sampler, first, settings.trials
    study = Study(problem, storage, name, objective, images, spent, *sampled, grows=settings.grow_bounds)
    tried = study.run()
    bounds = study.bounds(tried[:-1])
    evaluated += tried
    if settings.method == "multi_fidelity":  # the best few on many images
        images, spent = settings.finalist_images, evaluated[-1].passes
        best = distinct(problem.network_of(row.coefficients) for row in sorted(tried, key=VALUE))[: settings.finalists]
        named = f"{digest}-finalists-{images}", "fd", images, spent, "finalists"
        finals = Study(problem, storage, *named, within=bounds)
        in_main_process(problem.processes, lambda: finals.extend([np.zeros(shape), *best]))
        tried = finals.run()
        evaluated += tried
    best = min(tried, key=VALUE)
    zeros = [row.value for row in tried if not row.coefficients.any()]
    pretrained = zeros[0] if zeros else problem.value(objective, np.zeros(shape))[0]
    named = dict(zip(problem.names, bounds, strict=True))
    return Result(best.coefficients, objective, best.value, pretrained, evaluated, named, study)


def _cheap_answer(problem: Problem, folder: Path, by_gradient: bool) -> list[Evaluated]:
    """To the least of match or loss, in closed form or by gradient descent from the closed form of the ranges alone."""
    settings = problem.settings
    objective = settings.objective if settings.objective != "fd" else "match"
    squares = problem.squares(objective)
    # a job at a time: another one, on another machine, waits and reads what was found
    with locked_by_all(problem.processes, folder / "cheap", "search.output", wait=True):
        if not by_gradient:
            return closed_form(squares, settings, folder / f"closed-form-{objective}.npz")
        whole = copy(squares)
        whole.candidates = problem.candidates.ungrouped()
        file = folder / f"closed-form-of-the-ranges-{objective}.npz"
        rows = closed_form(whole, settings, file, "closed form of the ranges")
        start = np.broadcast_to(min(rows, key=VALUE).coefficients, problem.shape)
        held_out = problem.squares(objective, "held-out")
        file = folder / f"gradient-{objective}.npz"
        return gradient_descent(squares, held_out, settings, start, file, rows[-1].passes)


# --- what the result is worth: it and what it has to beat, on seeds that no candidate was drawn from


def score_fresh(
    problem: Problem, result: Result, file: Path, made_from: str, beside: dict[str, Any]
) -> tuple[list[Score], list[str]]:
    """Score the contenders on fresh seeds, with the schedule of sample_ddp.py; each score is written to report.json.

    With search.schedules, or search.report_schedules, `pretrained` and `best` also have a row for each of them. Rows of
    the same `made_from` and the same trained network are not scored again. Returns the scores, first the pretrained
    network's (none without search.report_images), and what they say in words.
    """
    fresh = None
    if result.objective != "fd":
        fresh = problem.squares(result.objective, "fresh").value(result.coefficients)
    processes, settings, blocks = problem.processes, problem.settings, problem.config.report_blocks
    first = settings.seed_offset + settings.control_images  # no candidate is drawn from these seeds
    seeds = range(first, first + settings.report_images // blocks * blocks)
    if not seeds:
        return [], verdict(problem.config, result, [], fresh)
    content = {"made_from": made_from, "seeds": [seeds.start, seeds.stop], **beside}
    known = in_main_process(processes, lambda: _known(file, made_from))
    usual, space, contenders = problem.config.sample, problem.plain_distance.space, _contenders(problem, result)
    rows = [(name, name, usual) for name in contenders]
    also = [one for one in problem.reported if one.schedule != usual.schedule]
    rows += [(with_schedule(name, one.schedule), name, one) for one in also for name in PAIR]
    scores: list[Score] = []
    for row_name, name, sample in rows:
        weights = [weights_hash(problem.config.paths.trained(name))] if name in TRAINED else None
        row = known.get(row_name)
        if row is None or row.weights != weights:
            features = problem.plain_distance.by(sample).features(contenders[name](), seeds)
            row = score(Path(row_name), weights, features, space, blocks)
        scores.append(compared(row, [other for other in scores if other.samples.startswith("pretrained")]))
        in_main_process(processes, lambda: save_scores(file, space.name, scores, content))
    content["in words"] = verdict(problem.config, result, scores, fresh)
    in_main_process(processes, lambda: save_scores(file, space.name, scores, content))
    return scores, content["in words"]


def _contenders(problem: Problem, result: Result) -> dict[str, Callable[[], NetworkAt]]:
    """Name → what makes the network; one exists at a time."""
    config, usual = problem.config, problem.config.usual_coefficients
    trained = {name: config.paths.trained(name) for name in TRAINED}
    contenders = {"pretrained": partial(problem.merged, np.zeros(problem.shape))}
    contenders |= {name: partial(problem.trained, path) for name, path in trained.items() if path.exists()}
    if config.searches_scales:
        pass  # nothing is merged
    elif config.merges_experts:
        contenders |= {"ensemble": problem.experts, f"uniform {usual[0]:g}": partial(problem.merged, usual)}
        if len(PUBLISHED) == len(usual):
            contenders["published coefficients"] = partial(problem.merged, PUBLISHED)
    else:
        contenders["without a search"] = partial(problem.merged, usual)
    return contenders | {"best": partial(problem.merged, result.coefficients)}


def _known(file: Path, made_from: str) -> dict[str, Score]:
    """The rows in the file; none if it is missing or damaged, or made from something else, which is said."""
    if file.exists():
        with suppress(UserError):
            if read_json(file).get("made_from") == made_from:
                return {row.samples: row for row in load_scores(file)[1]}
            print(f"{file} was made from something else: all rows are scored anew")
    return {}


def verdict(config: Config, result: Result, scores: list[Score], fresh: float | None) -> list[str]:
    """What the scores say of the search; `fresh` is match or loss on images that were not searched on."""
    lines = []
    if at := result.at_bounds:
        what = ", ".join(at) if len(at) <= MOST_NAMED else f"{len(at)} of {len(result.bounds)} coefficients"
        lines.append(f"at a bound, beyond which there may be better ones: {what}")
    if fresh is not None:
        searched = f"{result.objective}: {result.value:.4f} where it was searched (pretrained: 1)"
        lines.append(f"{searched}, {fresh:.4f} on fresh images: optimism {fresh - result.value:+.4f}")
    if not scores:
        return [*lines, "search.report_images=0: the best is not compared with the pretrained model on fresh seeds"]
    found = next(row.to_pretrained for row in scores if row.samples == "best")
    difference, error = found.mean, found.standard_error
    if result.objective == "fd" and not config.search.schedules:
        gain = result.value - result.pretrained
        searched = f"difference to the pretrained model: {gain:+.4f} where it was searched, {difference:+.4f}"
        lines.append(f"{searched} ± {error:.4f} on fresh seeds: optimism {difference - gain:+.4f}")
    lines.append(f"the best is {_in_words(found)} than the pretrained model: {_interval(found)}")
    return [*lines, *_carried_over(config, result, {row.samples: row for row in scores})]


def _in_words(found: Difference) -> str:
    return "WORSE" if found.is_clear and found.mean > 0 else "better" if found.is_clear else "NOT clearly better"


def _interval(found: Difference) -> str:
    return f"{found.mean:+.4f}, 95 % confidence interval ± {found.half_width:.4f}"


def _carried_over(config: Config, result: Result, rows: dict[str, Score]) -> list[str]:
    """Whether the gain carries over to schedules that were not searched; nothing if the report has only sample's."""
    suffixed = [without_schedule(name)[1] for name in rows if name.startswith("best@")]
    if not (config.search.schedules or suffixed):
        return []
    searched = [one.schedule for one in config.schedules_of(config.search) if config.search.by_images]
    usual, ratios, lines = config.sample.schedule, [], []
    gains: dict[bool, list[bool]] = {True: [], False: []}
    for schedule in dict.fromkeys([*searched, *suffixed, usual]):
        pretrained, best = (rows[name if schedule == usual else with_schedule(name, schedule)] for name in PAIR)
        was_searched, gain = schedule in searched, best.to_pretrained
        gains[was_searched].append(gain.is_clear and gain.mean < 0)
        ratios += [best.pooled / pretrained.pooled] * was_searched
        lines.append(f"by {schedule}, {'' if was_searched else 'not '}searched: {_in_words(gain)}, {_interval(gain)}")
    if config.search.schedules:
        told = f"{result.value:.4f} where it was searched, {np.mean(ratios):.4f} on fresh seeds"
        lines.append(f"mean distance with the searched schedules relative to the pretrained model's: {told}")
    if gains[False]:
        word = "carries over" if all(gains[False]) else "does NOT carry over to all"
        word = f"the gain {word}" if any(gains[True]) or not searched else "no clear gain with the searched schedules"
        lines.append(f"{word}: clear with {sum(gains[False])} of {len(gains[False])} schedules that were not searched")
    return lines
