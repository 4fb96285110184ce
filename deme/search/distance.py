"""The objective that costs the most and counts: the distance that evaluate.py measures, on images drawn for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator

from deme.data.samples import as_read
from deme.errors import RunError
from deme.measure.feature_space import FeatureSpace
from deme.measure.features import extract
from deme.measure.metrics import frechet_distance, statistics
from deme.method.sampling import NetworkAt
from deme.models.drawing import Drawing

JACKKNIFE = 8  # parts of the images (Quenouille 1956)


@dataclass(frozen=True, eq=False)
class FrechetDistance:
    """The Fréchet distance of images drawn from given seeds, the same for every candidate; nothing is written.

    With a control it is an estimate of the distance of as many images as that has, from fewer of them. The seeds' own
    luck, such as too many images of a class, does not cancel between candidates, as the distance is not linear in it:
    so mean and covariance of a candidate's features are corrected by what those of the same seeds differ from those of
    all for the pretrained network (control variates). What candidate and control do not share would still add to the
    distance, the more the further they are apart; as that is proportional to 1 / images, the jackknife removes it.

    Args:
        drawing: how they are drawn; its settings' batch_size is that of the network.
        space: which features, and those of the data.
        prompts: of seed i the i-th, in turn; empty where the model takes none.
        resolution: pixels of the images' sides, as they would be on disk.
        control: features of the pretrained network's images, of the first seeds in order, shape (M, D).
    """

    accelerator: Accelerator
    drawing: Drawing
    space: FeatureSpace
    prompts: Sequence[str]
    resolution: int
    control: np.ndarray | None = None

    def with_steps(self, num_inference_steps: int) -> "FrechetDistance":
        """The same with another number of sampling steps, and without a control."""
        settings = replace(self.drawing.settings, num_inference_steps=num_inference_steps)
        return replace(self, drawing=replace(self.drawing, settings=settings), control=None)

    def passes(self, images: int) -> int:
        """UNet passes of so many images."""
        return images * self.drawing.passes

    def features(self, network_at: NetworkAt, seeds: range) -> np.ndarray:
        """The features of the images of these seeds: float32, shape (N, D), the same in every process.

        Raises:
            RunError: an image that is not finite, in every process.
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

        features = extract(self.accelerator, self.space.network, draw, len(seeds), settings.batch_size)
        total = self.accelerator.reduce(torch.tensor(len(faults), device=self.accelerator.device), "sum")
        if int(total) > 0:
            raise faults[0] if faults else RunError("NaN or infinite images in another process")
        return features

    def value(self, network_at: NetworkAt, seeds: range) -> float:
        """The distance of the images of these seeds; infinite where one of them is not finite.

        Args:
            seeds: with a control, the first of its.
        """
        try:
            features = self.features(network_at, seeds)
        except RunError:
            return math.inf
        return self.of_features(features)

    def of_features(self, features: np.ndarray) -> float:
        """The distance of images with these features, shape (N, D); with a control, of the first N of its seeds.

        A covariance of few images can't be corrected; N ≤ 2 D give the plain difference to the pretrained network on
        the same seeds instead, on top of that one's distance.
        """
        if self.control is None or len(features) == len(self.control):
            return self._at(*statistics(features))
        few = self.control[: len(features)]
        if len(features) <= 2 * features.shape[1]:
            return self._at(*statistics(features)) - self._luck(len(features))
        left_out = [
            self._corrected(*(np.delete(part, np.s_[i::JACKKNIFE], axis=0) for part in (features, few)))
            for i in range(JACKKNIFE)
        ]
        return JACKKNIFE * self._corrected(features, few) - (JACKKNIFE - 1) * float(np.mean(left_out))

    @cached_property
    def of_control(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the control's features."""
        return statistics(self.control)

    @cached_property
    def _known_luck(self) -> dict[int, float]:
        return {}

    def _luck(self, count: int) -> float:
        """What the distance of the control's first images exceeds that of all by; computed once."""
        if count not in self._known_luck:
            self._known_luck[count] = self._at(*statistics(self.control[:count])) - self._at(*self.of_control)
        return self._known_luck[count]

    def _corrected(self, features: np.ndarray, few: np.ndarray) -> float:
        """The distance with the control's correction.

        Args:
            few: the control's features of the same seeds.
        """
        parts = zip(statistics(features), statistics(few), self.of_control, strict=True)
        return self._at(*(own - luck + whole for own, luck, whole in parts))

    def _at(self, mu: np.ndarray, sigma: np.ndarray) -> float:
        """The distance of features of this mean and covariance, which may have negative eigenvalues."""
        return frechet_distance(mu, sigma, self.space.reference.mu, self.space.reference.sigma)
