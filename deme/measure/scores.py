"""The scores of folders of samples: of all images, of equal blocks of seeds, and of pairs of folders."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deme.config.sections import CONTINUED
from deme.errors import UserError, naming
from deme.job.files import atomic_file, checked, read_json
from deme.measure.metrics import (
    NEIGHBORHOOD,
    Reference,
    frechet_distance,
    inception_frechet_distance,
    kernel_distances,
    kernel_subset_size,
    precision_and_recall,
    statistics,
)

DISTANCES = {"inception": inception_frechet_distance, "classifier": frechet_distance}
BASELINES = ("pretrained", CONTINUED, "ensemble")  # every row is compared with these
SCALARS = ("precision", "recall")  # of Score: shown by name in every table and model card
CLEARLY = 2.0  # standard errors: a difference or a KID within them tells nothing


@dataclass(frozen=True)
class Difference:
    """How far the Fréchet distance of a folder exceeds that of another one with the same seeds."""

    mean: float  # over the blocks
    standard_error: float | None  # of that mean; None: a single block


@dataclass(frozen=True)
class Score:
    """The scores of one folder of samples. None: not available."""

    samples: str  # the folder
    weights: list[str] | None  # SHA-256 of the weights that drew the images
    images: int
    pooled: float  # Fréchet distance of all images
    blocks: list[float]  # Fréchet distance of each of the equal blocks, in seed order
    mean: float  # over the blocks
    standard_deviation: float | None
    kid: float | None = None  # mean over disjoint subsets of the images
    kid_standard_error: float | None = None
    kid_blocks: list[float] | None = None
    precision: float | None = None
    recall: float | None = None
    clip: float | None = None  # CLIP score, mean over the images and so over the blocks
    clip_blocks: list[float] | None = None
    clip_standard_deviation: float | None = None
    clip_difference: float | None = None  # to the pretrained model's, mean over the blocks
    clip_difference_standard_error: float | None = None
    differences: dict[str, Difference] | None = None  # to each of BASELINES that was scored, by name

    @property
    def difference(self) -> float | None:
        """The mean difference to the pretrained model, if it was scored."""
        found = (self.differences or {}).get("pretrained")
        return None if found is None else found.mean

    @property
    def difference_standard_error(self) -> float | None:
        """The standard error of `difference`."""
        found = (self.differences or {}).get("pretrained")
        return None if found is None else found.standard_error

    @property
    def has_telling_kid(self) -> bool:
        """True if the KID differs from 0 by more than its standard error explains, where that is known."""
        if self.kid is None or self.kid_standard_error is None:
            return self.kid is not None
        return abs(self.kid) > CLEARLY * self.kid_standard_error


def score(
    samples: Path,
    weights: list[str] | None,
    features: np.ndarray,
    reference: Reference,
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
    row = Score(str(samples), weights, len(features), pooled, blocks, mean, deviation)
    real = reference.features
    if real is None or min(len(real), len(features)) <= NEIGHBORHOOD:
        return row
    size = kernel_subset_size(len(parts[0]) if num_blocks > 1 else len(features) // 2, len(real))
    per_part = len(parts[0]) // size
    subsets = [kernel_distances(part, real, size, i * per_part) for i, part in enumerate(parts)]
    kid, deviation = mean_and_deviation(np.concatenate(subsets))
    precision, recall = precision_and_recall(features, real)
    return replace(
        row,
        kid=kid,
        kid_standard_error=None if deviation is None else deviation / np.size(subsets) ** 0.5,
        kid_blocks=[float(part.mean()) for part in subsets],
        precision=precision,
        recall=recall,
    )


def compared(row: Score, others: Sequence[Score]) -> Score:
    """A score with its differences to BASELINES, block by block.

    The standard error is that of the mean of the blocks' differences, in which much of the seeds' spread cancels.

    Args:
        others: scores of the same seeds; those of other models, and the row itself, are ignored.
    """
    named = {Path(other.samples).name: other for other in others if other.samples != row.samples}
    pairs = {name: paired_difference(row.blocks, named[name].blocks) for name in BASELINES if name in named}
    return replace(row, differences={name: Difference(*pair) for name, pair in pairs.items()})


def with_clip(row: Score, of_images: np.ndarray) -> Score:
    """A score with the CLIP score of the same images, in the same blocks.

    Args:
        of_images: the CLIP score of each image, shape (N,), in seed order.
    """
    blocks = [float(part.mean()) for part in np.split(of_images.astype(np.float64), len(row.blocks))]
    mean, deviation = mean_and_deviation(blocks)
    return replace(row, clip=mean, clip_blocks=blocks, clip_standard_deviation=deviation)


def compared_clip(row: Score, pretrained: Score) -> Score:
    """A score with the difference of its CLIP score to the pretrained model's, of the same seeds and prompts."""
    mean, error = paired_difference(row.clip_blocks, pretrained.clip_blocks)
    return replace(row, clip_difference=mean, clip_difference_standard_error=error)


def paired_difference(blocks: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """The mean of the blocks' differences, and its standard error."""
    differences = np.subtract(blocks, baseline)
    mean, deviation = mean_and_deviation(differences)
    return mean, None if deviation is None else deviation / len(differences) ** 0.5


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def save_scores(path: Path, features_name: str, scores: Sequence[Score], beside: dict[str, Any]) -> None:
    """Write results.json.

    Args:
        beside: further keys: the classifier's accuracy, the provenance.
    """
    content = {"features": features_name, "rows": [asdict(row) for row in scores], **beside}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class Results:
    """The content of results.json, without the provenance."""

    features: str
    rows: list[Score]


def load_scores(path: Path) -> tuple[str, list[Score]]:
    """The features' name and the scores in a results.json."""
    content = read_json(path)
    with naming(path), naming("not the results of evaluate.py"):
        results = checked(content, Results)
        if results.features not in DISTANCES or not results.rows:
            raise UserError(f"{len(results.rows)} rows of {results.features} features")
        for place, row in enumerate(results.rows):
            _check_row(row, max(1, len(results.rows[0].blocks)), f"rows[{place}]")
    return results.features, results.rows


def _check_row(row: Score, blocks: int, name: str) -> None:
    errors = {key: value for key, value in asdict(row).items() if key.endswith(("deviation", "_error"))}
    errors |= {f"differences.{key}": one.standard_error for key, one in (row.differences or {}).items()}
    for key, value in errors.items():
        if value is not None and value < 0:
            raise UserError(f"{name}.{key} is negative")
    if row.images < 1:
        raise UserError(f"{name}.images is {row.images}")
    for key in ("blocks", "kid_blocks", "clip_blocks"):
        values = getattr(row, key)
        if values is not None and len(values) != blocks:
            raise UserError(f"{name}.{key} holds {len(values)} numbers, not {blocks}")
