"""Fréchet distances between sets of images: FID in pytorch_fid's Inception features, classifier FD in our own."""

import functools
import json
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from deme.config import UserError
from deme.files import atomic_file


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
        UserError: the weights are not on this machine and can't be downloaded; says where to put them.
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
    return InceptionFeatures(network).eval()


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def save_statistics(path: Path, mu: np.ndarray, sigma: np.ndarray, made_from: dict) -> None:
    """pytorch_fid's npz format, and what the statistics were made from as JSON."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=mu, sigma=sigma, made_from=np.array(json.dumps(made_from)))


def load_statistics(path: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """μ (D,), Σ (D, D) and what they were made from ({} where the file does not say).

    Raises:
        UserError: not an npz file that holds mu and sigma.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            made_from = json.loads(str(file["made_from"])) if "made_from" in file else {}
            return file["mu"], file["sigma"], made_from
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
        raise UserError(f"{path}: not an npz file of mu and sigma: {error}") from None
