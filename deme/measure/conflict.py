"""Gradient conflict, the paper's figure 1a: do the losses at two timesteps pull the weights the same way?"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from deme.data.images import Stream
from deme.job.arrays import Arrays, Keep
from deme.measure.noisy import Batch, CleanImages
from deme.method.coefficients import pattern_of, patterns_of

SKETCH = 7  # what a generator is for; the others are in data/draws.py and noisy.py


def gradient_conflict(
    network: nn.Module, images: CleanImages, timesteps: Sequence[int], size: int, accelerator: Accelerator, keep: Keep
) -> Arrays:
    """Inner products of the denoising loss's gradients at n timesteps, for two independent halves of the images.

    Only one gradient is in memory at a time: of each, a sketch is kept for every block of the network.

    Args:
        network: in eval mode; its parameters need gradients.
        images: an even number of them.
        size: dimensions of a block's sketch.
        keep: called for each timestep.

    Returns:
        products: float64, shape (G, 2, n, 2, n): group of layers, half and timestep of one gradient, of the other.
        groups: their names, shape (G,).
        exact: bool, shape (G,): the group has no more parameters than the sketch, which is then the gradient itself.
    """
    groups = parameter_groups(network)
    sizes = {name: sum(parameter.numel() for parameter in group) for name, group in groups.items()}
    widths = [min(size, count) for count in sizes.values()]

    def of_timestep(timestep: int) -> Arrays:
        half = images.count // 2
        halves = []
        for among in (range(half), range(half, 2 * half)):
            fill_gradients(network, (batch for _, batch in images.at(timestep, among)), half)
            halves.append(gradient_sketch(groups.values(), size, images.stream))
        network.zero_grad()
        return {"sketches": accelerator.reduce(torch.stack(halves), "sum").cpu().numpy()}

    kept = [keep(f"{t:04d}", lambda t=t: of_timestep(t))["sketches"] for t in timesteps]
    vectors = np.stack(kept, axis=1).astype(np.float64)  # (2, n, sum of widths)
    parts = np.split(vectors, np.cumsum(widths)[:-1], axis=2)
    return {
        "products": np.stack([np.einsum("htd,kud->htku", part, part, optimize=True) for part in parts]),
        "groups": np.array([name.removesuffix(".*").replace("*", "rest") for name in groups]),
        "exact": np.array([count <= size for count in sizes.values()]),
    }


def parameter_groups(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Name pattern → the parameters of a block of a UNet; those outside of all blocks are one more group."""
    named = dict(network.named_parameters())
    patterns = patterns_of("block", sorted(named))  # down, mid, up, rest
    groups: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in patterns}
    for name, parameter in named.items():
        groups[pattern_of(name, patterns)].append(parameter)
    return groups


def fill_gradients(network: nn.Module, batches: Iterable[Batch], count: int) -> None:
    """Give the parameters this process's part of the gradient of the mean denoising loss over `count` images."""
    network.zero_grad()
    for batch in batches:
        (batch.losses(network).sum() / count).backward()


def gradient_sketch(groups: Iterable[Sequence[nn.Parameter]], size: int, stream: Stream) -> torch.Tensor:
    """The sketches of all groups of parameters' gradients after one another: float32, shape (sum of their widths,).

    Args:
        stream: with a group's number it determines the random signs and places, which are drawn anew each time.
    """
    parts = []
    for number, group in enumerate(groups):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        parts.append(count_sketch(gradients, size, np.random.default_rng((*stream, SKETCH, number))))
    return torch.cat(parts).float()


def count_sketch(tensors: Sequence[torch.Tensor], size: int, random: np.random.Generator) -> torch.Tensor:
    """A vector's sketch in `size` dimensions: inner products of two sketches estimate those of the vectors.

    Each element is added, with a random sign, to one of the sketch's (Charikar, Chen and Farach-Colton 2002). Two
    elements meet there with a probability of at most 1 / size, so that ⟨Sx, Sy⟩ has the mean ⟨x, y⟩ and a standard
    deviation of at most √(2 / size) · ‖x‖ · ‖y‖. A vector of at most `size` elements stays as it is.

    Args:
        tensors: the vector, in parts.

    Returns:
        float64, shape (min(size, number of elements),).
    """
    if sum(tensor.numel() for tensor in tensors) <= size:
        return torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    sketch = torch.zeros(size, dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        values = tensor.detach().flatten().double()
        # rows of `size` elements, each rotated by a random number of places: elements of one row never meet
        rows = -(-len(values) // size)
        offsets = torch.from_numpy(random.integers(size, size=rows)).to(values.device)
        bits = np.unpackbits(np.frombuffer(random.bytes(rows * size // 8 + 1), np.uint8), count=len(values))
        numbers = torch.arange(len(values), device=values.device)
        places = (numbers + offsets[numbers // size]) % size
        sketch.index_add_(0, places, torch.where(torch.from_numpy(bits).to(values.device) == 1, values, -values))
    return sketch


def measured_cosines(products: np.ndarray) -> np.ndarray:
    """Cosines of the gradients over all images, shape (n, n); the noise of few images pulls them to zero.

    Args:
        products: shape (2, n, 2, n), of one group or the sum of several.
    """
    total = products.sum(axis=(0, 2))
    return _cosines(total, np.diagonal(total))


def corrected_cosines(products: np.ndarray) -> np.ndarray:
    """Cosines without the bias of sampling noise, shape (n, n); NaN where a gradient can't be told from noise.

    Of the halves' gradients g_A and g_B, whose noise is independent, ⟨g_A(s), g_B(t)⟩ has the mean ⟨g(s), g(t)⟩, also
    for s = t: the cosine is ½ (⟨g_A(s), g_B(t)⟩ + ⟨g_B(s), g_A(t)⟩) / √(⟨g_A(s), g_B(s)⟩ ⟨g_A(t), g_B(t)⟩).

    Args:
        products: as `measured_cosines` takes them.
    """
    crossed = (products[0, :, 1] + products[1, :, 0]) / 2
    return _cosines(crossed, np.diagonal(crossed))


def _cosines(products: np.ndarray, squares: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.where(squares > 0, squares, np.nan))
    return products / norms[:, None] / norms[None, :]


def products_of_ranges(products: np.ndarray, timesteps: np.ndarray, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Inner products of the N ranges' gradients, each the sum over the timesteps of a range: shape (…, 2, N, 2, N).

    They are what finetuning on a range begins with, and easier to tell from noise than those of single timesteps.

    Args:
        products: shape (…, 2, n, 2, n).
        timesteps: shape (n,).
    """
    inside = np.array([(timesteps >= low) & (timesteps < high) for low, high in ranges], dtype=np.float64)
    return np.einsum("rt,...htku,su->...hrks", inside, products, inside, optimize=True)


def pairs_within(timesteps: np.ndarray, low: int, high: int) -> np.ndarray:
    """A mask of shape (n, n): pairs s < t of timesteps in [low, high)."""
    inside = (timesteps >= low) & (timesteps < high)
    return np.triu(inside[:, None] & inside[None, :], k=1)
