"""What samples are compared with: statistics of the data as training sees it, in pytorch_fid's npz format."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from deme.config.experiment import Config
from deme.config.sections import Data
from deme.data.sources import as_opened, data_fingerprint, load_evaluation_images
from deme.errors import UserError, naming, one_line
from deme.job.files import atomic_file
from deme.job.records import DATA, STATISTICS, Record
from deme.measure.features import extract

KEPT_FEATURES = 10_000  # images whose features are kept for the scores that need more than mean and covariance
PART = 50_000  # images whose features are in memory at once
NOT_IN_EVALUATION = ("center_crop", "random_flip", "held_out_images", "cache_gb", "cache_disk_gb")
NOT_IN_EVALUATION += ("caption_column", "cache_latents", "cached_views")


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        mu: mean of the features, float64, shape (D,).
        sigma: their covariance, float64, shape (D, D).
        features: of up to KEPT_FEATURES images in random order, float32, shape (M, D); None: not at hand.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None

    @classmethod
    def of(cls, parts: Iterable[np.ndarray], count: int) -> "Reference":
        """From the features of all images in parts (n, D) that are read one after another, `count` together."""
        chosen = np.random.default_rng(0).permutation(count)[:KEPT_FEATURES]
        start = 0
        total = 0.0
        scatter = 0.0
        kept = {}
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


def evaluated_data(data: Data) -> dict[str, Any]:
    """The settings that decide which images the statistics are made of."""
    return {key: value for key, value in asdict(as_opened(data)).items() if key not in NOT_IN_EVALUATION}


def reference_statistics(
    config: Config, accelerator: Accelerator, network: nn.Module, made_by: dict[str, str]
) -> Reference:
    """The statistics in evaluate.reference, or of the data, made once.

    Args:
        network: as `extract` takes it.
        made_by: what tells it from other networks of its kind.

    Raises:
        UserError: a reference that can't be read, data of one image.
    """
    file = config.paths.reference
    if config.evaluate.reference is not None:
        with naming("evaluate.reference", file):
            return load_reference(file)[0]
    made_from = {"data": evaluated_data(config.data), "features": config.evaluate.features, **made_by}
    made_from[DATA] = data_fingerprint(config.data)
    wanted = Record(STATISTICS, made_from)
    if file.exists():
        with naming(file):
            saved, record = load_reference(file)
        if record.fits(wanted, file) and saved.features is not None:
            return saved
    images, _ = load_evaluation_images(config.data, config.paths.image_cache)
    if len(images) < 2:
        raise UserError(f"data.name={config.data.name}: {len(images)} image, statistics need at least 2")
    parts = (
        extract(
            accelerator,
            network,
            lambda part, start=start: images.batch(range(start + part.start, start + part.stop)),
            min(PART, len(images) - start),
            config.evaluate.batch_size,
            images.threads,
        )
        for start in range(0, len(images), PART)
    )
    if accelerator.is_main_process:
        save_reference(file, Reference.of(parts, len(images)), wanted)
        print(f"wrote {file}: statistics of {len(images):,} images")
    else:
        for _ in parts:  # its share of the work
            pass
    accelerator.wait_for_everyone()
    return load_reference(file)[0]


def save_reference(path: Path, reference: Reference, record: Record) -> None:
    """pytorch_fid's npz format, with the features, and what all was made from as JSON."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=reference.mu,
            sigma=reference.sigma,
            features=reference.features,
            made_from=np.array(json.dumps(record.made_from)),
        )


def load_reference(path: Path) -> tuple[Reference, Record]:
    """The statistics in an npz file, and their record (empty where the file has none).

    Raises:
        UserError: not an npz file that holds mu (D,) and sigma (D, D).
    """
    how = "`python -m pytorch_fid --save-stats IMAGES FILE.npz` makes such a file"
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise UserError(f"a single array; an npz file of mu and sigma is needed: {how}")
        with content as file:
            made_from = json.loads(str(file["made_from"])) if "made_from" in file else {}
            reference = Reference(file["mu"], file["sigma"], file.get("features"))
        mu = reference.mu
        sigma = reference.sigma
        given = [array for array in (mu, sigma, reference.features) if array is not None]
        numbers = all(np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all() for array in given)
        features_fit = reference.features is None or reference.features.shape[1:] == mu.shape
        if mu.ndim != 1 or mu.size == 0 or sigma.shape != 2 * mu.shape or not numbers or not features_fit:
            raise UserError(f"mu of shape {mu.shape} and sigma of shape {sigma.shape} are no statistics: {how}")
        return reference, Record(STATISTICS, dict(made_from))
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and their decompressors raise whatever a damaged file leads to
        raise UserError(f"not an npz file of mu and sigma ({one_line(error)}): {how}") from None
