"""The objective fd: the distance of few images, corrected by how far the pretrained network's few are from its many."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from deme.config.sections import LEAST_CLASSIFIED, Sample
from deme.data.samples import as_read, in_turn
from deme.errors import RunError
from deme.job.processes import Processes
from deme.measure.features import extract
from deme.measure.scores import FeatureSpace, frechet_distance, statistics
from deme.method.sampling import NetworkAt
from deme.models.drawing import Drawing

JACKKNIFE = 8  # parts of the images (Quenouille 1956)


@dataclass(frozen=True, eq=False)
class FrechetDistance:
    """The Fréchet distance of images drawn from given seeds, the same for every candidate; nothing is written.

    With a control it estimates the distance of as many images as the control has from fewer, whose luck does not cancel
    between candidates. So mean and covariance of a candidate's features are corrected by how those of the pretrained
    network differ between the same seeds and all seeds (control variates). The jackknife removes the bias of what
    candidate and control do not share, which is proportional to 1 / images.
    """

    processes: Processes
    drawing: Drawing
    space: FeatureSpace
    conditions: Sequence[str | int]  # prompts or labels, which seeds take in turn; empty if the model takes none
    control: np.ndarray | None = None  # features of the pretrained network's images of the first seeds, shape (M, D)
    lucks: dict[int, float] = field(default_factory=dict)  # by number of images, as it takes long to compute

    def by(self, sample: Sample) -> "FrechetDistance":
        """The same of images that are drawn as `sample` says, without a control."""
        return replace(self, drawing=replace(self.drawing, settings=sample), control=None, lucks={})

    def features(self, network_at: NetworkAt, seeds: range) -> np.ndarray:
        """The features of the images of these seeds: float32, shape (N, D), the same in every process.

        An image that is not finite raises RunError in every process.
        """
        settings, faults = self.drawing.settings, []

        def draw(part: slice) -> torch.Tensor:
            chosen = list(seeds[part])
            prompts = [*in_turn(self.conditions, chosen).values()]
            try:
                return as_read(self.drawing.images(network_at, chosen, prompts), settings.size_on_disk)
            except RunError as error:  # the other processes don't know yet
                faults.append(error)
                return torch.zeros(len(chosen), 3, LEAST_CLASSIFIED, LEAST_CLASSIFIED, dtype=torch.uint8)

        features = extract(self.processes, self.space.network, draw, range(len(seeds)), settings.batch_size)
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
        if count <= 2 * size:
            if count not in self.lucks:
                self.lucks[count] = self._at(*statistics(self.control[:count])) - self.of_control
            return self._at(*statistics(features)) - self.lucks[count]
        return float(np.mean(self.pseudovalues(features)))

    def pseudovalues(self, features: np.ndarray) -> np.ndarray:
        """Those of the jackknife for the corrected distance, shape (JACKKNIFE,): their mean is the estimate.

        As equal images are left out of each, those of two candidates are paired.
        """
        few = self.control[: len(features)]

        def corrected(chosen: slice | np.ndarray) -> float:
            parts = zip(statistics(features[chosen]), statistics(few[chosen]), self._of_control, strict=True)
            return self._at(*(own - luck + whole for own, luck, whole in parts))

        part = np.arange(len(features)) % JACKKNIFE
        left_out = [corrected(part != i) for i in range(JACKKNIFE)]
        return JACKKNIFE * corrected(np.s_[:]) - (JACKKNIFE - 1) * np.array(left_out)

    @cached_property
    def of_control(self) -> float:
        """The distance of all images of the control."""
        return self._at(*self._of_control)

    @cached_property
    def _of_control(self) -> tuple[np.ndarray, np.ndarray]:
        return statistics(self.control)

    def _at(self, mu: np.ndarray, sigma: np.ndarray) -> float:
        """The distance of features of this mean and covariance, which may have negative eigenvalues."""
        return frechet_distance(mu, sigma, self.space.reference.mu, self.space.reference.sigma)
