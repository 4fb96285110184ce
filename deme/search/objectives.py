"""The objectives: match and loss on noisy images, which are cheap, and fd on images drawn for it, which counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from deme.config.sections import LEAST_CLASSIFIED
from deme.data.samples import as_read
from deme.errors import RunError, UserError
from deme.job.processes import Processes
from deme.measure.features import extract
from deme.measure.noisy import Batch
from deme.measure.reference import FeatureSpace
from deme.measure.scores import frechet_distance, statistics
from deme.method.candidates import Candidates
from deme.method.sampling import NetworkAt
from deme.models.encoders import Drawing

LOSS_BINS = 16  # of timesteps, within which the denoising loss is compared with the pretrained network's
NO_DISTANCE = 1e-10  # of squares, relative to those of the predictions themselves: rounding
JACKKNIFE = 8  # parts of the images (Quenouille 1956)


class Squares:
    """An objective Σ_i c_i ‖ε_w(x_i) − y_i‖², which is 1 for the pretrained network, over all processes.

    `match` compares with the expert y_i of the range that the timestep belongs to: the mean over the ranges of the
    squared distance relative to the pretrained network's. `loss` compares with what a network is trained to predict:
    the mean over LOSS_BINS bins of timesteps of the denoising loss relative to the pretrained network's.

    Args:
        name: match or loss.
        probes: noisy images as `draw_probes` gives them.
        network: in which candidates are formed.
    """

    @torch.no_grad()
    def __init__(
        self,
        name: str,
        probes: Sequence[Batch],
        candidates: Candidates,
        network: nn.Module,
        num_train_timesteps: int,
        processes: Processes,
    ):
        self.name, self.candidates, self.network, self.processes = name, candidates, network, processes
        if name == "match":
            count, bins = candidates.shape[1], [batch.ranges for batch in probes]
            targets = self._expert_predictions(probes)
        else:
            count, bins = LOSS_BINS, [batch.timesteps * LOSS_BINS // num_train_timesteps for batch in probes]
            targets = [batch.target for batch in probes]
        sums = torch.zeros(2, count, dtype=torch.float64, device=processes.device)
        candidates.form(network, torch.zeros(candidates.shape))
        for batch, target, places in zip(probes, targets, bins, strict=True):
            if len(places) > 0:
                for row, difference in zip(sums, (batch.predict(network) - target, target), strict=True):
                    row.index_add_(0, places, difference.square().flatten(1).sum(1).double())
        distances, sizes = processes.reduce(sums, "sum")
        empty = (distances <= NO_DISTANCE * sizes).nonzero().flatten().tolist()
        if empty and name == "match":
            raise UserError(f"the expert of range {empty[0]} predicts what the pretrained network does")
        if empty:
            raise UserError(f"no image falls into bin {empty[0]} of {count} bins of timesteps")
        weights = (1 / (count * distances)).float()
        self.batches = [  # this process's share of each
            replace(batch, target=target, weights=weights[places])
            for batch, target, places in zip(probes, targets, bins, strict=True)
        ]
        # of each batch, in images over all processes
        lengths = torch.tensor(list(map(len, bins)), device=processes.device)
        self.sizes: list[int] = processes.reduce(lengths, "sum").tolist()
        self.images = sum(self.sizes)  # the UNet passes of one value
        self.spent = self.images * (2 if name == "match" else 1)  # UNet passes up to here

    def _expert_predictions(self, probes: Sequence[Batch]) -> list[torch.Tensor]:
        """What the expert of each image's range predicts, per batch."""
        predictions = [torch.empty_like(batch.target) for batch in probes]
        for number in range(self.candidates.shape[1]):
            self.candidates.form_expert(self.network, number)
            for batch, prediction in zip(probes, predictions, strict=True):
                chosen = batch.ranges == number
                if chosen.any():
                    prediction[chosen] = batch.part(chosen).predict(self.network)
        return predictions

    def of_batch(self, batch: Batch) -> torch.Tensor:
        """What a batch adds to the objective of the network as it is: a scalar."""
        return (batch.weights * (batch.predict(self.network) - batch.target).square().flatten(1).sum(1)).sum()

    @torch.no_grad()
    def value(self, coefficients: np.ndarray) -> float:
        """The objective of a candidate; infinite if a prediction is not finite."""
        self.candidates.form(self.network, coefficients)
        added = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for batch in self.batches:
            if len(batch.weights) > 0:
                added += self.of_batch(batch).double()
        value = float(self.processes.reduce(added, "sum"))
        return value if math.isfinite(value) else math.inf  # numpy would take NaN for the lowest


@dataclass(frozen=True, eq=False)
class FrechetDistance:
    """The Fréchet distance of images drawn from given seeds, the same for every candidate; nothing is written.

    With a control it estimates the distance of as many images as the control has from fewer of them. The luck of the
    seeds, such as too many images of a class, does not cancel between candidates, as the distance is not linear in it.
    So mean and covariance of a candidate's features are corrected by how those of the pretrained network differ
    between the same seeds and all seeds (control variates). What candidate and control do not share would still add a
    bias proportional to 1 / images, which the jackknife removes.
    """

    processes: Processes
    drawing: Drawing
    space: FeatureSpace
    prompts: Sequence[str]  # seed i takes the i-th, in turn; empty if the model takes none
    control: np.ndarray | None = None  # features of the pretrained network's images of the first seeds, shape (M, D)
    lucks: dict[int, float] = field(default_factory=dict)  # by number of images, as it takes long to compute

    def with_steps(self, num_inference_steps: int) -> "FrechetDistance":
        """The same with another number of sampling steps and without a control."""
        settings = replace(self.drawing.settings, num_inference_steps=num_inference_steps)
        return replace(self, drawing=replace(self.drawing, settings=settings), control=None)

    def features(self, network_at: NetworkAt, seeds: range) -> np.ndarray:
        """The features of the images of these seeds: float32, shape (N, D), the same in every process.

        Raises:
            RunError: in every process, if an image is not finite.
        """
        settings = self.drawing.settings
        faults: list[RunError] = []

        def draw(part: slice) -> torch.Tensor:
            chosen = list(seeds[part])
            prompts = [self.prompts[seed % len(self.prompts)] for seed in chosen if self.prompts]
            try:
                return as_read(self.drawing.images(network_at, chosen, prompts), settings.size_on_disk)
            except RunError as error:  # the other processes don't know yet
                faults.append(error)
                return torch.zeros(len(chosen), 3, LEAST_CLASSIFIED, LEAST_CLASSIFIED, dtype=torch.uint8)

        features = extract(self.processes, self.space.network, draw, len(seeds), settings.batch_size)
        if self.processes.reduce(torch.tensor(len(faults), device=self.processes.device), "sum") > 0:
            raise faults[0] if faults else RunError("NaN or infinite images in another process")
        return features

    def of_features(self, features: np.ndarray) -> float:
        """The distance of images with these features, shape (N, D); with a control, of the first N of its seeds.

        A covariance of few images can't be corrected. N ≤ 2 D give the control's distance plus the plain difference to
        the pretrained network on the same seeds.
        """
        count, size = features.shape
        if self.control is None or count == len(self.control):
            return self._at(*statistics(features))
        few = self.control[:count]
        if count <= 2 * size:
            if count not in self.lucks:
                self.lucks[count] = self._at(*statistics(few)) - self._at(*self._of_control)
            return self._at(*statistics(features)) - self.lucks[count]

        def corrected(chosen: slice | np.ndarray) -> float:
            parts = zip(statistics(features[chosen]), statistics(few[chosen]), self._of_control, strict=True)
            return self._at(*(own - luck + whole for own, luck, whole in parts))

        part = np.arange(count) % JACKKNIFE
        left_out = [corrected(part != i) for i in range(JACKKNIFE)]
        return JACKKNIFE * corrected(np.s_[:]) - (JACKKNIFE - 1) * float(np.mean(left_out))

    @cached_property
    def _of_control(self) -> tuple[np.ndarray, np.ndarray]:
        return statistics(self.control)

    def _at(self, mu: np.ndarray, sigma: np.ndarray) -> float:
        """The distance of features of this mean and covariance, which may have negative eigenvalues."""
        return frechet_distance(mu, sigma, self.space.reference.mu, self.space.reference.sigma)
