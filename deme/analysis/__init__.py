"""The analyses of analyze.py, one module each, and what they work on. Each module has the same two functions:

measure(material) -> arrays by name, kept in the analysis folder
report(arrays, material) -> tables as Markdown, and figures by name
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from deme.config.experiment import Config
from deme.config.networks import is_lora
from deme.data.decoding import Source
from deme.data.examples import load_examples
from deme.errors import naming
from deme.job.processes import Processes, kept
from deme.job.records import Arrays, Keep
from deme.measure.noisy import ENCODED_AT_ONCE, Batch, CleanImages, Noiser, draw_probes, regrouped
from deme.method.process import process_of
from deme.method.projection import with_identity_projections
from deme.method.task_vectors import Tensors, check_compatible, check_finite
from deme.models.denoisers import freeze, load_denoiser, load_scheduler
from deme.models.encoder_loading import load_encoder, try_out
from deme.models.merging import load_changed
from deme.models.pipelines import denoiser_folder
from deme.models.variants import common_architecture
from deme.models.weights import load_tensors, weights_hash

STREAM = 4  # of the analyses' random draws, apart from those of training and of the search


@dataclass
class Material:
    """A run's networks and images, loaded on demand: arrays that are kept need neither."""

    config: Config
    processes: Processes
    pretrained: Path  # pipeline folder
    networks: dict[str, Path]  # denoiser folders, or LoRAs, by name: "pretrained", the experts, other models
    source: Source
    made_of: dict[str, str]  # hashes of the data, the noise schedule and the encoders

    def __post_init__(self):
        self.settings = self.config.analyze
        self.hashes = {name: weights_hash(folder) for name, folder in self.networks.items()}
        self.ranges = self.config.timesteps.ranges
        self.range_names = self.config.timesteps.names  # their experts' names, too
        self.experts = list(self.config.analyzed_experts)  # the names of those networks
        self.timesteps = self.config.analyzed_timesteps
        inside = [[low <= timestep < high for timestep in self.timesteps] for low, high in self.ranges]
        self.inside = np.array(inside)  # masks (ranges, timesteps)
        # a folder; a LoRA has that of the pretrained network
        self.architecture = common_architecture([path for path in self.networks.values() if not is_lora(path)])
        self.measured_on = "held-out" if self.config.data.held_out_images > 0 else "training"  # images, for losses

    def keep(self, name: str, networks: list[str], make: Callable[[Keep], Arrays]) -> Arrays:
        """The arrays in NAME.npz if they are up to date, else those that `make` returns, measured on these networks.

        The name is an analysis, whose tag the settings have that it depends on, perhaps with -PART. `make` gets a
        function that keeps parts in a folder NAME until the whole is there.
        """
        config = self.config
        made_from = {
            "seed": config.seed,
            "ranges": self.ranges,
            **{f"analyze.{key}": value for key, value in self.settings.tagged(name.partition("-")[0]).items()},
            **{f"data.{key}": value for key, value in config.data.tagged("examples").items()},
            **{f"finetune.{key}": value for key, value in config.finetune.tagged("examples").items()},
            "weights": [self.hashes[network] for network in networks],
            **self.made_of,
        }
        parts = config.paths.analysis / name

        def keep_part(part: str, make_part: Callable[[], Arrays]) -> Arrays:
            return kept(self.processes, parts / f"{part}.npz", made_from, make_part)

        arrays = kept(self.processes, parts.with_name(f"{name}.npz"), made_from, lambda: make(keep_part))
        if self.processes.is_main_process:
            shutil.rmtree(parts, ignore_errors=True)
        return arrays

    def tensors(self, name: str) -> Tensors:
        """A network's weights, with identity projections if only other networks have projections."""
        folder = self.networks[name]
        like = load_tensors(self.architecture)
        tensors = with_identity_projections(load_changed(self.pretrained, folder), like)
        with naming(folder):
            check_compatible(like, tensors, name)
        for key, tensor in tensors.items():
            check_finite(str(folder), key, tensor)
        return tensors

    def load(self, folder: Path) -> nn.Module:
        """The network in a folder, on the device, ready to predict; its weights may be changed."""
        return freeze(load_denoiser(folder), self.processes.device, "no", may_pack=False)

    @cached_property
    def network(self) -> nn.Module:
        """A network of the common architecture, which every analysis fills with weights of its own."""
        return self.load(self.architecture)

    @cached_property
    def noisers(self) -> dict[str, Noiser]:
        """What adds noise to the training images, and to the held-out ones."""
        config, processes = self.config, self.processes
        network = load_denoiser(denoiser_folder(self.pretrained))
        process = process_of(load_scheduler(self.pretrained))
        encoder = load_encoder(self.pretrained, network)
        try_out(network, process, encoder)
        encoder.prepare(processes.device, "no")
        data = load_examples(config, config.finetune, self.source, encoder, self.made_of, processes)
        parts = {"training": data.training, "held-out": data.held_out}
        return {name: Noiser(images, encoder, process, processes) for name, images in parts.items()}

    def clean(self, images: str, number: int) -> CleanImages:
        """`analyze.images` of the training or the held-out images, or all of fewer; `number` seeds the draws."""
        noiser = self.noisers[images]
        count = min(self.settings.images, len(noiser.images) // 2 * 2)
        enough = f"{len(noiser.images)} image, an analysis needs at least 2"
        self.config.data.check("name", count > 0, enough)
        return CleanImages(noiser, (self.config.seed, STREAM, number), count, self.settings.batch_size)

    def spread(self, count: int, number: int) -> list[Batch]:
        """This process's share of `count` noisy images, spread evenly over the timesteps, in batches."""
        stream = (self.config.seed, STREAM, number)
        probes = draw_probes(self.noisers[self.measured_on], self.ranges, stream, range(count), ENCODED_AT_ONCE)
        return regrouped(probes, self.settings.batch_size)
