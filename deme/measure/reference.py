"""What samples are compared in and with: a feature network, and statistics in pytorch_fid's npz format."""

import hashlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deme.config.experiment import Config
from deme.config.judges import Judge
from deme.config.sections import LEAST_CLASSIFIED
from deme.data.decoding import Source, available_threads
from deme.data.examples import load_evaluation_images
from deme.data.opening import data_hashes, open_source
from deme.data.samples import check_sizes, list_images, read_images
from deme.errors import UserError, naming, one_line
from deme.job.files import LARGEST, atomic_file, checked, make_folder, sha256
from deme.job.processes import Processes, locked_by_all
from deme.job.records import arrays_hash
from deme.measure.features import Inception, check_classified, extract, trained_classifier
from deme.measure.judges import LocalNetwork
from deme.measure.scores import FeatureSpace, Reference

PART = 50_000  # images whose features are in memory at once
IMAGES = "images (SHA-256)"  # of a folder
HOW = "`python -m pytorch_fid --save-stats IMAGES FILE.npz` makes such a file"
OpenData = Callable[[], Source]  # opens the configured data the first time
# the number of images, what reads a slice of them as uint8 RGB (B, 3, H, W), and the threads that read ahead
Images = tuple[int, Callable[[slice], torch.Tensor], int]


def load_feature_space(config: Config, processes: Processes, judge: Judge) -> FeatureSpace:
    """The feature space of a judge, made once and kept in stats/. If another job is making it, wait for that job."""
    name, accuracy = judge.name, None
    features = {"features": name}
    open_data = cache(lambda: open_source(config.data))  # a given file of statistics may need none
    with locked_by_all(processes, config.paths.stats, "output_dir", wait=True):
        make_folder(config.paths.stats, "output_dir")
        if name == "inception":
            with processes.main_process_first(), naming("evaluate.features", name):
                network = Inception().to(processes.device)  # one process downloads the weights
        elif name == "classifier":
            network, accuracy = trained_classifier(config, processes, open_data())
            features["classifier"] = sha256(config.paths.classifier)
            processes.print(f"classifier: held-out accuracy {accuracy:.1%}")
        else:
            network = LocalNetwork(judge).to(processes.device)
            features |= {"weights (SHA-256)": judge.digest, "preprocessing": str(network.prepare)}
        reference = reference_statistics(config, processes, network, features, open_data)
    if name == "classifier":  # not of its file, whose header has no certain order: other runs have the same classifier
        features["classifier"] = arrays_hash({key: value.cpu().numpy() for key, value in network.state_dict().items()})
    return FeatureSpace(name, network, reference, accuracy, features)


def reference_statistics(
    config: Config, processes: Processes, network: nn.Module, features: dict[str, str], open_data: OpenData
) -> Reference:
    """The statistics in the file evaluate.reference, or those of its images or of the data.

    The latter are kept in a file, and made again if they are of other images or features, or damaged. `features` has
    the space's name, and what else determines the network, such as the SHA-256 of a classifier.
    """
    file = config.paths.reference_in(features["features"])
    if config.evaluate.reference is not None and not file.is_dir():
        with naming("evaluate.reference", config.evaluate.reference):
            return _given(file, processes, network, features, open_data)
    file, made_from, open_images = _images(config, open_data, features["features"])
    made_from |= features
    if file.exists():
        try:
            saved, saved_from = load_reference(file)
            if saved_from == made_from and saved.features is not None:
                return saved
        except UserError as error:
            processes.print(f"{file}: unreadable, made anew ({error})")
    count, read, threads = open_images()
    images = (range(count)[start : start + PART] for start in range(0, count, PART))
    parts = (extract(processes, network, read, part, config.evaluate.batch_size, threads) for part in images)
    if processes.is_main_process:
        save_reference(file, Reference.of(parts, count), made_from)
        print(f"wrote {file}: statistics of {count:,} images")
    else:
        deque(parts, maxlen=0)  # this process's share of the work
    processes.wait_for_everyone()
    return load_reference(file)[0]


def _images(config: Config, open_data: OpenData, space: str) -> tuple[Path, dict[str, Any], Callable[[], Images]]:
    """What statistics are made of, the data or the folder evaluate.reference: the file to keep them, record, images."""
    if config.evaluate.reference is None:
        source, cache_folder = open_data(), config.paths.image_cache
        record = {"data": source.data.tagged("statistics"), **data_hashes(source, cache_folder)}

        def decoded() -> Images:
            images, _ = load_evaluation_images(source, cache_folder)
            if len(images) < 2:
                raise UserError(f"data.name={config.data.name}: {len(images)} image, statistics need at least 2")
            return len(images), lambda part: images.batch(range(part.start, part.stop)), images.threads

        return config.paths.reference_in(space), record, decoded
    folder = config.paths.reference
    with naming("evaluate.reference", config.evaluate.reference):
        paths = list_images(folder)
        size = check_sizes(paths)
        if len(paths) < 2:
            raise UserError(f"{len(paths)} image, statistics need at least 2")
        check_classified(space, *size)
    images = (len(paths), lambda part: read_images(paths[part]), available_threads())
    return config.paths.stats / f"{space}-folder.npz", {"size": [*size], IMAGES: content_hash(folder)}, lambda: images


def content_hash(path: Path) -> str:
    """The SHA-256 of a file, or of the images directly in a folder."""
    if path.is_dir():
        return hashlib.sha256("".join(map(sha256, list_images(path))).encode()).hexdigest()
    return sha256(path)


def _given(
    file: Path, processes: Processes, network: nn.Module, features: dict[str, str], open_data: OpenData
) -> Reference:
    """The statistics in a file, if they fit the configuration; prints what their record says of them."""
    name = features["features"]
    reference, made_from = load_reference(file)
    image = torch.zeros(1, 3, LEAST_CLASSIFIED, LEAST_CLASSIFIED, dtype=torch.uint8, device=processes.device)
    with torch.inference_mode():
        count = network.features(image).shape[1]
    if len(reference.mu) != count:
        raise UserError(f"holds statistics of {len(reference.mu)} features, {name} has {count}")
    made = checked(made_from, MadeFrom)
    if not made_from and name == "inception":
        text = "has no record: taken for statistics that pytorch_fid made; of which images, at which size, is not known"
    elif made.features != name:
        theirs = made.features or "a network that it does not name"
        raise UserError(f"holds statistics in the features of {theirs}, not of evaluate.features={name}")
    elif made.classifier != features.get("classifier"):
        raise UserError("holds statistics in the features of another classifier than this run's, so they don't compare")
    elif made.data is None:
        text = "statistics of a folder of images"
    else:
        text = f"statistics of {made.data.name}, split {made.data.split}, {made.data.resolution} pixels"
        data = open_data().data
        for key in ("split", "image_column") if made.data.name == data.name else ():
            theirs, ours = getattr(made.data, key), getattr(data, key)
            if theirs != ours:
                raise UserError(f"holds statistics of data.{key}={theirs}, not of data.{key}={ours}")
    processes.print(f"{file}: {text}")
    return reference


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

    features: str | None = None  # the name of the space
    classifier: str | None = None  # SHA-256
    data: DataSet | None = None
    size: list[int] | None = None  # of the images of a folder: width, height


def save_reference(path: Path, reference: Reference, made_from: dict[str, Any]) -> None:
    """Write pytorch_fid's npz format, with the features, and the record as JSON."""
    arrays = {"mu": reference.mu, "sigma": reference.sigma, "features": reference.features}
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, made_from=np.array(json.dumps(made_from)))


def load_reference(path: Path) -> tuple[Reference, dict[str, Any]]:
    """The statistics in an npz file, and their record (empty if the file has none)."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise UserError("a single array")
        with content as file:
            made_from = json.loads(str(file["made_from"])) if "made_from" in file else {}
            mu, sigma = np.asarray(file["mu"]), np.asarray(file["sigma"])  # bytes, if they are in no .npy
            features = np.asarray(file["features"]) if "features" in file else None
    except Exception as error:  # numpy, zipfile and their decompressors raise whatever a damaged file leads to
        raise UserError(f"not an npz file of mu and sigma ({one_line(error)}): {HOW}") from None
    made = checked(made_from, MadeFrom, "made_from")
    size = made.size if made.data is None else 2 * [made.data.resolution]
    if size is not None and len(size) != 2:
        raise UserError(f"made_from.size is {size}, not a width and a height")
    given = [array for array in (mu, sigma, features) if array is not None]
    are_numbers = all(np.issubdtype(a.dtype, np.floating) and (np.abs(a) < LARGEST).all() for a in given)
    features_fit = features is None or (features.ndim == 2 and features.shape[1:] == mu.shape)
    if not (mu.ndim == 1 and mu.size > 0 and sigma.shape == 2 * mu.shape and are_numbers and features_fit):
        raise UserError(f"mu of shape {mu.shape} and sigma of shape {sigma.shape} are no statistics: {HOW}")
    if (np.diagonal(sigma) < 0).any() or np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max():
        raise UserError(f"sigma is no covariance: {HOW}")
    return Reference(mu, sigma, features, size), made_from
