"""The scores of folders of samples: distances to reference images in feature space, of all images and of blocks.

In pytorch_fid's Inception features the Fréchet and the kernel distance are FID and KID; in those of our own classifier
they are called classifier FD and classifier KID.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import nn

from deme.config.judges import FORMS
from deme.config.paths import with_schedule, without_schedule
from deme.config.trainings import CONTINUED
from deme.errors import UserError, naming
from deme.job.files import checked, read_json, write_text

KEPT_FEATURES = 10_000  # images whose features are kept, and that precision and recall look at
KERNEL_SUBSET = 1_000  # images, as Bińkowski et al. 2018
NEIGHBORHOOD = 3  # Kynkäänniemi et al. 2019
BASELINES = ("pretrained", CONTINUED, "ensemble")  # every row is compared with these
SPACES = rf"inception|classifier|({'|'.join(FORMS)})-[\w.-]+"  # names of feature spaces
SCALARS = ("precision", "recall")  # of Score: shown by name in every table and model card
CONFIDENCE = 0.95  # of the intervals: a difference or a KID is clear if its interval does not hold 0


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: statistics of the features of reference images."""

    mu: np.ndarray  # mean of the features, float64, shape (D,)
    sigma: np.ndarray  # their covariance, float64, shape (D, D)
    features: np.ndarray | None  # of up to KEPT_FEATURES images in random order, float32, (M, D); None: unknown
    size: list[int] | None = None  # of the images, [width, height] in pixels; None: unknown

    def check_size(self, width: int, height: int) -> None:
        """Refuse images of another size: the feature network would scale one of the two, which changes the score."""
        if self.size not in (None, [width, height]):
            both = "images of {} x {} pixels, a reference of {} x {} pixels".format(width, height, *self.size)
            raise UserError(f"{both}: scores would not compare")

    @classmethod
    def of(cls, parts: Iterable[np.ndarray], count: int) -> "Reference":
        """The statistics of `count` images, whose features come in parts of shape (n, D)."""
        chosen = np.random.default_rng(0).permutation(count)[:KEPT_FEATURES]
        start, total, scatter, kept = 0, 0.0, 0.0, {}
        for part in parts:
            wide = part.astype(np.float64)
            mu = wide.mean(axis=0)
            if start > 0:  # Chan, Golub and LeVeque 1983: the squares about the mean of both
                difference = mu - total / start
                scatter = scatter + np.outer(difference, difference) * (start * len(part) / (start + len(part)))
            total = total + wide.sum(axis=0)
            scatter = scatter + (wide - mu).T @ (wide - mu)
            kept |= {i: part[i - start] for i in chosen if start <= i < start + len(part)}
            start += len(part)
        return cls(total / count, scatter / (count - 1), np.stack([kept[i] for i in chosen]))


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 √(Σ₁Σ₂)) (Dowson and Landau 1982), in float64.

    With Σ₁ = A Aᵀ, tr √(Σ₁Σ₂) is the sum of the square roots of the eigenvalues of the symmetric AᵀΣ₂A, which are those
    of Σ₁Σ₂. Unlike the matrix square root this is stable where features are dead or correlated.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    eigenvalues = np.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(np.square(mu1 - mu2).sum() + trace)


@dataclass(frozen=True)
class FeatureSpace:
    """What images are compared in and with."""

    name: str  # its judge's
    network: nn.Module  # as `features.extract` takes it, on the device
    reference: Reference
    accuracy: float | None  # of the classifier, on images that it was not trained on
    made_from: dict[str, str] = field(default_factory=dict)  # what determines the features of an image

    def distance(self, features: np.ndarray) -> float:
        """The Fréchet distance of features (N, D); FID by pytorch_fid's code, to agree with `python -m pytorch_fid`."""
        distance = frechet_distance
        if self.name == "inception":
            from pytorch_fid.fid_score import calculate_frechet_distance as distance
        return float(distance(*statistics(features), self.reference.mu, self.reference.sigma))


def kernel_distances(features: np.ndarray, reference: np.ndarray, size: int, first_reference: int = 0) -> np.ndarray:
    """KID of disjoint subsets of `size` images, float64 (N // size,), by torch-fidelity.

    It is the unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018). The mean is the KID, the standard
    deviation over the square root of their number its standard error, for the given reference images, whose subsets
    take turns, from `first_reference` on. What is left over of features (N, D) and of the reference's is not used.
    """
    from torch_fidelity.metric_kid import kernel_mmd

    subsets, others = (
        x[: len(x) // size * size].astype(np.float64).reshape(-1, size, x.shape[1]) for x in (features, reference)
    )
    return np.array([kernel_mmd(one, others[(first_reference + i) % len(others)]) for i, one in enumerate(subsets)])


def precision_and_recall(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The shares of samples near real images and of real images near samples, by torch-fidelity.

    Near: within the distance from the other set's image to its third-nearest neighbour (Kynkäänniemi et al. 2019).
    The first KEPT_FEATURES of features (N, D) and of the reference's (M, D) count; N and M must be above NEIGHBORHOOD.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    pair = (torch.from_numpy(part[:KEPT_FEATURES]) for part in (features, reference))
    return calculate_precision_recall_part(*pair, NEIGHBORHOOD, batch_size=1_000)


@dataclass(frozen=True)
class Difference:
    """How far the Fréchet distance of a folder exceeds that of another one with the same seeds."""

    mean: float  # over the blocks
    standard_error: float | None  # of that mean; None: a single block
    degrees_of_freedom: float | None = None  # of that error

    @property
    def half_width(self) -> float | None:
        """Half of the width of the 95 % confidence interval around the mean; None without a standard error."""
        if self.standard_error is None or self.degrees_of_freedom is None:
            return None
        return float(half_width(self.standard_error, self.degrees_of_freedom))

    @property
    def is_clear(self) -> bool:
        """True if the 95 % confidence interval is known and does not hold 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def half_width(standard_error: Any, degrees_of_freedom: float) -> Any:
    """Half of the width of a mean's 95 % confidence interval by Student's t, of standard errors of any shape."""
    return standard_error * stdtrit(degrees_of_freedom, (1 + CONFIDENCE) / 2)


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
    kid_degrees_of_freedom: float | None = None
    kid_blocks: list[float] | None = None
    precision: float | None = None
    recall: float | None = None
    clip: float | None = None  # CLIP score, mean over the images and so over the blocks
    clip_blocks: list[float] | None = None
    clip_standard_deviation: float | None = None
    clip_difference: float | None = None  # to the pretrained model's, mean over the blocks
    clip_difference_standard_error: float | None = None
    differences: dict[str, Difference] | None = None  # to each of BASELINES that was scored, by name
    drawn_by: str | None = None  # the sampler, its steps and the scales of the predicted noise, in words

    @property
    def to_pretrained(self) -> Difference | None:
        """The difference to the pretrained model, if it was scored."""
        return (self.differences or {}).get("pretrained")

    @property
    def has_telling_kid(self) -> bool:
        """True if the KID differs clearly from 0, or its standard error is unknown."""
        if self.kid is None or self.kid_standard_error is None:
            return self.kid is not None
        return Difference(self.kid, self.kid_standard_error, self.kid_degrees_of_freedom).is_clear


def score(
    samples: Path,
    weights: list[str] | None,
    features: np.ndarray,
    space: FeatureSpace,
    num_blocks: int,
    clip: np.ndarray | None = None,
) -> Score:
    """Score a folder by its images' features (N, D) and CLIP scores (N,), in seed order; N a multiple of num_blocks."""
    parts = np.split(features, num_blocks)
    pooled = space.distance(features)
    blocks = [space.distance(part) for part in parts] if num_blocks > 1 else [pooled]
    known: dict[str, Any] = {}
    if clip is not None:
        clip_blocks = [float(part.mean()) for part in np.split(clip.astype(np.float64), num_blocks)]
        mean, deviation = mean_and_deviation(clip_blocks)
        known = {"clip": mean, "clip_blocks": clip_blocks, "clip_standard_deviation": deviation}
    real = space.reference.features
    if real is not None and min(len(real), len(features)) > NEIGHBORHOOD:
        # the KID has no bias that depends on the size of the subsets, and its standard error falls with the size
        # itself, but only with the square root of their number
        images = len(parts[0]) if num_blocks > 1 else len(features) // 2
        size = max(2, min(KERNEL_SUBSET, images, len(real) // 2))
        subsets = [kernel_distances(part, real, size, i * (len(part) // size)) for i, part in enumerate(parts)]
        kid = paired_difference(np.concatenate(subsets), 0)  # as it is, with its standard error
        known |= {"kid": kid.mean, "kid_standard_error": kid.standard_error}
        known |= {"kid_degrees_of_freedom": kid.degrees_of_freedom}
        known |= {"kid_blocks": [float(part.mean()) for part in subsets]}
        known["precision"], known["recall"] = precision_and_recall(features, real)
    return Score(str(samples), weights, len(features), pooled, blocks, *mean_and_deviation(blocks), **known)


def compared(row: Score, others: Sequence[Score], prompted: Sequence[Score] = ()) -> Score:
    """A score with its differences to BASELINES, and of its CLIP score to the pretrained model's, block by block.

    `others` have the same seeds; `prompted` are those of them that have a CLIP score with the same prompts. A folder of
    one of several schedules is compared with those of the same schedule. Of baselines of one name, a folder is compared
    with the one beside it, or with none.
    """
    own, schedule = without_schedule(Path(row.samples).name)

    def baseline(name: str, scores: Sequence[Score]) -> Score | None:
        found = [s for s in scores if Path(s.samples).name == with_schedule(name, schedule)] if name != own else []
        found = [s for s in found if Path(s.samples).parent == Path(row.samples).parent] or found
        return found[0] if len(found) == 1 else None

    baselines = {name: baseline(name, others) for name in BASELINES}
    pairs = {name: paired_difference(row.blocks, other.blocks) for name, other in baselines.items() if other}
    row = replace(row, differences=pairs)
    if (pretrained := baseline("pretrained", prompted)) is None:
        return row
    clip = paired_difference(row.clip_blocks, pretrained.clip_blocks)
    return replace(row, clip_difference=clip.mean, clip_difference_standard_error=clip.standard_error)


def paired_difference(blocks: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The mean of the blocks' differences, in which much of the seeds' spread cancels, and its standard error."""
    differences = np.subtract(blocks, baseline)
    mean, deviation = mean_and_deviation(differences)
    count = len(differences)
    return Difference(mean, None if deviation is None else deviation / count**0.5, count - 1)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def save_scores(path: Path, features: str, scores: Sequence[Score], beside: dict[str, Any]) -> None:
    """Write report.json; `beside` are further keys, such as the provenance."""
    save_spaces(path, {features: scores}, beside)


def save_spaces(path: Path, spaces: dict[str, Sequence[Score]], beside: dict[str, Any]) -> None:
    """Write results.json: scores by feature space, those of the first judge where files of a single one have them."""
    (features, rows), *further = ((name, [asdict(row) for row in scores]) for name, scores in spaces.items())
    content = {"features": features, "rows": rows} | ({"further": dict(further)} if further else {}) | beside
    write_text(path, json.dumps(content, indent=2))


def load_scores(path: Path) -> tuple[str, list[Score]]:
    """The name of the first feature space in a results.json, and the scores in it."""
    return next(iter(load_spaces(path).items()))


def load_spaces(path: Path) -> dict[str, list[Score]]:
    """The scores in a results.json by feature space, the first judge's first."""
    content = read_json(path)
    with naming(path), naming("not the results of evaluate.py"):
        features = checked(content.get("features"), str, "features")
        spaces = {features: checked(content.get("rows"), list[Score], "rows")}
        spaces |= checked(content.get("further", {}), dict[str, list[Score]], "further")
        for name, rows in spaces.items():
            if not re.fullmatch(SPACES, name) or not rows:
                raise UserError(f"{len(rows)} rows of {name} features")
            for place, row in enumerate(rows):
                if faults := _faults(row, max(1, len(rows[0].blocks))):
                    where = "rows" if name == features else f"further.{name}"
                    raise UserError(f"{where}[{place}].{faults[0]}")
    return {name: list(map(_with_degrees_of_freedom, rows)) for name, rows in spaces.items()}


def _with_degrees_of_freedom(row: Score) -> Score:
    """A row with the degrees of freedom that earlier versions did not write: those of its blocks."""
    of_blocks, known = len(row.blocks) - 1, row.differences or {}
    filled = {name: replace(one, degrees_of_freedom=one.degrees_of_freedom or of_blocks) for name, one in known.items()}
    row = row if row.differences is None else replace(row, differences=filled)
    if row.kid_standard_error is None or row.kid_degrees_of_freedom is not None:
        return row
    return replace(row, kid_degrees_of_freedom=max(1, of_blocks))  # of a single block it has at least two subsets


def _faults(row: Score, num_blocks: int) -> list[str]:
    errors = {key: value for key, value in vars(row).items() if key.endswith(("deviation", "_error", "_freedom"))}
    differences = row.differences or {}
    errors |= {f"differences.{key}": one.standard_error for key, one in differences.items()}
    errors |= {f"differences.{key}'s degrees of freedom": one.degrees_of_freedom for key, one in differences.items()}
    faults = [f"{key} is negative" for key, value in errors.items() if (value or 0) < 0]
    faults += [f"images is {row.images}"] if row.images < 1 else []
    blocks = {key: getattr(row, key) for key in ("blocks", "kid_blocks", "clip_blocks")}
    counts = {key: len(values) for key, values in blocks.items() if values is not None}
    return faults + [f"{key} holds {n} numbers, not {num_blocks}" for key, n in counts.items() if n != num_blocks]
