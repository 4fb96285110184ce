"""Distances between sets of images in feature space: Fréchet, kernel, precision and recall.

In pytorch_fid's Inception features the first two are FID and KID; in those of our own classifier they are called
classifier FD and classifier KID.
"""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from deme.config import UserError
from deme.files import atomic_file

REFERENCE_FEATURES = 10_000  # images whose features are kept for the scores that need more than mean and covariance
KERNEL_SUBSET = 1_000  # images, as Bińkowski et al. 2018
NEIGHBORHOOD = 3  # Kynkäänniemi et al. 2019


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        mu: mean of the features, float64, shape (D,).
        sigma: their covariance, float64, shape (D, D).
        features: of up to REFERENCE_FEATURES images in random order, float32, shape (M, D); None: not at hand.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None

    @classmethod
    def of(cls, parts: Iterable[np.ndarray], count: int) -> "Reference":
        """From the features of all images in parts (n, D) that are read one after another, `count` together."""
        chosen = np.random.default_rng(0).permutation(count)[:REFERENCE_FEATURES]
        start, total, scatter, kept = 0, 0.0, 0.0, {}
        for part in parts:
            wide = part.astype(np.float64)
            mu = wide.mean(axis=0)
            if start > 0:  # Chan, Golub and LeVeque 1983: the squares about the mean of both
                difference = mu - total / start
                scatter = scatter + np.outer(difference, difference) * (start * len(part) / (start + len(part)))
            total, scatter = total + wide.sum(axis=0), scatter + (wide - mu).T @ (wide - mu)
            kept |= {i: part[i - start] for i in chosen if start <= i < start + len(part)}
            start += len(part)
        return cls(total / count, scatter / (count - 1), np.stack([kept[i] for i in chosen]))


def kernel_distances(features: np.ndarray, reference: np.ndarray, subset_size: int) -> np.ndarray:
    """KID of disjoint subsets: unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018), by torch-fidelity.

    Their mean is the KID, their standard deviation over the square root of their number its standard error, for the
    given reference images, whose subsets take turns. What is left over is not used.

    Args:
        features: shape (N, D), N ≥ subset_size.
        reference: shape (M, D), M ≥ subset_size.

    Returns:
        float64, shape (N // subset_size,).
    """
    from torch_fidelity.metric_kid import kernel_mmd

    subsets, others = (
        np.split(x[: len(x) // subset_size * subset_size].astype(np.float64), len(x) // subset_size)
        for x in (features, reference)
    )
    return np.array([kernel_mmd(subset, others[i % len(others)]) for i, subset in enumerate(subsets)])


def kernel_subset_size(images: int, reference_images: int) -> int:
    """KERNEL_SUBSET, or a tenth of the images where they are few: the KID has no bias that depends on it."""
    return max(2, min(KERNEL_SUBSET, images // 10, reference_images // 10))


def precision_and_recall(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The shares of samples near real images and of real images near samples, by torch-fidelity.

    Near: within the distance from the other set's image to its third-nearest neighbour (Kynkäänniemi et al. 2019).

    Args:
        features: shape (N, D), N > 3; the first REFERENCE_FEATURES count.
        reference: shape (M, D), M > 3.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    pair = (torch.from_numpy(part[:REFERENCE_FEATURES]) for part in (features, reference))
    return calculate_precision_recall_part(*pair, NEIGHBORHOOD, batch_size=1_000)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 √(Σ₁Σ₂)) (Dowson and Landau 1982), in float64.

    tr √(Σ₁Σ₂) is the sum of the square roots of the eigenvalues of Σ₁Σ₂, which are real and not negative up to
    rounding; unlike the matrix square root this is stable where features are dead or correlated.

    Args:
        mu1, mu2: means, shape (D,).
        sigma1, sigma2: covariances, shape (D, D).
    """
    eigenvalues = np.linalg.eigvals(sigma1 @ sigma2).real
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(np.square(mu1 - mu2).sum() + trace)


def inception_frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The same quantity by pytorch_fid's own function, so that FIDs agree with `python -m pytorch_fid`."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    return float(calculate_frechet_distance(mu1, sigma1, mu2, sigma2))


class InceptionFeatures(nn.Module):
    """pytorch_fid's Inception features, fed as pytorch_fid does: images scaled to [0, 1]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → float32 (B, 2048)."""
        return self.network(pixels.float() / 255)[0].flatten(1)


def load_inception() -> InceptionFeatures:
    """pytorch_fid's feature network in eval mode, its weights downloaded once into torch hub's folder.

    Raises:
        UserError: the weights are not on this machine and can't be downloaded, or are damaged; names the file.
    """
    from pytorch_fid import inception

    # pytorch_fid would unpickle the downloaded file; it holds plain tensors, so weights_only loads it
    inception.load_state_dict_from_url = functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(inception.FID_WEIGHTS_URL).name
    try:
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    except OSError as error:
        raise UserError(
            f"evaluate.features=inception: the Inception weights can't be downloaded ({error}); "
            f"put {inception.FID_WEIGHTS_URL} into {file.parent}"
        ) from None
    except (RuntimeError, EOFError, UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: not the Inception weights ({reason}); delete it to download them again") from None
    return InceptionFeatures(network).eval()


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def save_reference(path: Path, reference: Reference, made_from: dict) -> None:
    """pytorch_fid's npz format, with the features, and what all was made from as JSON."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=reference.mu,
            sigma=reference.sigma,
            features=reference.features,
            made_from=np.array(json.dumps(made_from)),
        )


def load_reference(path: Path) -> tuple[Reference, dict]:
    """The statistics in an npz file, and what they were made from ({} where the file does not say).

    Raises:
        UserError: not an npz file that holds mu (D,) and sigma (D, D).
    """
    how = "`python -m pytorch_fid --save-stats IMAGES FILE.npz` makes such a file"
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise UserError(f"{path}: a single array; an npz file of mu and sigma is needed: {how}")
        with content as file:
            made_from = json.loads(str(file["made_from"])) if "made_from" in file else {}
            reference = Reference(file["mu"], file["sigma"], file.get("features"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
        raise UserError(f"{path}: not an npz file of mu and sigma ({error}): {how}") from None
    mu, sigma = reference.mu, reference.sigma
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: mu of shape {mu.shape} and sigma of shape {sigma.shape} are no statistics: {how}")
    return reference, made_from
