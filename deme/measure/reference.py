"""What samples are compared in and with: a feature network, and statistics in pytorch_fid's npz format."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deme.config.experiment import Config
from deme.config.sections import LEAST_CLASSIFIED, Data
from deme.data.decoding import available_threads
from deme.data.examples import load_evaluation_images
from deme.data.opening import open_source
from deme.data.samples import check_sizes, list_images, read_images
from deme.errors import UserError, naming, one_line, shown
from deme.job.files import LARGEST, atomic_file, checked, make_folder, sha256
from deme.job.processes import Processes, locked_by_all
from deme.job.records import STATISTICS, Record
from deme.measure.classifier import check_classified, evaluated_data, trained_classifier
from deme.measure.features import extract, load_inception
from deme.measure.metrics import Reference

PART = 50_000  # images whose features are in memory at once
IMAGES = "images (SHA-256)"  # of a folder
HOW = "`python -m pytorch_fid --save-stats IMAGES FILE.npz` makes such a file"


@dataclass(frozen=True)
class FeatureSpace:
    """What images are compared in and with."""

    name: str  # inception or classifier
    network: nn.Module  # as `extract` takes it, on the device
    reference: Reference
    accuracy: float | None  # of the classifier, on images that it was not trained on


def load_feature_space(config: Config, processes: Processes) -> FeatureSpace:
    """The configured feature space, made once and kept in stats/. If another job is making it, wait for that job."""
    name = config.evaluate.features
    features = {"features": name}
    accuracy = None
    with locked_by_all(processes, config.paths.stats, "output_dir", wait=True):
        make_folder(config.paths.stats, "output_dir")
        if name == "inception":
            with processes.main_process_first(), naming("evaluate.features", name):
                network = load_inception().to(processes.device)  # one process downloads the weights
        else:
            network, accuracy = trained_classifier(config, processes)
            features["classifier"] = sha256(config.paths.classifier)
            processes.print(f"classifier: held-out accuracy {accuracy:.1%}")
        return FeatureSpace(name, network, reference_statistics(config, processes, network, features), accuracy)


def reference_statistics(
    config: Config, processes: Processes, network: nn.Module, features: dict[str, str]
) -> Reference:
    """The statistics in the file evaluate.reference, or those of its images or of the data, made once.

    Args:
        network: as `extract` takes it.
        features: its name, and the SHA-256 of a classifier.
    """
    if config.evaluate.reference is None:
        return _made_once(config, processes, network, _images_of_data(config), features)
    file = config.paths.reference
    with naming("evaluate.reference", config.evaluate.reference):
        if file.is_dir():
            return _made_once(config, processes, network, _images_of_folder(config), features)
        reference, record = load_reference(file)
        image = torch.zeros(1, 3, LEAST_CLASSIFIED, LEAST_CLASSIFIED, dtype=torch.uint8, device=processes.device)
        with torch.inference_mode():
            count = network.features(image).shape[1]
        if len(reference.mu) != count:
            raise UserError(f"holds statistics of {len(reference.mu)} features, {features['features']} has {count}")
        description = _check_comparable(record, features, open_source(config.data).data)
        processes.print(f"{file}: {description}")
        return reference


# --- statistics that are made


@dataclass(frozen=True)
class Images:
    """Images to make statistics of."""

    made_from: dict[str, Any]  # of the record
    file: Path  # that keeps the statistics
    # the number of images, what reads a slice of them, uint8 RGB (B, 3, H, W), and the threads that read ahead
    open: Callable[[], tuple[int, Callable[[slice], torch.Tensor], int]]


def _images_of_data(config: Config) -> Images:
    """The images of the configured data."""
    source = open_source(config.data)

    def opened():
        images, _ = load_evaluation_images(source, config.paths.image_cache)
        if len(images) < 2:
            raise UserError(f"data.name={config.data.name}: {len(images)} image, statistics need at least 2")
        return len(images), lambda part: images.batch(range(part.start, part.stop)), images.threads

    return Images(evaluated_data(config, source), config.paths.reference, opened)


def _images_of_folder(config: Config) -> Images:
    """The images directly in the folder evaluate.reference, read as samples are."""
    folder = config.paths.reference
    paths = list_images(folder)
    size = check_sizes(paths)
    if len(paths) < 2:
        raise UserError(f"{len(paths)} image, statistics need at least 2")
    check_classified(config.evaluate.features, *size)
    made_from = {"size": [*size], IMAGES: content_hash(folder)}
    file = config.paths.stats / f"{config.evaluate.features}-folder.npz"
    return Images(made_from, file, lambda: (len(paths), lambda part: read_images(paths[part]), available_threads()))


def content_hash(path: Path) -> str:
    """The SHA-256 of a file, or of the images directly in a folder."""
    if path.is_dir():
        return hashlib.sha256("".join(map(sha256, list_images(path))).encode()).hexdigest()
    return sha256(path)


def _made_once(
    config: Config, processes: Processes, network: nn.Module, images: Images, features: dict[str, str]
) -> Reference:
    """The statistics of images, kept in their file; made again if they are of other images or features, or damaged."""
    file = images.file
    wanted = Record(STATISTICS, images.made_from | features)
    if file.exists():
        try:
            saved, record = load_reference(file)
            if record.fits(wanted, file) and saved.features is not None:
                return saved
        except UserError as error:
            processes.print(f"{file}: unreadable, made anew ({error})")
    count, read, threads = images.open()

    def features_from(start: int) -> np.ndarray:
        def read_part(part: slice) -> torch.Tensor:
            return read(slice(start + part.start, start + part.stop))

        size = min(PART, count - start)
        return extract(processes, network, read_part, size, config.evaluate.batch_size, threads)

    parts = map(features_from, range(0, count, PART))
    if processes.is_main_process:
        save_reference(file, Reference.of(parts, count), wanted)
        print(f"wrote {file}: statistics of {count:,} images")
    else:
        for _ in parts:  # this process's share of the work
            pass
    processes.wait_for_everyone()
    return load_reference(file)[0]


# --- files


@dataclass(frozen=True)
class DataSet:
    """What the record of statistics says of a data set."""

    name: str
    split: str
    image_column: str
    resolution: int


@dataclass(frozen=True)
class MadeFrom:
    """The record in a file of statistics; empty if pytorch_fid wrote the file."""

    features: str | None = None  # inception or classifier
    classifier: str | None = None  # SHA-256
    data: DataSet | None = None
    size: list[int] | None = None  # of the images of a folder: width, height


def _check_comparable(record: Record, features: dict[str, str], data: Data) -> str:
    """Check that given statistics fit the configuration; what their record says of them, for a message.

    Args:
        features: as `reference_statistics` takes them.
    """
    name = features["features"]
    if not record.made_from and name == "inception":
        return "has no record: taken for statistics that pytorch_fid made; of which images, at which size, is not known"
    made = checked(record.made_from, MadeFrom)
    if made.features != name:
        network = shown(made.features) if made.features is not None else "a network that it does not name"
        raise UserError(f"holds statistics in the features of {network}, not of evaluate.features={name}")
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
    """Write pytorch_fid's npz format, with the features, and the record as JSON."""
    arrays = {"mu": reference.mu, "sigma": reference.sigma, "features": reference.features}
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, made_from=np.array(json.dumps(record.made_from)))


def load_reference(path: Path) -> tuple[Reference, Record]:
    """The statistics in an npz file, and their record (empty if the file has none)."""
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
        _check_statistics(reference)
        return replace(reference, size=size), Record(STATISTICS, made_from)
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and their decompressors raise whatever a damaged file leads to
        raise UserError(f"not an npz file of mu and sigma ({one_line(error)}): {HOW}") from None


def _check_statistics(reference: Reference) -> None:
    mu, sigma, features = reference.mu, reference.sigma, reference.features
    given = [array for array in (mu, sigma, features) if array is not None]
    are_numbers = all(np.issubdtype(a.dtype, np.floating) and (np.abs(a) < LARGEST).all() for a in given)
    features_fit = features is None or (features.ndim == 2 and features.shape[1:] == mu.shape)
    if not (mu.ndim == 1 and mu.size > 0 and sigma.shape == 2 * mu.shape and are_numbers and features_fit):
        raise UserError(f"mu of shape {mu.shape} and sigma of shape {sigma.shape} are no statistics: {HOW}")
    scale = np.abs(sigma).max()
    if (np.diagonal(sigma) < 0).any() or np.abs(sigma - sigma.T).max() > 1e-3 * scale:
        raise UserError(f"sigma is no covariance: {HOW}")
