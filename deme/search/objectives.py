"""The objectives: match and loss on noisy images, which are cheap, and fd on images drawn for it, which counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from deme.data.samples import as_read
from deme.errors import RunError, UserError
from deme.job.processes import Processes
from deme.measure.features import extract
from deme.measure.metrics import frechet_distance, statistics
from deme.measure.noisy import Batch
from deme.measure.reference import FeatureSpace
from deme.method.candidates import Candidates
from deme.method.sampling import NetworkAt
from deme.models.encoders import Drawing

LOSS_BINS = 16  # of timesteps, within which the denoising loss is compared with the pretrained network's
NO_DISTANCE = 1e-10  # of squares, relative to those of the predictions themselves: rounding
JACKKNIFE = 8  # parts of the images (Quenouille 1956)


@dataclass(frozen=True, eq=False)
class Squares:
    """An objective Σ_i c_i ‖ε_w(x_i) − y_i‖², which is 1 for the pretrained network, over all processes.

    `match` compares with the expert y_i of the range that the timestep belongs to: the mean over the ranges of the
    squared distance relative to the pretrained network's. `loss` compares with what a network is trained to predict:
    the mean over LOSS_BINS bins of timesteps of the denoising loss relative to the pretrained network's.
    """

    name: str  # match or loss
    batches: Sequence[Batch]  # this process's share of each
    images: int  # over all processes; the UNet passes of one value
    candidates: Candidates
    network: nn.Module  # in which candidates are formed
    processes: Processes

    @property
    def spent(self) -> int:
        """UNet passes that making the objective took."""
        return self.images * (2 if self.name == "match" else 1)

    @torch.no_grad()
    def value(self, coefficients: np.ndarray) -> float:
        """The objective of a candidate; infinite if a prediction is not finite."""
        self.candidates.form(self.network, coefficients)
        added = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for batch in self.batches:
            if len(batch.weights) > 0:
                added += weighted_squares(batch, batch.predict(self.network)).double()
        value = float(self.processes.reduce(added, "sum"))
        return value if math.isfinite(value) else math.inf  # numpy would take NaN for the lowest


def total(processes: Processes, count: int) -> int:
    """The sum of a count over all processes."""
    return int(processes.reduce(torch.tensor(count, device=processes.device), "sum"))


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
    processes: Processes,
) -> Squares:
    """The objective `match` or `loss` on these noisy images, as `draw_probes` gives them."""
    if name == "match":
        targets = _expert_predictions(probes, candidates, network)
        bins = [batch.ranges for batch in probes]
        count = candidates.shape[1]
    else:
        targets = [batch.target for batch in probes]
        bins = [batch.timesteps * LOSS_BINS // num_train_timesteps for batch in probes]
        count = LOSS_BINS
    candidates.form(network, torch.zeros(candidates.shape))
    totals, sizes = (torch.zeros(count, dtype=torch.float64, device=processes.device) for _ in range(2))
    for batch, target, places in zip(probes, targets, bins, strict=True):
        if len(places) > 0:
            distances = (batch.predict(network) - target).square().flatten(1).sum(1)
            totals.index_add_(0, places, distances.double())
            sizes.index_add_(0, places, target.square().flatten(1).sum(1).double())
    totals, sizes = (processes.reduce(part, "sum") for part in (totals, sizes))
    empty = (totals <= NO_DISTANCE * sizes).nonzero().flatten().tolist()
    if empty and name == "match":
        raise UserError(f"the expert of range {empty[0]} predicts what the pretrained network does")
    if empty:
        raise UserError(f"no image falls into bin {empty[0]} of {count} bins of timesteps")
    weights = (1 / (count * totals)).float()
    batches = [
        replace(batch, target=target, weights=weights[places])
        for batch, target, places in zip(probes, targets, bins, strict=True)
    ]
    return Squares(name, batches, total(processes, sum(map(len, bins))), candidates, network, processes)


def _expert_predictions(probes: Sequence[Batch], candidates: Candidates, network: nn.Module) -> list[torch.Tensor]:
    """What the expert of each image's range predicts, per batch."""
    predictions = [torch.empty_like(batch.target) for batch in probes]
    for number in range(candidates.shape[1]):
        candidates.form_expert(network, number)
        for batch, prediction in zip(probes, predictions, strict=True):
            chosen = batch.ranges == number
            if chosen.any():
                prediction[chosen] = batch.part(chosen).predict(network)
    return predictions


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
    resolution: int  # pixels of the images' sides on disk
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
            chosen = seeds[part]
            prompts = [self.prompts[seed % len(self.prompts)] for seed in chosen if self.prompts]
            try:
                images = self.drawing.images(network_at, list(chosen), prompts)
            except RunError as error:  # the other processes don't know yet
                faults.append(error)
                return torch.zeros(len(chosen), 3, self.resolution, self.resolution, dtype=torch.uint8)
            return as_read(images, settings.size_on_disk)

        features = extract(self.processes, self.space.network, draw, len(seeds), settings.batch_size)
        if total(self.processes, len(faults)) > 0:
            raise faults[0] if faults else RunError("NaN or infinite images in another process")
        return features

    def value(self, network_at: NetworkAt, seeds: range) -> float:
        """The distance of the images of these seeds, with a control its first; infinite if an image is not finite."""
        try:
            return self.of_features(self.features(network_at, seeds))
        except RunError:
            return math.inf

    def of_features(self, features: np.ndarray) -> float:
        """The distance of images with these features, shape (N, D); with a control, of the first N of its seeds.

        A covariance of few images can't be corrected. N ≤ 2 D give the control's distance plus the plain difference to
        the pretrained network on the same seeds.
        """
        if self.control is None or len(features) == len(self.control):
            return self._at(*statistics(features))
        few = self.control[: len(features)]
        if len(features) <= 2 * features.shape[1]:
            return self._at(*statistics(features)) - self._luck(few)
        left_out = [
            self._corrected(*(np.delete(part, np.s_[i::JACKKNIFE], axis=0) for part in (features, few)))
            for i in range(JACKKNIFE)
        ]
        return JACKKNIFE * self._corrected(features, few) - (JACKKNIFE - 1) * float(np.mean(left_out))

    @cached_property
    def _of_control(self) -> tuple[np.ndarray, np.ndarray]:
        return statistics(self.control)

    def _luck(self, few: np.ndarray) -> float:
        """By how much the distance of the control's first images exceeds that of all."""
        if len(few) not in self.lucks:
            self.lucks[len(few)] = self._at(*statistics(few)) - self._at(*self._of_control)
        return self.lucks[len(few)]

    def _corrected(self, features: np.ndarray, few: np.ndarray) -> float:
        """The distance with the control's correction; `few` are the control's features of the same seeds."""
        parts = zip(statistics(features), statistics(few), self._of_control, strict=True)
        return self._at(*(own - luck + whole for own, luck, whole in parts))

    def _at(self, mu: np.ndarray, sigma: np.ndarray) -> float:
        """The distance of features of this mean and covariance, which may have negative eigenvalues."""
        return frechet_distance(mu, sigma, self.space.reference.mu, self.space.reference.sigma)
