"""Task vectors: norms, cosines, signs and values of what finetuning added to the weights (the paper's figure 6b)."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from deme.analysis import Material
from deme.job.processes import in_main_process
from deme.job.records import Arrays, Keep
from deme.method.task_vectors import Tensors, block_of, in_order
from deme.report.figures import COLOURS, SEPARATOR, grid, heat_map, model_style, name_rows, noted
from deme.report.tables import headed_table, number

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_VALUES = 2**18  # of a tensor, evenly spread, for the quantiles


def measure(material: Material) -> Arrays:
    names = [name for name in material.networks if name != "pretrained"]

    def make(_keep: Keep) -> Arrays:
        pretrained, *networks = (material.tensors(name) for name in ("pretrained", *names))
        return in_main_process(material.processes, lambda: statistics(pretrained, networks))

    return material.keep("task_vectors", ["pretrained", *names], make) | {"names": np.array(names)}


@torch.no_grad()
def statistics(pretrained: Tensors, networks: Sequence[Tensors]) -> Arrays:
    """Statistics of the N task vectors τ = network − pretrained by block, one tensor in memory at a time.

    Returns:
        groups: names of the G blocks, the layers outside of all blocks being one more.
        sizes: numbers of parameters, shape (G,).
        products: inner products of the task vectors, float64, shape (G, N, N).
        squares: sums of the squared pretrained weights, shape (G,).
        opposed, moved: how many parameters two task vectors move in opposite directions, and at all, shape (G, N, N).
        quantiles: QUANTILES of the task vectors' values, shape (G, N, 5).
    """
    blocks = names_by_block(pretrained)
    products = np.zeros((len(blocks), len(networks), len(networks)))
    opposed, moved = np.zeros_like(products), np.zeros_like(products)
    squares, sizes, quantiles = np.zeros(len(blocks)), np.zeros(len(blocks), dtype=np.int64), []
    for k, names in enumerate(blocks.values()):
        values = []
        for name in names:
            base = pretrained[name]
            vectors = torch.stack([(tensors[name].float() - base.float()).flatten() for tensors in networks])
            wide, signs = vectors.double(), vectors.sign()
            products[k] += (wide @ wide.T).numpy()
            agreeing = (signs @ signs.T).double().numpy()  # parameters that agree in sign, less those that do not
            both = (signs.abs() @ signs.abs().T).double().numpy()
            moved[k] += both
            opposed[k] += (both - agreeing) / 2
            squares[k] += float(base.double().square().sum())
            sizes[k] += base.numel()
            values.append(vectors[:, :: -(-base.numel() // MOST_VALUES)].numpy())
        quantiles.append(np.quantile(np.concatenate(values, axis=1), QUANTILES, axis=1).T)
    arrays = {"groups": np.array(list(blocks)), "sizes": sizes, "squares": squares, "products": products}
    return arrays | {"opposed": opposed, "moved": moved, "quantiles": np.stack(quantiles)}


def names_by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors' names by block: down, mid, up, or those of a transformer, and the rest outside of all blocks."""
    blocks = {name: block_of(name) for name in names}
    return {block: [name for name in names if blocks[name] == block] for block in in_order({*blocks.values()})}


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines of vectors from their inner products, shape (…, N, N); NaN where a squared norm is not positive."""
    squares = np.diagonal(products, axis1=-2, axis2=-1)
    lengths = np.sqrt(np.where(squares > 0, squares, np.nan))
    return products / lengths[..., :, None] / lengths[..., None, :]


def report(arrays: Arrays, material: Material) -> tuple[str, dict[str, Figure]]:
    """Norms, cosines and signs of whole task vectors as a table; the same by block, and the values, as pictures."""
    names, experts, blocks = arrays["names"].tolist(), len(material.experts), arrays["groups"].tolist()
    note = f"all {arrays['sizes'].sum():,} parameters"
    keys = ("products", "squares", "opposed", "moved")  # of the blocks, then of all
    products, squares, opposed, moved = (np.concatenate([arrays[k], arrays[k].sum(0, keepdims=True)]) for k in keys)
    lengths, angles = np.sqrt(np.diagonal(products, axis1=1, axis2=2)), cosines(products)
    relative, shares = lengths / np.sqrt(squares)[:, None], opposed / np.where(moved > 0, moved, np.nan)
    rows = []
    for i, name in enumerate(names):
        pairs = ["-" if i == j else f"{angles[-1, i, j]:.2f} ({shares[-1, i, j]:.0%})" for j in range(len(names))]
        rows.append([name, number(lengths[-1, i], form=".3f"), f"{relative[-1, i]:.2%}", *pairs])
    titles = ["task vector", "norm", "of the pretrained weights'", *names]
    maps = (angles[-1], names, angles[:-1, :experts, :experts], blocks, "cosine of the task vectors", note)
    return headed_table("Task vectors", f"cosine (share of opposite signs) of {note}", titles, rows), {
        "task-vectors": _norms_and_signs(relative, shares[:, :experts, :experts], names, [*blocks, "all"], note),
        "task-cosines": cosine_maps(*maps),
        "task-values": _values(arrays["quantiles"], names[:experts], blocks, note),
    }


def cosine_maps(
    whole: np.ndarray, names: Sequence[str], by_block: np.ndarray, blocks: Sequence[str], label: str, note: str
) -> Figure:
    """Cosines of whole networks, shape (N, N), beside those of all pairs of the first E in each block, (G, E, E)."""
    experts = names[: by_block.shape[1]]
    first, second = np.triu_indices(len(experts), k=1)
    pairs = [f"{experts[i]}\nand {experts[j]}" for i, j in zip(first, second, strict=True)]
    figure = noted(max(9.6, 5 + 0.75 * len(pairs)), max(5.2, 3.2 + 0.3 * len(blocks)), note)
    left, right = figure.subplots(1, 2)
    heat_map(left, whole, names, names)
    left.set_title("all layers")
    image = heat_map(right, by_block[:, first, second], blocks, pairs)
    right.set_title("pairs of ranges, by block of layers")
    figure.colorbar(image, ax=[left, right], label=label, shrink=0.85)
    return figure


def _norms_and_signs(relative: np.ndarray, opposed: np.ndarray, names: list, blocks: list, note: str) -> Figure:
    """By block: norms relative to the pretrained weights', and how often two experts' signs are opposed."""
    figure = noted(9.2, 2.3 + 0.36 * len(blocks), note)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, name in enumerate(names):
        style = {"linestyle": "", "alpha": 0.85} | model_style(name, row)
        left.plot(100 * relative[:, row], range(len(blocks)), label=name, **style)
    first, second = np.triu_indices(opposed.shape[1], k=1)
    if len(first):
        shares = 100 * opposed[:, first, second].T
        right.boxplot(shares, orientation="horizontal", positions=range(len(blocks)), whis=(0, 100), widths=0.5)
    right.axvline(50, **SEPARATOR)
    right.set(title="opposed signs", xlabel=f"% of parameters, {len(first)} pairs of experts; dotted: chance")
    left.set(title="norm of the task vector", xlabel="% of the pretrained weights' norm", ylabel="block of layers")
    left.set_xlim(left=0)
    name_rows(figure, left, blocks, 4)
    return figure


def _values(quantiles: np.ndarray, experts: list[str], blocks: list[str], note: str) -> Figure:
    """Box plots of the experts' task vectors by block."""
    height = 0.8 / len(experts)
    size, note = (9.2, 1.5 + 0.22 * len(experts) * len(blocks)), f"{note}; boxes: quartiles; whiskers: 5 and 95 %"
    figure, [axes] = grid(1, size, note, "finetuned − pretrained weights × 10³", "block of layers")
    style = {"orientation": "horizontal", "showfliers": False, "patch_artist": True, "medianprops": {"color": "black"}}
    for row, name in enumerate(experts):
        keys = ("whislo", "q1", "med", "q3", "whishi")
        boxes = [dict(zip(keys, values, strict=True)) for values in 1e3 * quantiles[:, row]]
        places = np.arange(len(blocks)) + (row - (len(experts) - 1) / 2) * height
        colour = {"facecolor": COLOURS[row % len(COLOURS)]}
        axes.bxp(boxes, places, widths=0.8 * height, label=name, boxprops=colour, **style)
    axes.axvline(0, color="black", linewidth=0.8)
    name_rows(figure, axes, blocks, 4)
    return figure
