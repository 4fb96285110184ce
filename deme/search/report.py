"""What a search is worth: its result and what it has to beat, scored on seeds that no candidate was drawn from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deme.config.sections import CONTINUED, DISTILLED
from deme.errors import UserError
from deme.job.files import read_json
from deme.job.processes import in_main_process
from deme.measure.scores import CLEARLY, Score, compared, load_scores, save_scores, score
from deme.method.coefficients import PUBLISHED
from deme.method.sampling import NetworkAt
from deme.models.denoisers import load_denoiser
from deme.models.inference import freeze
from deme.models.weights import weights_hash
from deme.search.problem import Problem
from deme.search.ways import Result


@dataclass(frozen=True)
class Fresh:
    """Scores on fresh seeds, and on fresh images if the objective is match or loss."""

    scores: list[Score]  # the pretrained network first, the search's result last; empty without search.report_images
    objective: float | None  # of the result, on images that were not searched on; None: fd


def score_fresh(problem: Problem, result: Result, file: Path, made_from: str, beside: dict[str, Any]) -> Fresh:
    """Score the models on fresh seeds, with the schedule of sample_ddp.py; each score is written at once.

    Args:
        file: report.json; rows of the same `made_from` and the same trained network are not scored again.
    """
    processes = problem.processes
    objective = None
    if result.objective != "fd":
        objective = problem.squares(result.objective, "fresh").value(result.coefficients)
    settings, blocks = problem.settings, problem.config.report_blocks
    first = settings.seed_offset + settings.control_images  # no candidate is drawn from these seeds
    seeds = range(first, first + settings.report_images // blocks * blocks)
    if not seeds:
        return Fresh([], objective)
    content = {"made_from": made_from, "seeds": [seeds.start, seeds.stop], **beside}
    hashes = {name: [weights_hash(folder)] for name, folder in _trained(problem).items()}
    distance = problem.plain_distance.with_steps(problem.config.sample.num_inference_steps)
    space = distance.space
    known = in_main_process(processes, lambda: _known(file, made_from))
    scores: list[Score] = []
    for name, network_at in _contenders(problem, result).items():
        row = known.get(name)
        if row is None or row.weights != hashes.get(name):
            features = distance.features(network_at(), seeds)
            row = score(Path(name), hashes.get(name), features, space.reference, space.name, blocks)
        scores.append(compared(row, scores[:1]))
        in_main_process(processes, lambda: save_scores(file, space.name, scores, content))
    return Fresh(scores, objective)


def _contenders(problem: Problem, result: Result) -> dict[str, Callable[[], NetworkAt]]:
    """Name → what makes the network of a model; only one of them exists at a time."""
    ranges = problem.shape[1]

    def merged(row: np.ndarray) -> Callable[[], NetworkAt]:
        return lambda: problem.merged(np.broadcast_to(row, problem.shape))

    def loaded(folder: Path) -> NetworkAt:
        network = freeze(load_denoiser(folder), problem.processes.device, problem.config.sample.mixed_precision)
        return lambda _: network

    contenders = {"pretrained": merged(np.zeros(ranges))}
    contenders |= {name: partial(loaded, folder) for name, folder in _trained(problem).items()}
    contenders["ensemble"] = problem.experts
    contenders[f"uniform {1 / ranges:g}"] = merged(np.full(ranges, 1 / ranges))
    if len(PUBLISHED) == ranges:
        contenders["published coefficients"] = merged(np.array(PUBLISHED))
    contenders["best"] = merged(result.coefficients)
    return contenders


def _trained(problem: Problem) -> dict[str, Path]:
    """Name → folder of the other networks that were trained: the control and the distilled network."""
    folders = {CONTINUED: problem.config.paths.continued, DISTILLED: problem.config.paths.distilled}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def _known(file: Path, made_from: str) -> dict[str, Score]:
    """The rows in the file; none if it is missing or damaged, or made from something else, which is said."""
    try:
        if file.exists() and read_json(file).get("made_from") == made_from:
            return {row.samples: row for row in load_scores(file)[1]}
    except UserError:
        return {}
    if file.exists():
        print(f"{file} was made from something else: all rows are scored anew")
    return {}


def verdict(result: Result, fresh: Fresh) -> list[str]:
    """What the fresh scores say of the search, in words."""
    lines = []
    if fresh.objective is not None:
        lines.append(
            f"{result.objective}: {result.value:.4f} where it was searched (pretrained: 1), {fresh.objective:.4f} on "
            f"fresh images: optimism {fresh.objective - result.value:+.4f}"
        )
    if not fresh.scores:
        return [*lines, "search.report_images=0: the best is not compared with the pretrained model on fresh seeds"]
    difference, error = fresh.scores[-1].difference, fresh.scores[-1].difference_standard_error
    if result.objective == "fd":
        gain = result.value - result.pretrained
        lines.append(
            f"difference to the pretrained model: {gain:+.4f} where it was searched, {difference:+.4f} ± "
            f"{error:.4f} on fresh seeds: optimism {difference - gain:+.4f}"
        )
    if abs(difference) <= CLEARLY * error:
        lines.append("the best is NOT better than the pretrained model by more than two standard errors")
    else:
        word = "better" if difference < 0 else "WORSE"
        lines.append(f"the best is {word} than the pretrained model by {abs(difference) / error:.1f} standard errors")
    return lines
