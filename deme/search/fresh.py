"""What a search is worth: its result and what it has to beat, scored on seeds that no candidate was drawn from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from deme.config.sections import CONTINUED, DISTILLED
from deme.errors import UserError
from deme.job.files import read_json
from deme.job.processes import in_main_process
from deme.measure.scores import CLEARLY, Score, load_scores, paired, save_scores, score
from deme.method.coefficients import PUBLISHED
from deme.method.sampling import NetworkAt
from deme.models.denoisers import load_denoiser
from deme.models.inference import freeze
from deme.models.weights import weights_hash
from deme.search.problem import Problem
from deme.search.ways import Found


@dataclass(frozen=True)
class Fresh:
    """Scores on fresh seeds, and on fresh images where the objective is match or loss."""

    scores: list[Score]  # the pretrained network first, the search's result last; empty without search.report_images
    objective: float | None  # of the result, on images that were not searched on; None: fd


def score_fresh(problem: Problem, found: Found, file: Path, made_from: str, beside: dict) -> Fresh:
    """Score the models on fresh seeds, with the schedule of sample_ddp.py; what is scored stands in the file at once.

    Args:
        file: report.json; rows of the same `made_from` and the same trained network are not scored again.
    """
    accelerator = problem.accelerator
    hashes = {name: [weights_hash(folder)] for name, folder in trained(problem).items()}
    objective = None
    if found.objective != "fd":
        squares = problem.squares(found.objective, "fresh")
        problem.candidates.form(problem.network, found.coefficients)
        objective = squares.value(problem.network)
    seeds = problem.fresh_seeds
    if len(seeds) == 0:
        return Fresh([], objective)
    blocks = problem.config.report_blocks
    seeds = seeds[: len(seeds) // blocks * blocks]
    distance = problem.plain_distance.with_steps(problem.config.sample.num_inference_steps)
    known = in_main_process(accelerator, lambda: _known(file, made_from))
    scores: list[Score] = []
    for name, network_at in contenders(problem, found).items():
        row = known.get(name)
        if row is None or row.weights != hashes.get(name):
            features = distance.features(network_at(), seeds)
            row = score(Path(name), hashes.get(name), features, distance.space.reference, distance.space.name, blocks)
        scores.append(row if not scores else paired(row, scores[0]))
        content = {"made_from": made_from, "seeds": [seeds.start, seeds.stop], **beside}
        in_main_process(accelerator, lambda c=content: save_scores(file, distance.space.name, scores, c))
    return Fresh(scores, objective)


def contenders(problem: Problem, found: Found) -> dict[str, Callable[[], NetworkAt]]:
    """Name → what makes the network of a model; only one of them exists at a time."""
    ranges = problem.shape[1]

    def merged(row: np.ndarray) -> Callable[[], NetworkAt]:
        return lambda: problem.merged(np.broadcast_to(row, problem.shape))

    def loaded(folder: Path) -> NetworkAt:
        unet = freeze(load_denoiser(folder), problem.accelerator.device, problem.config.sample.mixed_precision)
        return lambda _: unet

    found_at = {"pretrained": merged(np.zeros(ranges))}
    found_at |= {name: partial(loaded, folder) for name, folder in trained(problem).items()}
    found_at["ensemble"] = problem.experts
    found_at[f"uniform {1 / ranges:g}"] = merged(np.full(ranges, 1 / ranges))
    if len(PUBLISHED) == ranges:
        found_at["published coefficients"] = merged(np.array(PUBLISHED))
    found_at["best"] = merged(found.coefficients)
    return found_at


def trained(problem: Problem) -> dict[str, Path]:
    """Name → UNet folder of the networks beside the experts that there are: the control, the distilled network."""
    paths = problem.config.paths
    return {
        name: folder for name, folder in ((CONTINUED, paths.continued), (DISTILLED, paths.distilled)) if folder.is_dir()
    }


def _known(file: Path, made_from: str) -> dict[str, Score]:
    """The rows that stand in the file."""
    try:
        if not file.exists():
            return {}
        if read_json(file).get("made_from") != made_from:
            print(f"{file} was made from something else, or by an older version: all rows are scored anew")
            return {}
        return {row.samples: row for row in load_scores(file)[1]}
    except UserError:  # damaged
        return {}


def verdict(found: Found, fresh: Fresh) -> list[str]:
    """What the fresh scores say of the search, in words."""
    gain = found.value - found.pretrained
    lines = []
    if fresh.objective is not None:
        lines.append(
            f"{found.objective}: {found.value:.4f} where it was searched (pretrained: 1), {fresh.objective:.4f} on "
            f"fresh images: optimism {fresh.objective - found.value:+.4f}"
        )
    if not fresh.scores:
        return [*lines, "search.report_images=0: the best is not compared with the pretrained model on fresh seeds"]
    best = fresh.scores[-1]
    error = best.difference_standard_error
    if found.objective == "fd":
        lines.append(
            f"difference to the pretrained model: {gain:+.4f} where it was searched, {best.difference:+.4f} ± "
            f"{error:.4f} on fresh seeds: optimism {best.difference - gain:+.4f}"
        )
    if best.difference < -CLEARLY * error:
        lines.append(f"the best is better than the pretrained model by {-best.difference / error:.1f} standard errors")
    elif best.difference > CLEARLY * error:
        lines.append(f"the best is WORSE than the pretrained model by {best.difference / error:.1f} standard errors")
    else:
        lines.append("the best is NOT better than the pretrained model by more than two standard errors")
    return lines
