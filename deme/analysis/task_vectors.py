"""Task vectors: norms, cosines, signs and values of what finetuning added to the weights (the paper's figure 6b)."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from deme.analysis.material import Material
from deme.job.processes import in_main_process
from deme.job.records import Arrays, Keep
from deme.method.coefficients import pattern_of, patterns_of
from deme.method.task_vectors import Tensors
from deme.report.figures import COLOURS, SEPARATOR, cosine_maps, grid, legend_above, model_style, name_rows, noted
from deme.report.tables import headed_table, number

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_VALUES = 2**18  # of a tensor, evenly spread, for the quantiles


def measure(material: Material) -> Arrays:
    names = [name for name in material.networks if name != "pretrained"]

    def make(_keep: Keep) -> Arrays:
        pretrained, *networks = (material.tensors(name) for name in ("pretrained", *names))
        return in_main_process(material.processes, lambda: statistics(pretrained, networks))

    return material.keep("task_vectors", ["pretrained", *names], (), make) | {"names": np.array(names)}


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
    patterns = patterns_of("block", list(pretrained))
    products = np.zeros((len(patterns), len(networks), len(networks)))
    opposed, moved = np.zeros_like(products), np.zeros_like(products)
    squares, sizes = np.zeros(len(patterns)), np.zeros(len(patterns), dtype=np.int64)
    values: list[list[np.ndarray]] = [[] for _ in patterns]
    for name, base in pretrained.items():
        group = patterns.index(pattern_of(name, patterns))
        vectors = torch.stack([(tensors[name].float() - base.float()).flatten() for tensors in networks])
        wide, signs = vectors.double(), vectors.sign()
        products[group] += (wide @ wide.T).numpy()
        agreeing = (signs @ signs.T).double().numpy()  # parameters that agree in sign, less those that do not
        both = (signs.abs() @ signs.abs().T).double().numpy()
        moved[group] += both
        opposed[group] += (both - agreeing) / 2
        squares[group] += float(base.double().square().sum())
        sizes[group] += base.numel()
        values[group].append(vectors[:, :: -(-base.numel() // MOST_VALUES)].numpy())
    quantiles = np.stack([np.quantile(np.concatenate(v, axis=1), QUANTILES, axis=1).T for v in values])
    arrays = {"groups": np.array([block_name(pattern) for pattern in patterns]), "sizes": sizes, "squares": squares}
    return arrays | {"products": products, "opposed": opposed, "moved": moved, "quantiles": quantiles}


def block_name(pattern: str) -> str:
    """A block's name, from the pattern of its tensors' names."""
    return pattern.removesuffix(".*").replace("*", "rest")


def norms(products: np.ndarray) -> np.ndarray:
    """Norms of vectors, shape (…, N), from their inner products, shape (…, N, N)."""
    return np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines of vectors from their inner products, shape (…, N, N); NaN where a squared norm is not positive."""
    squares = np.diagonal(products, axis1=-2, axis2=-1)
    lengths = np.sqrt(np.where(squares > 0, squares, np.nan))
    return products / lengths[..., :, None] / lengths[..., None, :]


def opposed_shares(opposed: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """The share of the parameters moved by two task vectors that they move in opposite directions."""
    return opposed / np.where(moved > 0, moved, np.nan)


def table(arrays: Arrays, material: Material) -> str:
    """Norms and pairwise cosines of whole task vectors, and how often two of them have opposite signs."""
    names = arrays["names"].tolist()
    products = arrays["products"].sum(axis=0)
    lengths, angles = norms(products), cosines(products)
    opposed = opposed_shares(arrays["opposed"].sum(axis=0), arrays["moved"].sum(axis=0))
    rows = []
    for i, name in enumerate(names):
        pairs = ["-" if i == j else f"{angles[i, j]:.2f} ({opposed[i, j]:.0%})" for j in range(len(names))]
        relative = lengths[i] / np.sqrt(arrays["squares"].sum())
        rows.append([name, number(lengths[i], form=".3f"), f"{relative:.2%}", *pairs])
    titles = ["task vector", "norm", "of the pretrained weights'", *names]
    return headed_table("Task vectors", f"cosine (share of opposite signs) of {_note(arrays)}", titles, rows)


def plot(arrays: Arrays, material: Material) -> dict[str, Figure]:
    """Norms and signs by block; cosines, overall and by block; box plots of the values."""
    names, experts = arrays["names"].tolist(), len(material.ranges)
    products, blocks = arrays["products"], arrays["groups"].tolist()
    by_block = cosines(products)[:, :experts, :experts]
    maps = (cosines(products.sum(axis=0)), names, by_block, blocks, "cosine of the task vectors")
    return {
        "task-vectors": _norms_and_signs(arrays, names, experts),
        "task-cosines": cosine_maps(*maps, _note(arrays)),
        "task-values": _values(arrays, names[:experts]),
    }


def _norms_and_signs(arrays: Arrays, names: list[str], experts: int) -> Figure:
    """By block: norms relative to the pretrained weights', and how often two experts' signs are opposed."""
    blocks = [*arrays["groups"].tolist(), "all"]
    keys = ("products", "squares", "opposed", "moved")
    products, squares, opposed, moved = (np.concatenate([arrays[k], arrays[k].sum(0, keepdims=True)]) for k in keys)
    figure = noted(9.2, 2.3 + 0.36 * len(blocks), _note(arrays))
    left, right = figure.subplots(1, 2, sharey=True)
    for row, name in enumerate(names):
        relative = 100 * norms(products)[:, row] / np.sqrt(squares)
        left.plot(relative, range(len(blocks)), linestyle="", alpha=0.85, label=name, **model_style(name, row))
    first, second = np.triu_indices(experts, k=1)
    if len(first):
        shares = 100 * opposed_shares(opposed, moved)[:, first, second]
        right.boxplot(shares.T, orientation="horizontal", positions=range(len(blocks)), whis=(0, 100), widths=0.5)
    right.axvline(50, **SEPARATOR)
    right.set(title="opposed signs", xlabel=f"% of parameters, {len(first)} pairs of experts; dotted: chance")
    left.set(title="norm of the task vector", xlabel="% of the pretrained weights' norm", ylabel="block of layers")
    left.set_xlim(left=0)
    name_rows(left, blocks)
    legend_above(figure, left, 4)
    return figure


def _values(arrays: Arrays, experts: list[str]) -> Figure:
    """Box plots of the experts' task vectors by block."""
    blocks, height = arrays["groups"].tolist(), 0.8 / len(experts)
    size = (9.2, 1.5 + 0.22 * len(experts) * len(blocks))
    note = f"{_note(arrays)}; boxes: quartiles; whiskers: 5 and 95 %"
    figure, [axes] = grid(1, size, note, "finetuned − pretrained weights × 10³", "block of layers")
    style = {"orientation": "horizontal", "showfliers": False, "patch_artist": True, "medianprops": {"color": "black"}}
    for row, name in enumerate(experts):
        keys = ("whislo", "q1", "med", "q3", "whishi")
        boxes = [dict(zip(keys, values, strict=True)) for values in 1e3 * arrays["quantiles"][:, row]]
        places = np.arange(len(blocks)) + (row - (len(experts) - 1) / 2) * height
        colour = {"facecolor": COLOURS[row % len(COLOURS)]}
        axes.bxp(boxes, places, widths=0.8 * height, label=name, boxprops=colour, **style)
    axes.axvline(0, color="black", linewidth=0.8)
    name_rows(axes, blocks)
    legend_above(figure, axes, 4)
    return figure


def _note(arrays: Arrays) -> str:
    return f"all {arrays['sizes'].sum():,} parameters"
