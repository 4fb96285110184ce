"""What a search is worth: its result and what it has to beat, scored on seeds that no candidate was drawn from."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from deme.config.trainings import CONTINUED, DISTILLED
from deme.errors import UserError
from deme.job.files import read_json
from deme.job.processes import in_main_process
from deme.measure.scores import CLEARLY, Score, compared, load_scores, save_scores, score
from deme.method.sampling import NetworkAt
from deme.method.task_vectors import PUBLISHED
from deme.models.denoisers import freeze, load_denoiser
from deme.models.weights import weights_hash
from deme.search.problem import Problem
from deme.search.ways import Result

ENSEMBLE = "ensemble"


def score_fresh(
    problem: Problem, result: Result, file: Path, made_from: str, beside: dict[str, Any]
) -> tuple[list[Score], float | None]:
    """Score the contenders on fresh seeds, with the schedule of sample_ddp.py; each score is written at once.

    Args:
        file: report.json; rows of the same `made_from` and the same trained network are not scored again.

    Returns:
        The scores, the pretrained network's first, the result's last; none without search.report_images. Match or loss
        of the result on images that were not searched on; None: fd was searched.
    """
    fresh = None
    if result.objective != "fd":
        fresh = problem.squares(result.objective, "fresh").value(result.coefficients)
    processes, settings, blocks = problem.processes, problem.settings, problem.config.report_blocks
    first = settings.seed_offset + settings.control_images  # no candidate is drawn from these seeds
    seeds = range(first, first + settings.report_images // blocks * blocks)
    if not seeds:
        return [], fresh
    content = {"made_from": made_from, "seeds": [seeds.start, seeds.stop], **beside}
    distance = problem.plain_distance.with_steps(problem.config.sample.num_inference_steps)
    space = distance.space
    known = in_main_process(processes, lambda: _known(file, made_from))
    scores: list[Score] = []
    for name, contender in _contenders(problem, result).items():
        weights = [weights_hash(contender)] if isinstance(contender, Path) else None
        row = known.get(name)
        if row is None or row.weights != weights:
            features = distance.features(_network_at(problem, contender), seeds)
            row = score(Path(name), weights, features, space.reference, space.name, blocks)
        scores.append(compared(row, scores[:1]))
        in_main_process(processes, lambda: save_scores(file, space.name, scores, content))
    return scores, fresh


def _contenders(problem: Problem, result: Result) -> dict[str, np.ndarray | Path | str]:
    """Name → coefficients, the folder of another network that was trained, or ENSEMBLE."""
    config, paths = problem.config, problem.config.paths
    trained = {CONTINUED: paths.continued, DISTILLED: paths.distilled}
    usual = config.usual_coefficients
    contenders = {"pretrained": np.zeros(len(usual))}
    contenders |= {name: folder for name, folder in trained.items() if folder.is_dir()}
    of_ranges = config.merge.experts == ["ranges"]
    contenders |= {ENSEMBLE: ENSEMBLE} if of_ranges else {}
    contenders[f"uniform {usual[0]:g}" if of_ranges else "without a search"] = np.array(usual)
    if of_ranges and len(PUBLISHED) == len(usual):
        contenders["published coefficients"] = np.array(PUBLISHED)
    return contenders | {"best": result.coefficients}


def _network_at(problem: Problem, contender: np.ndarray | Path | str) -> NetworkAt:
    """The network of a contender; it is the only one that exists."""
    if isinstance(contender, Path):
        network = freeze(load_denoiser(contender), problem.processes.device, problem.config.sample.mixed_precision)
        return lambda _: network
    if isinstance(contender, str):
        return problem.experts()
    return problem.merged(np.broadcast_to(contender, problem.shape))


def _known(file: Path, made_from: str) -> dict[str, Score]:
    """The rows in the file; none if it is missing or damaged, or made from something else, which is said."""
    if file.exists():
        with suppress(UserError):
            if read_json(file).get("made_from") == made_from:
                return {row.samples: row for row in load_scores(file)[1]}
            print(f"{file} was made from something else: all rows are scored anew")
    return {}


def verdict(result: Result, scores: list[Score], fresh: float | None) -> list[str]:
    """What `score_fresh` says of the search, in words."""
    lines = []
    if fresh is not None:
        lines.append(
            f"{result.objective}: {result.value:.4f} where it was searched (pretrained: 1), {fresh:.4f} on fresh "
            f"images: optimism {fresh - result.value:+.4f}"
        )
    if not scores:
        return [*lines, "search.report_images=0: the best is not compared with the pretrained model on fresh seeds"]
    difference, error = scores[-1].to_pretrained.mean, scores[-1].to_pretrained.standard_error
    if result.objective == "fd":
        gain = result.value - result.pretrained
        lines.append(
            f"difference to the pretrained model: {gain:+.4f} where it was searched, {difference:+.4f} ± "
            f"{error:.4f} on fresh seeds: optimism {difference - gain:+.4f}"
        )
    if abs(difference) <= CLEARLY * error:
        return [*lines, "the best is NOT better than the pretrained model by more than two standard errors"]
    word = "better" if difference < 0 else "WORSE"
    return [*lines, f"the best is {word} than the pretrained model by {abs(difference) / error:.1f} standard errors"]
