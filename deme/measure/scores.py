"""The scores of folders of samples: of all images, of equal blocks of seeds, and paired with the pretrained model's."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme.config.sections import CONTINUED
from deme.errors import UserError, naming
from deme.job.files import atomic_file, checked, read_json
from deme.measure.metrics import (
    NEIGHBORHOOD,
    frechet_distance,
    inception_frechet_distance,
    kernel_distances,
    kernel_subset_size,
    precision_and_recall,
    statistics,
)

if TYPE_CHECKING:
    from deme.measure.reference import Reference

DISTANCES = {"inception": inception_frechet_distance, "classifier": frechet_distance}
BASELINES = ("pretrained", CONTINUED, "ensemble")  # what every row is compared with
CLEARLY = 2.0  # standard errors from 0, within which a difference or a KID tells nothing


@dataclass(frozen=True)
class Difference:
    """What a folder's Fréchet distance exceeds that of another one by, whose images have the same seeds."""

    mean: float  # over the blocks
    standard_error: float | None  # of that mean; None: a single block


@dataclass(frozen=True)
class Score:
    """The scores of one folder of samples. None: can't be had, or not in an older file."""

    samples: str  # the folder
    weights: list[str] | None  # SHA-256 of those that the images were drawn from
    images: int
    pooled: float  # Fréchet distance of all images
    blocks: list[float]  # Fréchet distance of each of the equal blocks, in seed order
    mean: float | None = None  # over the blocks
    standard_deviation: float | None = None
    kid: float | None = None  # mean over disjoint subsets of the images
    kid_standard_error: float | None = None
    kid_blocks: list[float] | None = None
    precision: float | None = None
    recall: float | None = None
    difference: float | None = None  # mean over the blocks of what the distance exceeds the pretrained model's by
    difference_standard_error: float | None = None
    clip: float | None = None  # CLIP score, mean over the images and so over the blocks
    clip_blocks: list[float] | None = None
    clip_standard_deviation: float | None = None
    clip_difference: float | None = None  # mean over the blocks of what it exceeds the pretrained model's by
    clip_difference_standard_error: float | None = None
    differences: dict[str, Difference] | None = None  # of the distance to each of BASELINES that there is, by name

    @property
    def has_telling_kid(self) -> bool:
        """Whether the KID differs from 0 by more than its standard error explains, where that is known."""
        if self.kid is None or self.kid_standard_error is None:
            return self.kid is not None
        return abs(self.kid) > CLEARLY * self.kid_standard_error


def score(
    samples: Path,
    weights: list[str] | None,
    features: np.ndarray,
    reference: "Reference",
    features_name: str,
    num_blocks: int,
) -> Score:
    """Score a folder.

    Args:
        features: of its images, shape (N, D), in seed order; N a multiple of num_blocks.
        features_name: inception or classifier.
    """
    distance = DISTANCES[features_name]
    pooled = distance(*statistics(features), reference.mu, reference.sigma)
    parts = np.split(features, num_blocks)
    blocks = [pooled]
    if num_blocks > 1:
        blocks = [distance(*statistics(part), reference.mu, reference.sigma) for part in parts]
    mean, deviation = mean_and_deviation(blocks)
    found = Score(str(samples), weights, len(features), pooled, blocks, mean, deviation)
    real = reference.features
    if real is None or min(len(real), len(features)) <= NEIGHBORHOOD:
        return found
    size = kernel_subset_size(len(parts[0]) if num_blocks > 1 else len(features) // 2, len(real))
    per_part = len(parts[0]) // size
    subsets = [kernel_distances(part, real, size, i * per_part) for i, part in enumerate(parts)]
    kid, deviation = mean_and_deviation(np.concatenate(subsets))
    precision, recall = precision_and_recall(features, real)
    return replace(
        found,
        kid=kid,
        kid_standard_error=None if deviation is None else deviation / np.size(subsets) ** 0.5,
        kid_blocks=[float(part.mean()) for part in subsets],
        precision=precision,
        recall=recall,
    )


def paired(found: Score, baseline: Score) -> Score:
    """A score with its difference to a baseline of the same seeds, block by block.

    The standard error is that of the mean of the blocks' differences: the same seeds cancel much of the spread.
    """
    mean, error = paired_difference(found.blocks, baseline.blocks)
    return replace(found, difference=mean, difference_standard_error=error)


def compared(found: Score, others: Sequence[Score]) -> Score:
    """A score with its differences to BASELINES, block by block, as `paired` takes them.

    Args:
        others: rows of the same seeds; those that are no baselines, and the row itself, are passed over.
    """
    named = {Path(row.samples).name: row for row in others if row.samples != found.samples}
    differences = {
        name: Difference(*paired_difference(found.blocks, named[name].blocks)) for name in BASELINES if name in named
    }
    return replace(found, differences=differences)


def with_clip(found: Score, of_images: np.ndarray) -> Score:
    """A score with the CLIP score of the same images, in the same blocks.

    Args:
        of_images: the CLIP score of each image, shape (N,), in seed order.
    """
    blocks = [float(part.mean()) for part in np.split(of_images.astype(np.float64), len(found.blocks))]
    mean, deviation = mean_and_deviation(blocks)
    return replace(found, clip=mean, clip_blocks=blocks, clip_standard_deviation=deviation)


def paired_clip(found: Score, baseline: Score) -> Score:
    """`paired` of the CLIP scores, for a baseline of the same seeds and prompts."""
    mean, error = paired_difference(found.clip_blocks, baseline.clip_blocks)
    return replace(found, clip_difference=mean, clip_difference_standard_error=error)


def paired_difference(blocks: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """The mean of the blocks' differences, and its standard error."""
    differences = np.subtract(blocks, baseline)
    mean, deviation = mean_and_deviation(differences)
    return mean, None if deviation is None else deviation / len(differences) ** 0.5


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation, None where there is a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def save_scores(path: Path, features_name: str, scores: Sequence[Score], beside: dict[str, Any]) -> None:
    """Write results.json.

    Args:
        beside: what else is written: the classifier's accuracy, the provenance.
    """
    content = {"features": features_name, "rows": [asdict(row) for row in scores], **beside}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class Results:
    """What a results.json holds, beside the provenance."""

    features: str
    rows: list[Score]


def load_scores(path: Path) -> tuple[str, list[Score]]:
    """The features' name and the scores in a results.json."""
    content = read_json(path)
    with naming(path), naming("not the results of evaluate.py"):
        found = checked(content, Results)
        if found.features not in DISTANCES or not found.rows:
            raise UserError(f"{len(found.rows)} rows of {found.features} features")
        for place, row in enumerate(found.rows):
            check_row(row, len(found.rows[0].blocks), f"rows[{place}]")
    return found.features, [row if row.mean is not None else with_mean(row) for row in found.rows]


def with_mean(row: Score) -> Score:
    """A row of an older file, with the mean of its blocks."""
    mean, deviation = mean_and_deviation(row.blocks)
    return replace(row, mean=mean, standard_deviation=deviation)


def check_row(row: Score, blocks: int, name: str) -> None:
    """"""
    errors = {key: value for key, value in asdict(row).items() if key.endswith(("deviation", "_error"))}
    errors |= {f"differences.{key}": found.standard_error for key, found in (row.differences or {}).items()}
    for key, value in errors.items():
        if value is not None and value < 0:
            raise UserError(f"{name}.{key} is negative")
    if row.images < 1:
        raise UserError(f"{name}.images is {row.images}")
    for key in ("blocks", "kid_blocks", "clip_blocks"):
        found = getattr(row, key)
        if found is not None and len(found) != max(1, blocks):
            raise UserError(f"{name}.{key} holds {len(found)} numbers, not {max(1, blocks)}")
