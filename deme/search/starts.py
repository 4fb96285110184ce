"""The candidates that a study begins with, before its sampler proposes others."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from deme.config.experiment import Config
from deme.config.trainings import SELF
from deme.errors import UserError, naming
from deme.method.task_vectors import PUBLISHED
from deme.models.pipelines import denoiser_folder
from deme.models.searched import read_searched
from deme.models.weights import weights_hash
from deme.search.problem import Problem
from deme.search.study import distinct

UNIFORM = (0.5, 1.0)  # beside 1 / the number of ranges
LONGER = 2.0  # the closed form, times this: it matches the experts, whose directions may be worth more
LINE = 8  # candidates along the line of self-trained networks


def starts(problem: Problem) -> list[np.ndarray]:
    """The coefficients in the files of `search.start`, each alone, then the sum of all if it is within the bounds.

    A search of some of the networks leaves the others at 0; one without groups holds for every group.
    """
    pretrained, *own = map(weights_hash, (denoiser_folder(problem.pipeline), *problem.config.paths.finetuned))
    rows = []
    low, high = np.transpose(problem.bounds).reshape(2, *problem.shape)
    for file in problem.settings.start:
        with naming("search.start", file):
            earlier = read_searched(Path(file))
            groups, networks, row = earlier.coefficients, earlier.finetuned or [], np.zeros(problem.shape)
            if not networks or not set(networks) <= set(own) or earlier.pretrained not in (None, pretrained):
                raise UserError("found for other networks than model.pretrained and those of merge.experts")
            if max(map(own.count, networks)) > 1:
                raise UserError("two networks of merge.experts have equal weights: which coefficient is whose?")
            for number, pattern in enumerate(problem.patterns):
                values = groups.get(pattern, next(iter(groups.values())) if len(groups) == 1 else None)
                if values is None or len(values) != len(networks):
                    raise UserError(f"has no {len(networks)} coefficients for {pattern}")
                row[number, list(map(own.index, networks))] = values
            if len(groups) > 1 and set(groups) != set(problem.patterns):
                raise UserError("has other groups of tensors than search.groups")
            if not problem.settings.grow_bounds and ((row < low).any() or (row > high).any()):
                raise UserError("coefficients outside of search.bounds or search.self_bounds")
            rows.append(row)
    both = sum(rows)
    fits = problem.settings.grow_bounds or ((low <= both).all() and (both <= high).all())
    return [*rows, both] if len(rows) > 1 and fits else rows


def line(config: Config, shape: tuple[int, int]) -> list[np.ndarray]:
    """The pretrained network, and LINE equal coefficients of all self-trained networks down to their lower bound.

    The distance falls smoothly along this line and rises again. If others are merged, too, half of the candidates add
    them uniformly. Without self-trained networks these are the first candidates of the ranges' experts, less the cheap
    answers.
    """
    is_self = np.array([network.word == SELF for network in config.merged_networks])
    if not is_self.any():
        return first_candidates(np.zeros(shape), config.search.interval, config.search.spread > 0)
    values, usual = np.linspace(0, config.search.self_interval[0], LINE + 1), config.usual_coefficients
    rows = [np.where(is_self, value, number % 2 * np.array(usual)) for number, value in enumerate(values)]
    return [np.broadcast_to(row, shape) for row in rows]


def grid(count: int, bounds: Sequence[tuple[float, float]], shape: tuple[int, int]) -> list[np.ndarray]:
    """A grid of at most `count` points over the bounds, their ends included."""
    dimensions = len(bounds)
    values = int(count ** (1 / dimensions) + 1e-9)  # per coefficient
    if values < 2:
        raise UserError(f"a grid of {dimensions} coefficients has at least 2 ** {dimensions} candidates")
    return [np.reshape(point, shape) for point in product(*(np.linspace(*pair, values) for pair in bounds))]


def first_candidates(cheap: np.ndarray, interval: tuple[float, float], is_few: bool = False) -> list[np.ndarray]:
    """The pretrained network, the cheap answer, uniform and published coefficients, if they are within the bounds.

    The few lack the published coefficients, and of the uniform ones all but 1 / the number of ranges.
    """
    ranges = cheap.shape[1]
    rows = [np.zeros_like(cheap), cheap, np.clip(LONGER * cheap, *interval)]
    rows += [np.full(cheap.shape, value) for value in (1 / ranges, *([] if is_few else UNIFORM))]
    if len(PUBLISHED) == ranges and not is_few:
        rows.append(np.broadcast_to(PUBLISHED, cheap.shape))
    low, high = interval
    return distinct(row for row in rows if low <= row.min() and row.max() <= high)


def spread(
    count: int, bounds: Sequence[tuple[float, float]], shape: tuple[int, int], stream: Sequence[int]
) -> list[np.ndarray]:
    """So many candidates all over the bounds, by Latin hypercube sampling (McKay, Beckman and Conover 1979)."""
    random = np.random.default_rng((*stream, count))
    cells = np.stack([random.permutation(count) for _ in bounds], axis=-1)  # each part of an interval holds one
    low, high = np.transpose(bounds)
    return [
        np.reshape(low + (high - low) * point, shape) for point in (cells + random.random(cells.shape)) / max(1, count)
    ]
