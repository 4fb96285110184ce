"""Channel against spatial change: how finetuning changes a network's activations (the paper's figure 2)."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from deme.analysis.material import Material
from deme.job.arrays import Arrays
from deme.job.processes import Processes
from deme.measure.noisy import Batch
from deme.method.projection import PROJECTION_SUFFIX
from deme.method.task_vectors import Tensors
from deme.report.figures import BLUE, GREY, PINK, grid, legend_above, model_style, name_rows, noted
from deme.report.tables import headed_table, mean_of, number

PARTS = ("mean", "channels", "positions", "both")


def measure(material: Material) -> Arrays:
    """Squared activations and their change by block and range, and distances of the projections from the identity."""

    def make(_keep: object) -> Arrays:
        before = material.network
        before.load_state_dict(material.tensors("pretrained"))
        after = copy.deepcopy(before)
        blocks = list(blocks_of(before))
        batches = material.spread(len(material.ranges) * material.settings.images, 4)
        squares, distances = [], []
        for k, name in enumerate(material.range_names):
            tensors = material.tensors(name)
            after.load_state_dict(tensors)
            inside = (batch.part(batch.ranges == k) for batch in batches)
            change = squared_change(before, after, inside, material.processes)
            squares.append(change["squares"])
            of_block = projection_distances(tensors)
            distances.append([of_block.get(block, np.nan) for block in blocks])
        return {
            "squares": np.stack(squares, axis=1),
            "shapes": change["shapes"],
            "projections": np.array(distances).T,
            "blocks": np.array(blocks),
        }

    return material.keep("activation_change", ["pretrained", *material.range_names], ("images",), make)


def split_squares(activations: torch.Tensor) -> torch.Tensor:
    """The squares of activations, split into four parts in the order of PARTS: float64, shape (4,).

    An image's activations a(c, p), channel c and position p, are the sum of their mean, of a channel profile (the means
    over the positions, less the mean), of a position profile (the means over the channels, less the mean), and of the
    rest. The four are orthogonal, as in an analysis of variance of two factors, so their squares add up.

    Args:
        activations: or the difference of those of two networks, shape (B, C, H, W).
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
    """Squares of the activations after each block, and of what finetuning changed in them.

    Args:
        pretrained, finetuned: of the same architecture.
        batches: this process's share of the noisy images, which both networks see.

    Returns:
        squares: of the pretrained network's activations, and of the change, split as PARTS: float64, (blocks, 2, 4).
        shapes: numbers of channels and of positions after each block, shape (blocks, 2).
    """
    outputs: list[dict[str, torch.Tensor]] = [{}, {}]
    hooks = []
    for network, output in zip((pretrained, finetuned), outputs, strict=True):
        for name, block in blocks_of(network).items():

            def remember(_block: nn.Module, _inputs: tuple, given: object, name=name, output=output) -> None:
                output[name] = (given[0] if isinstance(given, tuple) else given).float()  # after the projection

            hooks.append(block.register_forward_hook(remember))
    names = list(blocks_of(pretrained))
    squares = torch.zeros(len(names), 2, len(PARTS), dtype=torch.float64, device=processes.device)
    shapes = torch.zeros(len(names), 2, dtype=torch.int64, device=processes.device)
    for batch in batches:
        if len(batch.timesteps) == 0:
            continue
        for network in (pretrained, finetuned):
            batch.predict(network)
        for row, shape, name in zip(squares, shapes, names, strict=True):
            before, after = (output[name] for output in outputs)
            shape[0], shape[1] = before.shape[1], before[0, 0].numel()
            row += torch.stack([split_squares(before), split_squares(after - before)])
    for hook in hooks:
        hook.remove()
    shapes = processes.gather(shapes[None]).amax(0)  # a process may have no image
    return {"squares": processes.reduce(squares, "sum").cpu().numpy(), "shapes": shapes.cpu().numpy()}


def projection_distances(network: Tensors) -> dict[str, float]:
    """Distance ‖P − I‖ / ‖I‖ of each block's projection P, C × C, from the identity, in the Frobenius norm."""
    distances = {}
    for name, weight in network.items():
        if name.endswith(PROJECTION_SUFFIX):
            identity = torch.eye(len(weight), device=weight.device)
            distance = (weight[:, :, 0, 0].float() - identity).norm() / identity.norm()
            distances[name.removesuffix(PROJECTION_SUFFIX)] = float(distance)
    return distances


def relative_change(squares: np.ndarray, part: str) -> np.ndarray:
    """How much one of PARTS changed relative to itself: shape (…,); NaN for 0 / 0.

    Args:
        squares: as `squared_change` returns them, shape (…, 2, 4).
    """
    before, change = squares[..., 0, PARTS.index(part)], squares[..., 1, PARTS.index(part)]
    return np.sqrt(change / np.where(before > 0, before, np.nan))


def change_shares(squares: np.ndarray) -> np.ndarray:
    """The parts' shares of the squared change: shape (…, 4); NaN where nothing changed."""
    change = squares[..., 1, :]
    total = change.sum(axis=-1, keepdims=True)
    return change / np.where(total > 0, total, np.nan)


def table(found: Arrays, material: Material) -> str:
    """The change across channels and across positions, averaged over the blocks of each range."""
    rows = []
    for k, name in enumerate(material.range_names):
        squares = found["squares"][:, k]
        changes = [relative_change(squares, part) for part in ("channels", "positions")]
        means = map(mean_of, [*changes, *change_shares(squares).T, found["projections"][:, k]])
        rows.append([name, *(number(mean, form=".2%") for mean in means)])
    titles = ["mean over the blocks", "channel profile changed by", "position profile changed by"]
    titles += ["share of the change: mean", "channels", "positions", "neither alone", "projection from identity"]
    return headed_table("Channel against spatial change", _note(material), titles, rows)


def plot(found: Arrays, material: Material) -> dict[str, Figure]:
    """Changes of the profiles, what the change is made of, and the projections if there are any."""
    figures = {"activation-change": _changes(found, material), "activation-shares": _shares(found, material)}
    if np.isfinite(found["projections"]).any():
        figures["projections"] = _projections(found, material)
    return figures


def _changes(found: Arrays, material: Material) -> Figure:
    """By how much of itself each block's channel profile and position profile changed."""
    figure, pictures = _by_block(found, material, "change, % of the profile")
    for k, axes in enumerate(pictures):
        for marker, colour, part in (("o", BLUE, "channels"), ("s", PINK, "positions")):
            change = 100 * relative_change(found["squares"][:, k], part)
            label = f"{part.removesuffix('s')} profile"
            axes.plot(change, range(len(change)), marker, color=colour, label=label, markersize=7)
    pictures[0].set_xlim(left=0)
    legend_above(figure, pictures[0], 2)
    return figure


def _shares(found: Arrays, material: Material) -> Figure:
    """What the change of each block's activations is made of, and what white noise would be made of."""
    figure, pictures = _by_block(found, material, "% of the squared change")
    labels = {"one number": GREY, "channels": BLUE, "positions": PINK, "neither alone": "#dddddd"}
    channels, positions = found["shapes"].T
    chance = 100 * channels / (channels * positions)
    for k, axes in enumerate(pictures):
        shares = 100 * np.nan_to_num(change_shares(found["squares"][:, k]))
        start = np.zeros(len(shares))
        for values, (label, colour) in zip(shares.T, labels.items(), strict=True):
            axes.barh(range(len(shares)), values, left=start, color=colour, label=label)
            start = start + values
        style = {"color": "black", "markersize": 16, "markeredgewidth": 2}
        axes.plot(chance, range(len(shares)), "|", label="one number and channels in white noise", **style)
    pictures[0].set_xlim(0, 100)
    legend_above(figure, pictures[0], 5)
    return figure


def _by_block(found: Arrays, material: Material, label: str) -> tuple[Figure, list[Axes]]:
    """A picture for each range with a row for each block."""
    blocks = found["blocks"].tolist()
    size = (2.9, 1.6 + 0.3 * len(blocks))
    figure, pictures = grid(len(material.ranges), size, _note(material), label, "activations behind")
    for axes, name in zip(pictures, material.range_names, strict=True):
        axes.set_title(f"expert of {name}")
    name_rows(pictures[0], blocks)
    return figure, pictures


def _projections(found: Arrays, material: Material) -> Figure:
    """How far each trained projection is from the identity that it began as."""
    blocks = found["blocks"].tolist()
    figure = noted(6.5, 1.9 + 0.3 * len(blocks), "P: the 1×1 convolution after a block, I: the identity")
    axes = figure.subplots()
    for k, name in enumerate(material.range_names):
        values = 100 * found["projections"][:, k]
        axes.plot(values, range(len(blocks)), linestyle="", label=name, markersize=7, **model_style(name, k))
    name_rows(axes, blocks)
    axes.set_xlim(left=0)
    axes.set(xlabel="‖P − I‖ / ‖I‖, %", ylabel="projection after")
    legend_above(figure, axes, 4)
    return figure


def _note(material: Material) -> str:
    images = f"{material.settings.images} {material.measured_on} images in each range"
    return f"{images}, seen by pretrained network and expert"
