"""The denoising loss of several networks at the same timesteps, on the same noisy images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from deme.measure.noisy import CleanImages

MOST_BLOCKS = 8  # of images, whose spread gives the standard errors
Range = tuple[int, int]  # [low, high)


@dataclass(frozen=True)
class Relative:
    """A mean that is 1 for the pretrained network."""

    mean: np.ndarray
    error: np.ndarray  # standard error, of the same shape; NaN where there is a single block of images


@torch.no_grad()
def losses_by_timestep(
    network: nn.Module, images: CleanImages, timesteps: Sequence[int], accelerator: Accelerator
) -> np.ndarray:
    """The loss of each image at each of n timesteps: float64, shape (n, images), the same in every process."""
    device = accelerator.device
    losses = torch.zeros(len(timesteps), images.count, dtype=torch.float64, device=device)
    for row, timestep in zip(losses, timesteps, strict=True):
        for places, batch in images.at(timestep, range(images.count)):
            row[places] = batch.losses(network).double()
    return accelerator.reduce(losses, "sum").cpu().numpy()


def ensemble_losses(experts: Sequence[np.ndarray], timesteps: Sequence[int], ranges: Sequence[Range]) -> np.ndarray:
    """Those of the ensemble, which at each timestep are its range's expert's: shape (n, images).

    Args:
        experts: as `losses_by_timestep` gives them, in the order of the ranges.
    """
    numbers = [next(k for k, (low, high) in enumerate(ranges) if low <= t < high) for t in timesteps]
    return np.stack([experts[number][row] for row, number in enumerate(numbers)])


def relative_loss(losses: np.ndarray, pretrained: np.ndarray) -> Relative:
    """The mean loss at each timestep, relative to the pretrained network's on the same noisy images: shapes (n,).

    Args:
        losses, pretrained: shape (n, images).
    """
    ratios = _block_ratios(losses, pretrained)
    return Relative(losses.mean(axis=1) / pretrained.mean(axis=1), _error(ratios))


def relative_means(
    losses: np.ndarray, pretrained: np.ndarray, timesteps: np.ndarray, ranges: Sequence[Range]
) -> Relative:
    """The relative losses' means over the timesteps of each range, and last over all timesteps: shapes (ranges + 1,).

    They are means of the ratios: the ratio of the means would be that of the lowest timesteps, whose loss is largest.

    Args:
        losses, pretrained: shape (n, images).
        timesteps: shape (n,).
    """
    total = (0, max(high for _, high in ranges))
    chosen = [(timesteps >= low) & (timesteps < high) for low, high in [*ranges, total]]
    by_timestep = losses.mean(axis=1) / pretrained.mean(axis=1)
    ratios = _block_ratios(losses, pretrained)
    return Relative(
        np.array([by_timestep[part].mean() for part in chosen]),
        np.array([_error(ratios[part].mean(axis=0)) for part in chosen]),
    )


def relative_rows(
    losses: Mapping[str, np.ndarray], timesteps: np.ndarray, ranges: Sequence[Range]
) -> dict[str, Relative]:
    """`relative_means` of every model; the pretrained one is among them."""
    return {name: relative_means(found, losses["pretrained"], timesteps, ranges) for name, found in losses.items()}


def _block_ratios(losses: np.ndarray, pretrained: np.ndarray) -> np.ndarray:
    """The relative loss at each timestep in each block of images: shape (n, blocks)."""
    blocks = np.array_split(np.arange(losses.shape[1]), min(MOST_BLOCKS, losses.shape[1]))
    return np.stack([losses[:, part].mean(axis=1) / pretrained[:, part].mean(axis=1) for part in blocks], axis=1)


def _error(ratios: np.ndarray) -> np.ndarray:
    """The standard error of the mean over the last axis."""
    count = ratios.shape[-1]
    return ratios.std(axis=-1, ddof=1) / count**0.5 if count > 1 else np.full(ratios.shape[:-1], np.nan)
