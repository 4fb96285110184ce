"""Gradient conflict, the paper's figure 1a: do the losses at two timesteps pull the weights the same way?"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from deme.analysis import Material
from deme.analysis.task_vectors import cosine_maps, cosines, names_by_block
from deme.job.records import Arrays, Keep
from deme.report.figures import BLACK, COLOURS, DASHES, SEPARATOR, UNKNOWN, noted
from deme.report.tables import headed_table, markdown_table, mean_of, number

SKETCH = 7  # purpose of a generator; deme/data/opening.py and deme/measure/noisy.py have the others
LARGEST_COSINE = 1.5  # that is drawn: noise-corrected ones may pass 1
MIN_PAIRS = 8  # of timesteps for a density


def measure(material: Material) -> Arrays:
    """Inner products of the pretrained network's gradients at n timesteps, for two independent halves of the images.

    One gradient is in memory at a time, of which a sketch of at most `analyze.sketch` numbers per block is kept.

    Returns:
        products: float64, shape (G, 2, n, 2, n): block, half and timestep of one gradient, of the other.
        groups: names of the G blocks, the layers outside of all blocks being one more.
        exact: bool, shape (G,): the block has no more parameters than the sketch, which then is the gradient itself.
        images: their number.
    """
    return material.keep("gradient_conflict", ["pretrained"], partial(gradient_products, material))


def gradient_products(material: Material, keep: Keep) -> Arrays:
    """What `measure` returns; the sketches of each timestep are kept."""
    network = material.load(material.networks["pretrained"]).requires_grad_(True)
    images, size = material.clean("training", 0), material.settings.sketch
    named = dict(network.named_parameters())
    blocks = {block: [named[name] for name in names] for block, names in names_by_block(named).items()}
    half = images.count // 2

    def sketch_timestep(timestep: int) -> Arrays:
        halves = []
        for positions in (range(half), range(half, 2 * half)):
            network.zero_grad()
            for _, batch in images.at(timestep, positions):
                (batch.losses(network).sum() / half).backward()
            parts = []
            for k, parameters in enumerate(blocks.values()):
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                parts.append(count_sketch(gradients, size, np.random.default_rng((*images.stream, SKETCH, k))))
            halves.append(torch.cat(parts).float())
        return {"sketches": material.processes.reduce(torch.stack(halves), "sum").cpu().numpy()}

    sketches = [keep(f"{t:04d}", partial(sketch_timestep, t))["sketches"] for t in material.timesteps]
    vectors = np.stack(sketches, axis=1).astype(np.float64)  # (2, n, sum of the sketches' lengths)
    sizes = np.array([sum(p.numel() for p in parameters) for parameters in blocks.values()])
    parts = np.split(vectors, np.minimum(sizes, size).cumsum()[:-1], axis=2)
    products = np.stack([np.einsum("htd,kud->htku", part, part, optimize=True) for part in parts])
    names, count = np.array(list(blocks)), np.array(images.count)
    return {"products": products, "groups": names, "exact": sizes <= size, "images": count}


def count_sketch(tensors: Sequence[torch.Tensor], size: int, random: np.random.Generator) -> torch.Tensor:
    """Sketch a vector, given in parts, in `size` dimensions: float64.

    Each element is added to one of the sketch's with a random sign (Charikar, Chen and Farach-Colton 2002). Two
    elements meet with a probability of at most 1 / size, so that ⟨Sx, Sy⟩ has the mean ⟨x, y⟩ and a standard
    deviation of at most √(2 / size) · ‖x‖ · ‖y‖. A vector of at most `size` elements is returned as it is.
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


def both_cosines(products: np.ndarray) -> dict[str, np.ndarray]:
    """Cosines (…, n, n) of the gradients over all images, from (…, 2, n, 2, n): as measured, and noise-corrected.

    As measured, the noise of few images pulls them to 0. The noise in the halves' gradients g_A and g_B is independent,
    so ⟨g_A(s), g_B(t)⟩ has the mean ⟨g(s), g(t)⟩, also for s = t: without this bias the cosine is
    ½ (⟨g_A(s), g_B(t)⟩ + ⟨g_B(s), g_A(t)⟩) / √(⟨g_A(s), g_B(s)⟩ ⟨g_A(t), g_B(t)⟩), or NaN if not told from noise.
    """
    crossed = (products[..., 0, :, 1, :] + products[..., 1, :, 0, :]) / 2
    return {"as measured": cosines(products.sum(axis=(-4, -2))), "noise-corrected": cosines(crossed)}


def products_of_ranges(products: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Inner products of the N ranges' gradients, (…, 2, N, 2, N), from (…, 2, n, 2, n) and masks (N, n).

    Finetuning on a range starts with the sum of its timesteps' gradients, which is easier to tell from noise than one.
    """
    weights = inside.astype(np.float64)
    return np.einsum("rt,...htku,su->...hrks", weights, products, weights, optimize=True)


def pairs_within(inside: np.ndarray) -> np.ndarray:
    """Mask (n, n) of the pairs s < t of timesteps that a mask (n,) selects."""
    return np.triu(np.outer(inside, inside), k=1)


def report(arrays: Arrays, material: Material) -> tuple[str, dict[str, Figure]]:
    """Cosines over pairs of timesteps, their distribution, and cosines of the ranges' gradients, also by block."""
    names, inside = material.range_names, material.inside
    note = f"{len(material.timesteps)} timesteps × {arrays['images']} training images in two halves, "
    sketches = f"sketches of {material.settings.sketch:,} dimensions per block"
    note += "exact gradients" if arrays["exact"].all() else sketches
    by_timestep = both_cosines(arrays["products"].sum(axis=0))
    within = dict(zip(names, map(pairs_within, inside), strict=True))
    pairs = _table_of_pairs(by_timestep, within, np.outer(inside[0], inside[-1]), note)

    by_range = products_of_ranges(arrays["products"], inside)
    measured, corrected = both_cosines(by_range.sum(axis=0)).values()
    rows = []
    for name, *cells in zip(names, measured, corrected, strict=True):
        both = zip(*cells, strict=True)
        rows.append([name, *(f"{number(raw, form='.2f')} ({number(free, form='.2f')})" for raw, free in both)])
    table = markdown_table(["cosine of the ranges' gradients (noise-corrected)", *names], rows)
    by_block = both_cosines(by_range)["noise-corrected"]
    by_block[np.abs(by_block) > LARGEST_COSINE] = np.nan
    maps = (corrected, names, by_block, arrays["groups"].tolist(), "noise-corrected cosine of the ranges' gradients")
    unknown = f"{note}; grey: not told from noise"
    return f"{pairs}\n\n{table}", {
        "gradient-conflict": _map(by_timestep, material.ranges, unknown),
        "gradient-densities": _densities(by_timestep, within, note),
        "gradient-blocks": cosine_maps(*maps, unknown),
    }


def _table_of_pairs(
    by_timestep: dict[str, np.ndarray], within: dict[str, np.ndarray], apart: np.ndarray, note: str
) -> str:
    """Mean cosines over pairs of timesteps: within each range, and `apart` in the lowest and the highest one.

    The mean of the noise-corrected cosines is left out if less than half of the pairs can be told from noise, as these
    are no fair sample of all.
    """
    same = np.any(list(within.values()), axis=0)
    groups = {f"within {name}": pairs for name, pairs in within.items()} | {"same range": same}
    if len(within) > 1:
        groups |= {"different ranges": np.triu(~same, k=1), "lowest and highest range": apart}
    rows = []
    for name, chosen in groups.items():
        measured, corrected = (values[chosen] for values in by_timestep.values())
        known = np.isfinite(corrected)
        mean = mean_of(corrected) if known.sum() >= len(known) / 2 else None
        row = [name, number(mean_of(measured), form=".3f"), number(mean_of(measured < 0), form=".0%")]
        rows.append([*row, number(mean, form=".3f"), f"{known.sum():,} of {len(known):,}"])
    titles = ["pairs of timesteps", "mean cosine as measured", "below 0", "noise-corrected", "told from noise"]
    return headed_table("Gradient conflict", note, titles, rows)


def _map(by_timestep: dict[str, np.ndarray], ranges: Sequence[tuple[int, int]], note: str) -> Figure:
    """Cosines at all pairs of timesteps; lines separate the ranges."""
    figure = noted(9.2, 4.6, note)
    total, pictures = ranges[-1][1], figure.subplots(1, 2, sharey=True)
    for axes, (name, values) in zip(pictures, by_timestep.items(), strict=True):
        axes.set_facecolor(UNKNOWN)
        image = axes.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1, origin="lower", extent=(0, total, 0, total))
        axes.grid(False)
        for low, _ in ranges[1:]:
            axes.axhline(low, **SEPARATOR)
            axes.axvline(low, **SEPARATOR)
        axes.set(title=f"{name}, {len(values)}² timesteps", xlabel="timestep")
    pictures[0].set_ylabel("timestep")
    figure.colorbar(image, ax=pictures, label="cosine of the loss's gradients", shrink=0.85)
    return figure


def _densities(by_timestep: dict[str, np.ndarray], within: dict[str, np.ndarray], note: str) -> Figure:
    """The distribution of the cosines over all pairs of different timesteps, and within each range."""
    figure = noted(9.2, 4.2, note)
    pictures = figure.subplots(1, 2, sharey=True)
    for axes, (title, values), largest in zip(pictures, by_timestep.items(), (1, LARGEST_COSINE), strict=True):
        places = np.linspace(-largest, largest, 300)
        axes.set(title=title, xlabel="cosine of the loss's gradients", xlim=(-largest, largest))
        axes.axvline(0, color="black", linewidth=0.8)
        masks = {"all pairs": np.triu(np.full(values.shape, True), k=1)} | within
        for k, (name, pairs) in enumerate(masks.items()):
            known = values[pairs & np.isfinite(values)]
            if len(known) >= MIN_PAIRS and known.std() >= 1e-6:
                colour = BLACK if k == 0 else COLOURS[(k - 1) % len(COLOURS)]
                style = {"color": colour, "linewidth": 2.2 if k == 0 else 1.5, "linestyle": DASHES[k % len(DASHES)]}
                axes.plot(places, gaussian_kde(known)(places), label=f"{name}, {len(known):,} pairs", **style)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left")
    pictures[0].set_ylabel("density over pairs of timesteps")
    return figure
