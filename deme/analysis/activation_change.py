"""Channel against spatial change: how finetuning changes a network's activations (the paper's figure 2)."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from deme.analysis import Material
from deme.job.processes import Processes
from deme.job.records import Arrays, Keep
from deme.measure.noisy import Batch
from deme.method.projection import PROJECTION_SUFFIX, blocks_of, place_of_images
from deme.method.task_vectors import Tensors
from deme.report.figures import BLUE, GREY, PINK, grid, model_style, name_rows
from deme.report.tables import headed_table, mean_of, number

PARTS = {"one number": GREY, "channels": BLUE, "positions": PINK, "neither alone": "#dddddd"}  # and their colours


def measure(material: Material) -> Arrays:
    """Squared activations and their change by block and range, and distances of the projections from the identity."""

    def make(_keep: Keep) -> Arrays:
        before = material.network
        before.load_state_dict(material.tensors("pretrained"))
        after = copy.deepcopy(before)
        blocks = list(blocks_of(before))
        batches = material.spread(len(material.ranges) * material.settings.images, 4)
        squares, projections = [], []
        for k, name in enumerate(material.range_names):
            tensors = material.tensors(name)
            after.load_state_dict(tensors)
            inside = [batch.part(batch.ranges == k) for batch in batches]
            of_range, shapes = squared_change(before, after, inside, material.processes)
            squares.append(of_range)
            projections.append([projection_distance(tensors, block) for block in blocks])
        arrays = {"squares": np.stack(squares, axis=1), "shapes": shapes}
        return arrays | {"projections": np.array(projections).T, "blocks": np.array(blocks)}

    return material.keep("activation_change", ["pretrained", *material.range_names], make)


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


@torch.no_grad()
def squared_change(
    pretrained: nn.Module, finetuned: nn.Module, batches: Iterable[Batch], processes: Processes
) -> tuple[np.ndarray, np.ndarray]:
    """Squares of the activations after each block, and of what finetuning changed in them, on the same noisy images.

    Returns:
        Of the pretrained network's activations, and of the change, split as PARTS: float64, shape (blocks, 2, 4).
        Numbers of channels and of positions after each block, shape (blocks, 2).
    """
    outputs: list[torch.Tensor] = []  # after each block and its projection, float32, (B, C, H, W) or (B, C, tokens)

    def append(block: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> None:
        place = place_of_images(block, output)
        images = (output if place is None else output[place]).float()
        outputs.append(images.transpose(1, 2) if images.dim() == 3 else images)

    blocks = [block for network in (pretrained, finetuned) for block in blocks_of(network).values()]
    count = len(blocks) // 2
    hooks = [block.register_forward_hook(append) for block in blocks]
    squares = torch.zeros(count, 2, len(PARTS), dtype=torch.float64, device=processes.device)
    shapes = torch.zeros(count, 2, dtype=torch.int64, device=processes.device)
    for batch in batches:
        if len(batch.timesteps) > 0:
            outputs.clear()
            batch.predict(pretrained)
            batch.predict(finetuned)
            for k, (before, after) in enumerate(zip(outputs[:count], outputs[count:], strict=True)):
                shapes[k, 0], shapes[k, 1] = before.shape[1], before[0, 0].numel()
                squares[k] += torch.stack([split_squares(before), split_squares(after - before)])
    for hook in hooks:
        hook.remove()
    shapes = processes.gather(shapes[None]).amax(0)  # a process may have no image
    return processes.reduce(squares, "sum").cpu().numpy(), shapes.cpu().numpy()


def projection_distance(network: Tensors, block: str) -> float:
    """Frobenius distance ‖P − I‖ / ‖I‖ of a block's projection P from the identity; NaN if it has none."""
    if f"{block}{PROJECTION_SUFFIX}" not in network:
        return np.nan
    projection = network[f"{block}{PROJECTION_SUFFIX}"].flatten(1).float()
    identity = torch.eye(len(projection), device=projection.device)
    return float((projection - identity).norm() / identity.norm())


def changes(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much each of PARTS changed relative to itself, and its share of the squared change, from squares (…, 2, 4).

    Both have the shape (…, 4). NaN stands for 0 / 0.
    """
    before, change = squares[..., 0, :], squares[..., 1, :]
    total = change.sum(axis=-1, keepdims=True)
    return np.sqrt(change / np.where(before > 0, before, np.nan)), change / np.where(total > 0, total, np.nan)


def report(arrays: Arrays, material: Material) -> tuple[str, dict[str, Figure]]:
    """The change across channels and positions in each range: means over the blocks, and pictures by block."""
    names, projections, blocks = material.range_names, arrays["projections"], arrays["blocks"].tolist()
    images = f"{material.settings.images} {material.measured_on} images in each range"
    note = f"{images}, seen by pretrained network and expert"
    relative, shares = changes(arrays["squares"])  # (blocks, ranges, 4)
    columns = np.concatenate([relative[..., 1:3], shares, projections[..., None]], axis=-1)
    rows = [[name, *(number(mean_of(v), form=".2%") for v in columns[:, k].T)] for k, name in enumerate(names)]
    titles = ["mean over the blocks", "channel profile changed by", "position profile changed by"]
    titles += ["share of the change: mean", "channels", "positions", "neither alone", "projection from identity"]
    table = headed_table("Channel against spatial change", note, titles, rows)

    places, height = range(len(blocks)), 0.3 * len(blocks)
    left, profiles = grid(len(names), (2.9, 1.6 + height), note, "change, % of the profile", "activations after")
    right, parts = grid(len(names), (2.9, 1.6 + height), note, "% of the squared change", "activations after")
    tick = {"color": "black", "markersize": 16, "markeredgewidth": 2}
    for k, name in enumerate(names):
        profiles[k].plot(100 * relative[:, k, 1], places, "o", color=BLUE, label="channel profile", markersize=7)
        profiles[k].plot(100 * relative[:, k, 2], places, "s", color=PINK, label="position profile", markersize=7)
        widths = 100 * np.nan_to_num(shares[:, k]).T
        for width, end, (label, colour) in zip(widths, widths.cumsum(axis=0), PARTS.items(), strict=True):
            parts[k].barh(places, width, left=end - width, color=colour, label=label)
        in_noise = 100 / arrays["shapes"][:, 1]
        parts[k].plot(in_noise, places, "|", label="one number and channels in white noise", **tick)
        profiles[k].set_title(f"expert of {name}")
        parts[k].set_title(f"expert of {name}")
    parts[0].set_xlim(right=100)
    pictures = {"activation-change": (left, profiles[0]), "activation-shares": (right, parts[0])}
    if np.isfinite(projections).any():
        note, label = "P: the projection after a block, I: the identity", "‖P − I‖ / ‖I‖, %"
        figure, [axes] = grid(1, (6.5, 1.5 + height), note, label, "projection after")
        for k, name in enumerate(names):
            style = {"linestyle": "", "markersize": 7} | model_style(name, k)
            axes.plot(100 * projections[:, k], places, label=name, **style)
        pictures["projections"] = (figure, axes)
    for figure, axes in pictures.values():
        axes.set_xlim(left=0)
        name_rows(figure, axes, blocks, min(5, len(axes.get_legend_handles_labels()[0])))
    return table, {name: figure for name, (figure, _) in pictures.items()}
