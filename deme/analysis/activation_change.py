"""Channel against spatial change: how finetuning changes a network's activations (the paper's figure 2)."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from deme.analysis.material import Material
from deme.job.processes import Processes
from deme.job.records import Arrays, Keep
from deme.measure.noisy import Batch
from deme.method.projection import PROJECTION_SUFFIX
from deme.method.task_vectors import Tensors
from deme.report.figures import BLUE, GREY, PINK, grid, legend_above, model_style, name_rows
from deme.report.tables import headed_table, mean_of, number

PARTS = ("mean", "channels", "positions", "both")


def measure(material: Material) -> Arrays:
    """Squared activations and their change by block and range, and distances of the projections from the identity."""

    def make(_keep: Keep) -> Arrays:
        before = material.network
        before.load_state_dict(material.tensors("pretrained"))
        after = copy.deepcopy(before)
        blocks = list(blocks_of(before))
        batches = material.spread(len(material.ranges) * material.settings.images, 4)
        squares, distances = [], []
        for k, name in enumerate(material.range_names):
            tensors = material.tensors(name)
            after.load_state_dict(tensors)
            inside = [batch.part(batch.ranges == k) for batch in batches]
            change = squared_change(before, after, inside, material.processes)
            squares.append(change["squares"])
            by_block = projection_distances(tensors)
            distances.append([by_block.get(block, np.nan) for block in blocks])
        arrays = {"squares": np.stack(squares, axis=1), "shapes": change["shapes"]}
        return arrays | {"projections": np.array(distances).T, "blocks": np.array(blocks)}

    return material.keep("activation_change", ["pretrained", *material.range_names], ("images",), make)


def split_squares(activations: torch.Tensor) -> torch.Tensor:
    """The squares of activations (B, C, H, W), split into four parts in the order of PARTS: float64, shape (4,).

    An image's activations a(c, p), channel c and position p, are the sum of their mean, of a channel profile (the means
    over the positions, less the mean), of a position profile (the means over the channels, less the mean), and of the
    rest. The four are orthogonal, as in an analysis of variance of two factors, so their squares add up.
    """
    a = activations.flatten(2).double()
    mean = a.mean((1, 2), keepdim=True)
    channels = a.mean(2, keepdim=True) - mean
    positions = a.mean(1, keepdim=True) - mean
    rest = a - mean - channels - positions
    return torch.stack([part.expand_as(a).square().sum() for part in (mean, channels, positions, rest)])


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a UNet by name, in the order of the forward pass."""
    down = {f"down_blocks.{i}": block for i, block in enumerate(network.down_blocks)}
    mid = {} if network.mid_block is None else {"mid_block": network.mid_block}
    return down | mid | {f"up_blocks.{i}": block for i, block in enumerate(network.up_blocks)}


@torch.no_grad()
def squared_change(
    pretrained: nn.Module, finetuned: nn.Module, batches: Iterable[Batch], processes: Processes
) -> Arrays:
    """Squares of the activations after each block, and of what finetuning changed in them, on the same noisy images.

    Returns:
        squares: of the pretrained network's activations, and of the change, split as PARTS: float64, (blocks, 2, 4).
        shapes: numbers of channels and of positions after each block, shape (blocks, 2).
    """
    count = len(blocks_of(pretrained))
    squares = torch.zeros(count, 2, len(PARTS), dtype=torch.float64, device=processes.device)
    shapes = torch.zeros(count, 2, dtype=torch.int64, device=processes.device)
    for batch in batches:
        if len(batch.timesteps) == 0:
            continue
        pairs = zip(block_outputs(pretrained, batch), block_outputs(finetuned, batch), strict=True)
        for k, (before, after) in enumerate(pairs):
            shapes[k, 0], shapes[k, 1] = before.shape[1], before[0, 0].numel()
            squares[k] += torch.stack([split_squares(before), split_squares(after - before)])
    shapes = processes.gather(shapes[None]).amax(0)  # a process may have no image
    return {"squares": processes.reduce(squares, "sum").cpu().numpy(), "shapes": shapes.cpu().numpy()}


def block_outputs(network: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The output of each block, after its projection: float32, shape (B, C, H, W)."""
    outputs: list[torch.Tensor] = []

    def append(_block: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).float())

    hooks = [block.register_forward_hook(append) for block in blocks_of(network).values()]
    batch.predict(network)
    for hook in hooks:
        hook.remove()
    return outputs


def projection_distances(network: Tensors) -> dict[str, float]:
    """Frobenius distance ‖P − I‖ / ‖I‖ of each block's projection P from the identity, by block."""
    distances = {}
    for name, weight in network.items():
        if name.endswith(PROJECTION_SUFFIX):
            identity = torch.eye(len(weight), device=weight.device)
            distance = (weight[:, :, 0, 0].float() - identity).norm() / identity.norm()
            distances[name.removesuffix(PROJECTION_SUFFIX)] = float(distance)
    return distances


def relative_change(squares: np.ndarray, part: str) -> np.ndarray:
    """How much one of PARTS changed relative to itself, from squares (…, 2, 4): shape (…,); NaN for 0 / 0."""
    before, change = squares[..., 0, PARTS.index(part)], squares[..., 1, PARTS.index(part)]
    return np.sqrt(change / np.where(before > 0, before, np.nan))


def change_shares(squares: np.ndarray) -> np.ndarray:
    """The parts' shares of the squared change, from squares (…, 2, 4): shape (…, 4); NaN where nothing changed."""
    change = squares[..., 1, :]
    total = change.sum(axis=-1, keepdims=True)
    return change / np.where(total > 0, total, np.nan)


def table(arrays: Arrays, material: Material) -> str:
    """The change across channels and across positions, averaged over the blocks of each range."""
    rows = []
    for k, name in enumerate(material.range_names):
        squares = arrays["squares"][:, k]
        changes = [relative_change(squares, part) for part in ("channels", "positions")]
        means = map(mean_of, [*changes, *change_shares(squares).T, arrays["projections"][:, k]])
        rows.append([name, *(number(mean, form=".2%") for mean in means)])
    titles = ["mean over the blocks", "channel profile changed by", "position profile changed by"]
    titles += ["share of the change: mean", "channels", "positions", "neither alone", "projection from identity"]
    return headed_table("Channel against spatial change", _note(material), titles, rows)


def plot(arrays: Arrays, material: Material) -> dict[str, Figure]:
    """Changes of the profiles, what the change is made of, and the projections if there are any."""
    figures = {"activation-change": _changes(arrays, material), "activation-shares": _shares(arrays, material)}
    if np.isfinite(arrays["projections"]).any():
        figures["projections"] = _projections(arrays, material)
    return figures


def _changes(arrays: Arrays, material: Material) -> Figure:
    """By how much of itself each block's channel profile and position profile changed."""
    figure, pictures = _by_block(arrays, material, "change, % of the profile")
    for k, axes in enumerate(pictures):
        for marker, colour, part in (("o", BLUE, "channels"), ("s", PINK, "positions")):
            change = 100 * relative_change(arrays["squares"][:, k], part)
            label = f"{part.removesuffix('s')} profile"
            axes.plot(change, range(len(change)), marker, color=colour, label=label, markersize=7)
    pictures[0].set_xlim(left=0)
    legend_above(figure, pictures[0], 2)
    return figure


def _shares(arrays: Arrays, material: Material) -> Figure:
    """What the change of each block's activations is made of, and what white noise would be made of."""
    figure, pictures = _by_block(arrays, material, "% of the squared change")
    labels = {"one number": GREY, "channels": BLUE, "positions": PINK, "neither alone": "#dddddd"}
    chance = 100 / arrays["shapes"][:, 1]
    rows = range(len(chance))
    for k, axes in enumerate(pictures):
        shares = 100 * np.nan_to_num(change_shares(arrays["squares"][:, k])).T
        starts = np.cumsum(shares, axis=0) - shares
        for values, left, (label, colour) in zip(shares, starts, labels.items(), strict=True):
            axes.barh(rows, values, left=left, color=colour, label=label)
        style = {"color": "black", "markersize": 16, "markeredgewidth": 2}
        axes.plot(chance, rows, "|", label="one number and channels in white noise", **style)
    pictures[0].set_xlim(0, 100)
    legend_above(figure, pictures[0], 5)
    return figure


def _by_block(arrays: Arrays, material: Material, label: str) -> tuple[Figure, list[Axes]]:
    """A picture for each range with a row for each block."""
    size = (2.9, 1.6 + 0.3 * len(arrays["blocks"]))
    figure, pictures = grid(len(material.ranges), size, _note(material), label, "activations after")
    for axes, name in zip(pictures, material.range_names, strict=True):
        axes.set_title(f"expert of {name}")
    name_rows(pictures[0], arrays["blocks"].tolist())
    return figure, pictures


def _projections(arrays: Arrays, material: Material) -> Figure:
    """How far each trained projection is from the identity that it began as."""
    note, label = "P: the 1×1 convolution after a block, I: the identity", "‖P − I‖ / ‖I‖, %"
    figure, [axes] = grid(1, (6.5, 1.5 + 0.3 * len(arrays["blocks"])), note, label, "projection after")
    for k, name in enumerate(material.range_names):
        style = {"linestyle": "", "markersize": 7} | model_style(name, k)
        axes.plot(100 * arrays["projections"][:, k], range(len(arrays["blocks"])), label=name, **style)
    name_rows(axes, arrays["blocks"].tolist())
    axes.set_xlim(left=0)
    legend_above(figure, axes, 4)
    return figure


def _note(material: Material) -> str:
    images = f"{material.settings.images} {material.measured_on} images in each range"
    return f"{images}, seen by pretrained network and expert"
