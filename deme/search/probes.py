"""The cheap objectives: weighted squares of a network's predictions on the same noisy images for every candidate."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from deme.errors import UserError
from deme.measure.noisy import Batch
from deme.method.candidates import Candidates

LOSS_BINS = 16  # of timesteps, within which the denoising loss is compared with the pretrained network's
NO_DISTANCE = 1e-10  # of squares, relative to those of the predictions themselves: rounding
PROBES = 3  # what the stream is for, beside those of pretraining and finetuning


class Squares:
    """An objective Σ_i c_i ‖ε_w(x_i) − y_i‖², which is 1 for the pretrained network, over all processes.

    `match` compares with the expert y_i of the range that the timestep belongs to: the mean over the ranges of the
    squared distance relative to the pretrained network's. `loss` compares with what a network is trained to predict:
    the mean over LOSS_BINS bins of timesteps of the denoising loss relative to the pretrained network's.

    Args:
        batches: this process's share of each.
        images: how many they are, over all processes.
    """

    def __init__(self, name: str, batches: Sequence[Batch], images: int, accelerator: Accelerator):
        self.name = name
        self.spent = images * (2 if name == "match" else 1)  # UNet passes that making it took
        self.batches = batches
        self.images = images
        self.accelerator = accelerator

    @property
    def passes(self) -> int:
        """UNet passes of one value."""
        return self.images

    @torch.no_grad()
    def value(self, network: nn.Module) -> float:
        """The objective of a network, on the device, in eval mode; infinite where a prediction is not finite."""
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch in self.batches:
            if len(batch.weights) > 0:
                total += weighted_squares(batch, batch.predict(network)).double()
        value = float(self.accelerator.reduce(total, "sum"))
        return value if math.isfinite(value) else math.inf  # NaN would be the least of all for numpy


def weighted_squares(batch: Batch, prediction: torch.Tensor) -> torch.Tensor:
    """Σ_i c_i ‖prediction_i − y_i‖² of a batch: a scalar."""
    return (batch.weights * (prediction - batch.target).square().flatten(1).sum(1)).sum()


@torch.no_grad()
def make_squares(
    name: str,
    probes: Sequence[Batch],
    candidates: Candidates,
    network: nn.Module,
    num_train_timesteps: int,
    accelerator: Accelerator,
) -> Squares:
    """The objective `match` or `loss` on these noisy images. It takes two passes of each image, or one.

    Args:
        probes: as `draw_probes` gives them.
        network: that candidates are formed in.
    """
    if name == "match":
        targets = [torch.empty_like(batch.target) for batch in probes]
        for number in range(candidates.shape[1]):
            candidates.form_expert(network, number)
            for batch, target in zip(probes, targets, strict=True):
                chosen = batch.ranges == number
                if chosen.any():
                    target[chosen] = batch.part(chosen).predict(network)
        bins = [batch.ranges for batch in probes]
        count = candidates.shape[1]
    else:
        targets = [batch.target for batch in probes]
        bins = [batch.timesteps * LOSS_BINS // num_train_timesteps for batch in probes]
        count = LOSS_BINS
    candidates.form(network, torch.zeros(candidates.shape))
    totals, sizes = (torch.zeros(count, dtype=torch.float64, device=accelerator.device) for _ in range(2))
    images = 0
    for batch, target, places in zip(probes, targets, bins, strict=True):
        if len(places) > 0:
            distances = (batch.predict(network) - target).square().flatten(1).sum(1)
            totals.index_add_(0, places, distances.double())
            sizes.index_add_(0, places, target.square().flatten(1).sum(1).double())
        images += len(places)
    totals, sizes = (accelerator.reduce(part, "sum") for part in (totals, sizes))
    images = int(accelerator.reduce(torch.tensor(images, device=accelerator.device), "sum"))
    empty = (totals <= NO_DISTANCE * sizes).nonzero().flatten().tolist()
    if empty and name == "match":
        raise UserError(f"the expert of range {empty[0]} predicts what the pretrained network does")
    if empty:
        raise UserError(f"no image falls into bin {empty[0]} of {count} bins of timesteps")
    weights = (1 / (count * totals)).float()
    filled = [
        Batch(batch.noisy, batch.timesteps, batch.condition, batch.ranges, target, weights[places])
        for batch, target, places in zip(probes, targets, bins, strict=True)
    ]
    return Squares(name, filled, images, accelerator)
