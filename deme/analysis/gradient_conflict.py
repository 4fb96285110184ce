"""Gradient conflict, the paper's figure 1a: do the losses at two timesteps pull the weights the same way?"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde
from torch import nn

from deme.analysis.material import Material
from deme.analysis.task_vectors import block_name, cosines
from deme.data.images import Stream
from deme.job.arrays import Arrays, Keep
from deme.job.processes import Processes
from deme.measure.noisy import CleanImages
from deme.method.coefficients import pattern_of, patterns_of
from deme.report.figures import BLACK, COLOURS, DASHES, UNKNOWN, cosine_maps, noted
from deme.report.tables import headed_table, markdown_table, mean_of, number

SKETCH = 7  # purpose of a generator; deme/data/images.py and deme/measure/noisy.py have the others
FARTHEST = 1.5  # from 0, that a noise-corrected cosine is drawn; most are in [−1, 1]
FEWEST_PAIRS = 8  # of timesteps for a density
Range = tuple[int, int]


def measure(material: Material) -> Arrays:
    """Inner products of the pretrained network's gradients at all timesteps."""

    def make(keep: Keep) -> Arrays:
        network = material.load(material.networks["pretrained"]).requires_grad_(True)
        images = material.clean(material.data.training, 0)
        size = material.settings.sketch
        found = gradient_products(network, images, material.timesteps, size, material.processes, keep)
        return found | {"images": np.array(images.count)}

    return material.keep("gradient_conflict", ["pretrained"], ("timesteps", "images", "sketch"), make)


def gradient_products(
    network: nn.Module, images: CleanImages, timesteps: Sequence[int], size: int, processes: Processes, keep: Keep
) -> Arrays:
    """Inner products of the denoising loss's gradients at n timesteps, for two independent halves of the images.

    Only one gradient is in memory at a time. A sketch of each is kept for every block of the network.

    Args:
        images: an even number.
        size: dimensions of a block's sketch.

    Returns:
        products: float64, shape (G, 2, n, 2, n): block, half and timestep of one gradient, of the other.
        groups: names of the G blocks, the layers outside of all blocks being one more.
        exact: bool, shape (G,): the block has no more parameters than the sketch, which then is the gradient itself.
    """
    named = dict(network.named_parameters())
    patterns = patterns_of("block", sorted(named))  # down, mid, up, rest
    groups: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in patterns}
    for name, parameter in named.items():
        groups[pattern_of(name, patterns)].append(parameter)
    sizes = [sum(parameter.numel() for parameter in group) for group in groups.values()]
    half = images.count // 2

    def of_timestep(timestep: int) -> Arrays:
        halves = []
        for among in (range(half), range(half, 2 * half)):
            network.zero_grad()
            for _, batch in images.at(timestep, among):
                (batch.losses(network).sum() / half).backward()
            halves.append(gradient_sketch(groups.values(), size, images.stream))
        network.zero_grad()
        return {"sketches": processes.reduce(torch.stack(halves), "sum").cpu().numpy()}

    kept = [keep(f"{t:04d}", lambda t=t: of_timestep(t))["sketches"] for t in timesteps]
    vectors = np.stack(kept, axis=1).astype(np.float64)  # (2, n, sum of the sketches' lengths)
    parts = np.split(vectors, np.cumsum([min(size, count) for count in sizes])[:-1], axis=2)
    return {
        "products": np.stack([np.einsum("htd,kud->htku", part, part, optimize=True) for part in parts]),
        "groups": np.array([block_name(pattern) for pattern in patterns]),
        "exact": np.array([count <= size for count in sizes]),
    }


def gradient_sketch(groups: Iterable[Sequence[nn.Parameter]], size: int, stream: Stream) -> torch.Tensor:
    """The concatenated sketches of the blocks' gradients: float32. `stream` seeds the same sketch every time."""
    parts = []
    for group_number, group in enumerate(groups):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        parts.append(count_sketch(gradients, size, np.random.default_rng((*stream, SKETCH, group_number))))
    return torch.cat(parts).float()


def count_sketch(tensors: Sequence[torch.Tensor], size: int, random: np.random.Generator) -> torch.Tensor:
    """Sketch a vector in `size` dimensions: inner products of two sketches estimate those of the vectors.

    Each element is added to one of the sketch's with a random sign (Charikar, Chen and Farach-Colton 2002). Two
    elements meet with a probability of at most 1 / size, so that ⟨Sx, Sy⟩ has the mean ⟨x, y⟩ and a standard
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
        products: shape (2, n, 2, n), of one block or the sum of several.
    """
    return cosines(products.sum(axis=(-4, -2)))


def corrected_cosines(products: np.ndarray) -> np.ndarray:
    """Cosines without the bias of sampling noise, shape (…, n, n); NaN for a gradient that can't be told from noise.

    The noise in the halves' gradients g_A and g_B is independent, so ⟨g_A(s), g_B(t)⟩ has the mean ⟨g(s), g(t)⟩, also
    for s = t: the cosine is ½ (⟨g_A(s), g_B(t)⟩ + ⟨g_B(s), g_A(t)⟩) / √(⟨g_A(s), g_B(s)⟩ ⟨g_A(t), g_B(t)⟩).

    Args:
        products: shape (…, 2, n, 2, n).
    """
    return cosines((products[..., 0, :, 1, :] + products[..., 1, :, 0, :]) / 2)


def products_of_ranges(products: np.ndarray, timesteps: Sequence[int], ranges: Sequence[Range]) -> np.ndarray:
    """Inner products of the N ranges' gradients, each the sum over a range's timesteps: shape (…, 2, N, 2, N).

    Finetuning on a range starts with this gradient. It is easier to tell from noise than that of a single timestep.

    Args:
        products: shape (…, 2, n, 2, n).
    """
    inside = np.array([[low <= t < high for t in timesteps] for low, high in ranges], dtype=np.float64)
    return np.einsum("rt,...htku,su->...hrks", inside, products, inside, optimize=True)


def within(timesteps: Sequence[int], low: int, high: int) -> np.ndarray:
    """Mask of the timesteps in [low, high)."""
    return np.array([low <= timestep < high for timestep in timesteps])


def pairs_within(timesteps: Sequence[int], low: int, high: int) -> np.ndarray:
    """Mask of the pairs s < t of timesteps in [low, high), shape (n, n)."""
    inside = within(timesteps, low, high)
    return np.triu(np.outer(inside, inside), k=1)


def table(found: Arrays, material: Material) -> str:
    """Mean cosines of the gradients over pairs of timesteps, and cosines of the ranges' gradients.

    The mean of the noise-corrected cosines is left out if less than half of the pairs can be told from noise, as these
    are no fair sample of all.
    """
    names, products = material.range_names, found["products"].sum(axis=0)
    measured, corrected = measured_cosines(products), corrected_cosines(products)
    rows = []
    for name, pairs in _groups_of_pairs(material).items():
        raw, known = measured[pairs], np.isfinite(corrected[pairs])
        mean = mean_of(corrected[pairs]) if known.sum() >= len(known) / 2 else None
        row = [name, number(mean_of(raw), form=".3f"), number(mean_of(raw < 0), form=".0%")]
        rows.append([*row, number(mean, form=".3f"), f"{known.sum():,} of {len(known):,}"])
    titles = ["pairs of timesteps", "mean cosine as measured", "below 0", "noise-corrected", "told from noise"]
    of_pairs = headed_table("Gradient conflict", _note(found, material), titles, rows)
    by_range = products_of_ranges(products, material.timesteps, material.ranges)
    raw, free = measured_cosines(by_range), corrected_cosines(by_range)
    rows = []
    for i, name in enumerate(names):
        pairs = [(number(raw[i, j], form=".2f"), number(free[i, j], form=".2f")) for j in range(len(names))]
        rows.append([name, *(f"{cosine} ({without_noise})" for cosine, without_noise in pairs)])
    of_ranges = markdown_table(["cosine of the ranges' gradients (noise-corrected)", *names], rows)
    return f"{of_pairs}\n\n{of_ranges}"


def _groups_of_pairs(material: Material) -> dict[str, np.ndarray]:
    """Masks of the pairs s < t: within each range, within any, in different ones, in the lowest and the highest."""
    timesteps, ranges = material.timesteps, material.ranges
    named = zip(material.range_names, ranges, strict=True)
    groups = {f"within {name}": pairs_within(timesteps, *edges) for name, edges in named}
    groups["same range"] = np.any(list(groups.values()), axis=0)
    if len(ranges) > 1:
        groups["different ranges"] = np.triu(~groups["same range"], k=1)
        groups["lowest and highest range"] = np.outer(within(timesteps, *ranges[0]), within(timesteps, *ranges[-1]))
    return groups


def plot(found: Arrays, material: Material) -> dict[str, Figure]:
    """Cosines of all pairs of timesteps, their distribution, and those of the ranges by block."""
    by_range = products_of_ranges(found["products"], material.timesteps, material.ranges)
    by_block = corrected_cosines(by_range)
    by_block[np.abs(by_block) > FARTHEST] = np.nan
    blocks, label = found["groups"].tolist(), "noise-corrected cosine of the ranges' gradients"
    note = _note(found, material)
    unknown = f"{note}; grey: not told from noise"
    whole = corrected_cosines(by_range.sum(axis=0))
    products = found["products"].sum(axis=0)
    cosines = {"as measured": measured_cosines(products), "noise-corrected": corrected_cosines(products)}
    return {
        "gradient-conflict": _map(cosines, material, unknown),
        "gradient-densities": _densities(cosines, material, note),
        "gradient-blocks": cosine_maps(whole, material.range_names, by_block, blocks, label, unknown),
    }


def _map(cosines: dict[str, np.ndarray], material: Material, note: str) -> Figure:
    """Cosines at all pairs of timesteps; lines separate the ranges."""
    figure = noted(9.2, 4.6, note)
    total = material.ranges[-1][1]
    pictures = figure.subplots(1, 2, sharey=True)
    for axes, (name, values) in zip(pictures, cosines.items(), strict=True):
        axes.set_facecolor(UNKNOWN)
        image = axes.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1, origin="lower", extent=(0, total, 0, total))
        axes.grid(False)
        for low, _ in material.ranges[1:]:
            axes.axhline(low, color="black", linewidth=0.8, linestyle=":")
            axes.axvline(low, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=f"{name}, {len(values)}² timesteps", xlabel="timestep")
    pictures[0].set_ylabel("timestep")
    figure.colorbar(image, ax=pictures, label="cosine of the loss's gradients", shrink=0.85)
    return figure


def _densities(cosines: dict[str, np.ndarray], material: Material, note: str) -> Figure:
    """The distribution of the cosines over all pairs of different timesteps, and within each range."""
    figure = noted(9.2, 4.2, note)
    groups = {"all pairs": (0, material.ranges[-1][1])} | dict(zip(material.range_names, material.ranges, strict=True))
    pictures = figure.subplots(1, 2, sharey=True)
    grid = np.linspace(-FARTHEST, FARTHEST, 300)
    for axes, (name, values) in zip(pictures, cosines.items(), strict=True):
        for k, (group, edges) in enumerate(groups.items()):
            of_pairs = values[pairs_within(material.timesteps, *edges)]
            of_pairs = of_pairs[np.isfinite(of_pairs)]
            if len(of_pairs) >= FEWEST_PAIRS and of_pairs.std() >= 1e-6:
                colour = BLACK if group == "all pairs" else COLOURS[(k - 1) % len(COLOURS)]
                style = {"color": colour, "linewidth": 2.2 if k == 0 else 1.5, "linestyle": DASHES[k % len(DASHES)]}
                axes.plot(grid, gaussian_kde(of_pairs)(grid), label=f"{group}, {len(of_pairs):,} pairs", **style)
        axes.axvline(0, color="black", linewidth=0.8)
        farthest = 1 if name == "as measured" else FARTHEST
        axes.set(title=name, xlabel="cosine of the loss's gradients", xlim=(-farthest, farthest))
        if axes.lines[:-1]:
            axes.legend(loc="upper left")
    pictures[0].set_ylabel("density over pairs of timesteps")
    return figure


def _note(found: Arrays, material: Material) -> str:
    size = material.settings.sketch
    exact = "exact gradients" if found["exact"].all() else f"sketches of {size:,} dimensions per block"
    return f"{len(material.timesteps)} timesteps × {found['images']} training images in two halves, {exact}"
