"""How finetuning changes a network's activations: across channels against across positions, the paper's figure 2."""

from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from deme.job.arrays import Arrays
from deme.measure.noisy import Batch
from deme.method.projection import PROJECTION_SUFFIX
from deme.method.task_vectors import Tensors

PARTS = ("mean", "channels", "positions", "both")


def split_squares(activations: torch.Tensor) -> torch.Tensor:
    """The squares of activations, split into four parts that sum to all of them: float64, shape (4,), as PARTS.

    An image's activations a(c, p), c the channel and p the position, are the sum of their mean, of a channel profile
    (the mean over the positions, less the mean), of a position profile (the mean over the channels, less the mean), and
    of what is neither. The four are orthogonal, as in an analysis of variance of two factors.

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
    """The blocks of a UNet by their names, in the order in which they are passed."""
    down = {f"down_blocks.{i}": block for i, block in enumerate(network.down_blocks)}
    mid = {} if network.mid_block is None else {"mid_block": network.mid_block}
    return down | mid | {f"up_blocks.{i}": block for i, block in enumerate(network.up_blocks)}


@torch.no_grad()
def activation_change(
    pretrained: nn.Module, finetuned: nn.Module, batches: Iterable[Batch], accelerator: Accelerator
) -> Arrays:
    """Squares of the activations behind each block, and of what finetuning changed in them.

    Args:
        pretrained, finetuned: of the same architecture, on the device, in eval mode.
        batches: this process's share of the noisy images, which both networks see.

    Returns:
        squares: of the pretrained network's activations, and of the change, split as PARTS: float64, (blocks, 2, 4).
        shapes: numbers of channels and of positions behind each block, shape (blocks, 2).
    """
    outputs: list[dict[str, torch.Tensor]] = [{}, {}]
    hooks = []
    for network, found in zip((pretrained, finetuned), outputs, strict=True):
        for name, block in blocks_of(network).items():

            def remember(_block: nn.Module, _inputs: tuple, output: object, name=name, found=found) -> None:
                found[name] = (output[0] if isinstance(output, tuple) else output).float()  # behind the projection

            hooks.append(block.register_forward_hook(remember))
    names = list(blocks_of(pretrained))
    squares = torch.zeros(len(names), 2, len(PARTS), dtype=torch.float64, device=accelerator.device)
    shapes = torch.zeros(len(names), 2, dtype=torch.int64, device=accelerator.device)
    for batch in batches:
        if len(batch.timesteps) == 0:
            continue
        for network in (pretrained, finetuned):
            batch.predict(network)
        for row, shape, name in zip(squares, shapes, names, strict=True):
            before, after = (found[name] for found in outputs)
            shape[0], shape[1] = before.shape[1], before[0, 0].numel()
            row += torch.stack([split_squares(before), split_squares(after - before)])
    for hook in hooks:
        hook.remove()
    shapes = accelerator.gather(shapes[None]).amax(0)  # a process may have had no image
    return {"squares": accelerator.reduce(squares, "sum").cpu().numpy(), "shapes": shapes.cpu().numpy()}


def relative_change(squares: np.ndarray, part: str) -> np.ndarray:
    """√(squares of the change / squares of the pretrained activations) of one of PARTS: shape (…,); NaN for 0 / 0.

    Of `channels` it says by what share of itself finetuning changed the channel profile; of `positions` likewise.

    Args:
        squares: shape (…, 2, 4).
    """
    before, change = squares[..., 0, PARTS.index(part)], squares[..., 1, PARTS.index(part)]
    return np.sqrt(change / np.where(before > 0, before, np.nan))


def change_shares(squares: np.ndarray) -> np.ndarray:
    """The parts' shares of the squares of the change: shape (…, 4); NaN where nothing changed."""
    change = squares[..., 1, :]
    total = change.sum(axis=-1, keepdims=True)
    return change / np.where(total > 0, total, np.nan)


def projection_distances(network: Tensors) -> dict[str, float]:
    """Block → how far its projection P, C × C, is from the identity, ‖P − I‖ / ‖I‖ in the Frobenius norm; empty where
    there are none.
    """
    found = {}
    for name, weight in network.items():
        if name.endswith(PROJECTION_SUFFIX):
            identity = torch.eye(len(weight), device=weight.device)
            distance = (weight[:, :, 0, 0].float() - identity).norm() / identity.norm()
            found[name.removesuffix(PROJECTION_SUFFIX)] = float(distance)
    return found
