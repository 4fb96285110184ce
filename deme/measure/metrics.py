"""Distances between sets of images in feature space: Fréchet, kernel, precision and recall.

In pytorch_fid's Inception features the first two are FID and KID; in those of our own classifier they are called
classifier FD and classifier KID.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from deme.errors import UserError

KEPT_FEATURES = 10_000  # images whose features are kept, and that precision and recall look at
KERNEL_SUBSET = 1_000  # images, as Bińkowski et al. 2018
NEIGHBORHOOD = 3  # Kynkäänniemi et al. 2019


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: statistics of the features of reference images.

    Args:
        mu: mean of the features, float64, shape (D,).
        sigma: their covariance, float64, shape (D, D).
        features: of up to KEPT_FEATURES images in random order, float32, shape (M, D); None: unknown.
        size: of the images, [width, height] in pixels; None: unknown.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None
    size: list[int] | None = None

    def check_size(self, width: int, height: int) -> None:
        """Refuse images of another size: the feature network would scale one of the two, which changes the score."""
        if self.size not in (None, [width, height]):
            mine = "{} x {}".format(*self.size)
            raise UserError(
                f"images of {width} x {height} pixels, a reference of {mine} pixels: scores would not compare"
            )

    @classmethod
    def of(cls, parts: Iterable[np.ndarray], count: int) -> "Reference":
        """The statistics of `count` images, whose features come in parts of shape (n, D)."""
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


def kernel_distances(
    features: np.ndarray, reference: np.ndarray, subset_size: int, first_reference: int = 0
) -> np.ndarray:
    """KID of disjoint subsets: unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018), by torch-fidelity.

    Their mean is the KID, their standard deviation over the square root of their number its standard error, for the
    given reference images, whose subsets take turns. What is left over is not used.

    Args:
        features: shape (N, D), N ≥ subset_size.
        reference: shape (M, D), M ≥ subset_size.
        first_reference: which of its subsets the first one is compared with.

    Returns:
        float64, shape (N // subset_size,).
    """
    from torch_fidelity.metric_kid import kernel_mmd

    subsets, others = (
        np.split(x[: len(x) // subset_size * subset_size].astype(np.float64), len(x) // subset_size)
        for x in (features, reference)
    )
    return np.array(
        [kernel_mmd(subset, others[(first_reference + i) % len(others)]) for i, subset in enumerate(subsets)]
    )


def kernel_subset_size(images: int, reference_images: int) -> int:
    """KERNEL_SUBSET, or all of the images and half of the reference where they are fewer.

    The KID has no bias that depends on it, and its standard error falls with the size itself but only with the square
    root of the number of subsets.
    """
    return max(2, min(KERNEL_SUBSET, images, reference_images // 2))


def precision_and_recall(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The shares of samples near real images and of real images near samples, by torch-fidelity.

    Near: within the distance from the other set's image to its third-nearest neighbour (Kynkäänniemi et al. 2019).

    Args:
        features: shape (N, D), N > 3; the first KEPT_FEATURES count.
        reference: shape (M, D), M > 3.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    pair = (torch.from_numpy(part[:KEPT_FEATURES]) for part in (features, reference))
    return calculate_precision_recall_part(*pair, NEIGHBORHOOD, batch_size=1_000)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 √(Σ₁Σ₂)) (Dowson and Landau 1982), in float64.

    With Σ₁ = A Aᵀ, tr √(Σ₁Σ₂) is the sum of the square roots of the eigenvalues of the symmetric AᵀΣ₂A, which are those
    of Σ₁Σ₂. Unlike the matrix square root this is stable where features are dead or correlated.

    Args:
        mu1, mu2: means, shape (D,).
        sigma1, sigma2: covariances, shape (D, D).
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    eigenvalues = np.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(np.square(mu1 - mu2).sum() + trace)


def inception_frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The same quantity by pytorch_fid's own function, so that FIDs agree with `python -m pytorch_fid`."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    return float(calculate_frechet_distance(mu1, sigma1, mu2, sigma2))


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)
