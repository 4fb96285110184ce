"""The objective that costs the most and counts: the distance that evaluate.py measures, on images drawn for it."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from deme.data.samples import as_read
from deme.errors import RunError
from deme.measure.feature_space import FeatureSpace
from deme.measure.features import extract
from deme.measure.metrics import statistics
from deme.measure.scores import DISTANCES
from deme.method.sampling import NetworkAt
from deme.models.drawing import Drawing


class FrechetDistance:
    """The Fréchet distance of images drawn from given seeds, the same for every candidate; nothing is written.

    Args:
        drawing: how they are drawn; its settings' batch_size is that of the network.
        space: which features, and those of the data.
        prompts: of seed i the i-th, in turn; empty where the model takes none.
        resolution: pixels of the images' sides, as they would be on disk.
    """

    name = "fd"

    def __init__(
        self,
        accelerator: Accelerator,
        drawing: Drawing,
        space: FeatureSpace,
        prompts: Sequence[str],
        resolution: int,
    ):
        self.accelerator = accelerator
        self.drawing = drawing
        self.space = space
        self.prompts = prompts
        self.resolution = resolution

    def with_steps(self, num_inference_steps: int) -> "FrechetDistance":
        """The same with another number of sampling steps."""
        settings = replace(self.drawing.settings, num_inference_steps=num_inference_steps)
        drawing = replace(self.drawing, settings=settings)
        return FrechetDistance(self.accelerator, drawing, self.space, self.prompts, self.resolution)

    def passes(self, seeds: range) -> int:
        """UNet passes of the images of these seeds."""
        return len(seeds) * self.drawing.passes

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
        """The distance of the images of these seeds; infinite where one of them is not finite."""
        try:
            features = self.features(network_at, seeds)
        except RunError:
            return math.inf
        return DISTANCES[self.space.name](*statistics(features), self.space.reference.mu, self.space.reference.sigma)
