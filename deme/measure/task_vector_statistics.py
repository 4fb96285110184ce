"""What finetuning changed in the weights: norms, cosines, values (the paper's figure 6b) and signs of task vectors."""

from collections.abc import Mapping

import numpy as np
import torch

from deme.job.arrays import Arrays
from deme.method.coefficients import pattern_of, patterns_of
from deme.method.task_vectors import Tensors

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_VALUES = 2**18  # of a tensor, evenly spread, that quantiles are taken of


@torch.no_grad()
def task_vector_statistics(pretrained: Tensors, networks: Mapping[str, Tensors]) -> Arrays:
    """Statistics of the task vectors τ = network − pretrained, by block; tensor by tensor, so that memory is bounded.

    Args:
        networks: name → state dict, of the pretrained tensors' names and shapes; N of them.

    Returns:
        groups: names of the blocks, shape (G,); what is outside of all blocks is one more.
        sizes: numbers of parameters, shape (G,).
        products: inner products of the task vectors, float64, shape (G, N, N).
        squares: of the pretrained weights, their sum, shape (G,).
        opposed: how many parameters two task vectors move in opposite directions, shape (G, N, N).
        moved: how many both move, shape (G, N, N).
        quantiles: QUANTILES of the task vectors' values, shape (G, N, 5).
    """
    patterns = patterns_of("block", list(pretrained))
    count = len(networks)
    products = np.zeros((len(patterns), count, count))
    opposed, moved = np.zeros_like(products), np.zeros_like(products)
    squares, sizes = np.zeros(len(patterns)), np.zeros(len(patterns), dtype=np.int64)
    values: list[list[np.ndarray]] = [[] for _ in patterns]
    for name, base in pretrained.items():
        group = patterns.index(pattern_of(name, patterns))
        vectors = torch.stack([(tensors[name].float() - base.float()).flatten() for tensors in networks.values()])
        wide = vectors.double()
        products[group] += (wide @ wide.T).numpy()
        signs = vectors.sign()
        agreeing = (signs @ signs.T).double().numpy()  # those that agree, less those that do not
        both = signs.abs() @ signs.abs().T
        moved[group] += both.double().numpy()
        opposed[group] += (both.double().numpy() - agreeing) / 2
        squares[group] += float(base.double().square().sum())
        sizes[group] += base.numel()
        values[group].append(vectors[:, :: -(-base.numel() // MOST_VALUES)].numpy())
    return {
        "groups": np.array([name.removesuffix(".*").replace("*", "rest") for name in patterns]),
        "sizes": sizes,
        "products": products,
        "squares": squares,
        "opposed": opposed,
        "moved": moved,
        "quantiles": np.stack([np.quantile(np.concatenate(v, axis=1), QUANTILES, axis=1).T for v in values]),
    }


def norms(products: np.ndarray) -> np.ndarray:
    """Of the task vectors, from their inner products of shape (…, N, N): shape (…, N)."""
    return np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))


def cosines(products: np.ndarray) -> np.ndarray:
    """Of pairs of task vectors, same shape; NaN where one is zero."""
    lengths = norms(products)
    lengths = np.where(lengths > 0, lengths, np.nan)
    return products / lengths[..., :, None] / lengths[..., None, :]


def opposed_shares(opposed: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Of the parameters that both task vectors move, the share that they move in opposite directions; same shape."""
    return opposed / np.where(moved > 0, moved, np.nan)
