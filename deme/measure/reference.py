"""What samples are compared with: statistics of the data as training sees it, in pytorch_fid's npz format."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from deme.config.experiment import Config
from deme.config.sections import LEAST_CLASSIFIED, Data
from deme.data.decoding import available_threads
from deme.data.opening import open_source
from deme.data.samples import check_sizes, list_images, read_images
from deme.data.sources import data_hashes, load_evaluation_images
from deme.errors import UserError, naming, one_line, shown
from deme.job.files import LARGEST, atomic_file, checked, sha256
from deme.job.records import STATISTICS, Record
from deme.measure.features import extract

KEPT_FEATURES = 10_000  # images whose features are kept for the scores that need more than mean and covariance
PART = 50_000  # images whose features are in memory at once
IMAGES = "images (SHA-256)"  # of a folder
HOW = "`python -m pytorch_fid --save-stats IMAGES FILE.npz` makes such a file"


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        mu: mean of the features, float64, shape (D,).
        sigma: their covariance, float64, shape (D, D).
        features: of up to KEPT_FEATURES images in random order, float32, shape (M, D); None: not at hand.
        size: of the images, [width, height] in pixels; None: not known.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None
    size: list[int] | None = None

    def check_size(self, width: int, height: int) -> None:
        """Make sure that images are of the size of these: the feature network would scale either, which shows."""
        if self.size not in (None, [width, height]):
            mine = "{} x {}".format(*self.size)
            raise UserError(
                f"images of {width} x {height} pixels, a reference of {mine} pixels: scores would not compare"
            )

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


@dataclass(frozen=True)
class DataSet:
    """What a record says of a data set."""

    name: str
    split: str
    image_column: str
    resolution: int


@dataclass(frozen=True)
class MadeFrom:
    """What a record says of statistics; older ones may say less."""

    features: str | None = None  # inception or classifier
    classifier: str | None = None  # SHA-256
    data: DataSet | None = None
    size: list[int] | None = None  # of the images of a folder: width, height


@dataclass(frozen=True)
class Source:
    """Images to make statistics of.

    Args:
        made_from: what tells them from others.
        file: that keeps the statistics.
        open: gives their number, what reads a slice of them, uint8 RGB (B, 3, H, W), and the threads that read ahead.
    """

    made_from: dict[str, Any]
    file: Path
    open: Callable[[], tuple[int, Callable[[slice], torch.Tensor], int]]


def evaluated_data(data: Data) -> dict[str, Any]:
    """The settings that decide which images the statistics are made of."""
    return open_source(data).data.tagged("statistics")


def reference_statistics(
    config: Config, accelerator: Accelerator, network: nn.Module, made_by: dict[str, str]
) -> Reference:
    """The statistics in the file evaluate.reference, or those of its images or of the data, made once.

    Args:
        network: as `extract` takes it.
        made_by: what tells it from other networks of its kind.
    """
    file = config.paths.reference
    features = {"features": config.evaluate.features, **made_by}
    if config.evaluate.reference is None:
        return made_once(config, accelerator, network, source_of_data(config), features)
    with naming("evaluate.reference", config.evaluate.reference):
        if file.is_dir():
            return made_once(config, accelerator, network, source_of_folder(config), features)
        reference, record = load_reference(file)
        check_dimensions(reference, network, config.evaluate.features, accelerator.device)
        accelerator.print(f"{file}: {compared(record, features, open_source(config.data).data)}")
        return reference


def source_of_data(config: Config) -> Source:
    """The images of the configured data."""

    def opened():
        images, _ = load_evaluation_images(config.data, config.paths.image_cache)
        if len(images) < 2:
            raise UserError(f"data.name={config.data.name}: {len(images)} image, statistics need at least 2")
        return len(images), lambda part: images.batch(range(part.start, part.stop)), images.threads

    made_from = {"data": evaluated_data(config.data)}
    made_from |= data_hashes(config.data, config.paths.image_cache)
    return Source(made_from, config.paths.reference, opened)


def source_of_folder(config: Config) -> Source:
    """The images directly in the folder evaluate.reference, as they are, read as samples are."""
    folder = config.paths.reference
    paths = list_images(folder)
    width, height = check_sizes(paths)
    if len(paths) < 2:
        raise UserError(f"{len(paths)} image, statistics need at least 2")
    if config.evaluate.features == "classifier" and min(width, height) < LEAST_CLASSIFIED:
        rule = f"evaluate.features=classifier needs at least {LEAST_CLASSIFIED} pixels"
        raise UserError(f"images of {width} x {height} pixels, {rule}")
    made_from = {"size": [width, height], IMAGES: content_hash(folder)}
    file = config.paths.stats / f"{config.evaluate.features}-folder.npz"
    return Source(made_from, file, lambda: (len(paths), lambda part: read_images(paths[part]), available_threads()))


def content_hash(path: Path) -> str:
    """The SHA-256 of a file, or of the images directly in a folder."""
    if path.is_dir():
        return hashlib.sha256("".join(map(sha256, list_images(path))).encode()).hexdigest()
    return sha256(path)


def made_once(
    config: Config, accelerator: Accelerator, network: nn.Module, source: Source, features: dict[str, str]
) -> Reference:
    """The statistics of images, kept in their file; anew where they are of other images or features, or damaged."""
    file = source.file
    wanted = Record(STATISTICS, source.made_from | features)
    if file.exists():
        try:
            saved, record = load_reference(file)
            if record.fits(wanted, file) and saved.features is not None:
                return saved
        except UserError as error:
            accelerator.print(f"{file}: unreadable, made anew ({error})")
    count, read, threads = source.open()
    parts = (
        extract(
            accelerator,
            network,
            lambda part, start=start: read(slice(start + part.start, start + part.stop)),
            min(PART, count - start),
            config.evaluate.batch_size,
            threads,
        )
        for start in range(0, count, PART)
    )
    if accelerator.is_main_process:
        save_reference(file, Reference.of(parts, count), wanted)
        print(f"wrote {file}: statistics of {count:,} images")
    else:
        for _ in parts:  # its share of the work
            pass
    accelerator.wait_for_everyone()
    return load_reference(file)[0]


@torch.inference_mode()
def check_dimensions(reference: Reference, network: nn.Module, name: str, device: torch.device) -> None:
    """Make sure that statistics are of as many features as a network gives."""
    image = torch.zeros(1, 3, LEAST_CLASSIFIED, LEAST_CLASSIFIED, dtype=torch.uint8, device=device)
    count = network.features(image).shape[1]
    if len(reference.mu) != count:
        raise UserError(f"holds statistics of {len(reference.mu)} features, {name} has {count}")


def compared(record: Record, features: dict[str, str], data: Data) -> str:
    """Compare what given statistics say of themselves with what is configured.

    Args:
        features: their name, and what tells their network from others of its kind.

    Returns:
        what is known of them.
    """
    name = features["features"]
    if not record.made_from and name == "inception":
        return "has no record: taken for statistics that pytorch_fid made; of which images, at which size, is not known"
    made = checked(record.made_from, MadeFrom)
    if made.features != name:
        whose = shown(made.features) if made.features is not None else "a network that it does not name"
        raise UserError(f"holds statistics in the features of {whose}, not of evaluate.features={name}")
    if made.classifier != features.get("classifier"):
        raise UserError("holds statistics in the features of another classifier than this run's, so they don't compare")
    if made.data is None:
        return "statistics of a folder of images"
    if made.data.name == data.name:
        for key in ("split", "image_column"):
            theirs, ours = getattr(made.data, key), getattr(data, key)
            if theirs != ours:
                raise UserError(f"holds statistics of data.{key}={theirs}, not of data.{key}={ours}")
    return f"statistics of {made.data.name}, split {made.data.split}, {made.data.resolution} pixels"


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
    """The statistics in an npz file, and their record (empty where the file has none)."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise UserError(f"a single array; an npz file of mu and sigma is needed: {HOW}")
        with content as file:
            made_from = json.loads(str(file["made_from"])) if "made_from" in file else {}
            reference = Reference(file["mu"], file["sigma"], file.get("features"))
        made = checked(made_from, MadeFrom, "made_from")
        size = made.size if made.data is None else 2 * [made.data.resolution]
        if size is not None and len(size) != 2:
            raise UserError(f"made_from.size is {size}, not a width and a height")
        check_statistics(reference)
        return replace(reference, size=size), Record(STATISTICS, made_from)
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and their decompressors raise whatever a damaged file leads to
        raise UserError(f"not an npz file of mu and sigma ({one_line(error)}): {HOW}") from None


def check_statistics(reference: Reference) -> None:
    """"""
    mu, sigma, features = reference.mu, reference.sigma, reference.features
    given = [array for array in (mu, sigma, features) if array is not None]
    numbers = all(np.issubdtype(a.dtype, np.floating) and (np.abs(a) < LARGEST).all() for a in given)
    features_fit = features is None or (features.ndim == 2 and features.shape[1:] == mu.shape)
    fits = mu.ndim == 1 and mu.size > 0 and sigma.shape == 2 * mu.shape and numbers and features_fit
    if not fits:
        raise UserError(f"mu of shape {mu.shape} and sigma of shape {sigma.shape} are no statistics: {HOW}")
    scale = np.abs(sigma).max()
    if (np.diagonal(sigma) < 0).any() or np.abs(sigma - sigma.T).max() > 1e-3 * scale:
        raise UserError(f"sigma is no covariance: {HOW}")
