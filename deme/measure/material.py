"""What the analyses of a run work on: its networks, its images, and what of them is measured already."""

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn

from deme.config.experiment import Config
from deme.config.sections import EXAMPLE_KEYS, range_name
from deme.data.examples import load_examples
from deme.data.images import Examples, TrainingImages
from deme.errors import UserError, naming
from deme.job.arrays import Arrays, Keep, kept
from deme.job.records import ANALYSIS, Record
from deme.measure.noisy import ENCODED_AT_ONCE, Batch, CleanImages, draw_clean, draw_probes, regrouped
from deme.method.projection import with_identity_projections
from deme.method.task_vectors import Tensors, check_compatible
from deme.models.denoisers import load_denoiser, load_scheduler, try_out
from deme.models.encoders import Encoder, load_encoder
from deme.models.inference import freeze
from deme.models.pipelines import common_architecture, denoiser_folder
from deme.models.weights import load_tensors, weights_hash

STREAM = 4  # of the analyses' random draws, beside those of training and of the search


class Material:
    """What the analyses work on. It is loaded when it is first asked for: what is kept already needs none of it.

    Args:
        pretrained: pipeline folder.
        networks: name → UNet folder: pretrained, the experts by their ranges, and others.
        made_of: what tells data, noise schedule and encoders from others.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        pretrained: Path,
        networks: dict[str, Path],
        made_of: dict[str, str],
    ):
        self.config = config
        self.accelerator = accelerator
        self.pretrained = pretrained
        self.networks = networks
        self.made_of = made_of
        self.hashes = {name: weights_hash(folder) for name, folder in networks.items()}
        self.ranges = config.timesteps.ranges
        self.experts = [name for name in map(range_name, self.ranges) if name in networks]
        self.batch_size = config.analyze.batch_size

    def keep(self, name: str, networks: list[str], keys: tuple[str, ...], make: Callable[[], Arrays]) -> Arrays:
        """What `make` gives, kept in NAME.npz.

        Args:
            networks: that it is made from.
            keys: of the section analyze that determine it.
        """
        config = self.config
        made_from: dict[str, Any] = {"seed": config.seed, "ranges": self.ranges}
        made_from |= {f"analyze.{key}": getattr(config.analyze, key) for key in keys}
        made_from |= {f"data.{key}": getattr(config.data, key) for key in EXAMPLE_KEYS}
        made_from |= {"finetune.caption_dropout": config.finetune.caption_dropout}
        made_from |= {"weights": [self.hashes[network] for network in networks]} | self.made_of
        return kept(self.accelerator, config.paths.analysis / f"{name}.npz", Record(ANALYSIS, made_from), make)

    def keep_parts(
        self, name: str, networks: list[str], keys: tuple[str, ...], make: Callable[[Keep], Arrays]
    ) -> Arrays:
        """The same of what is made in parts, each of which is kept in a folder NAME until the whole is there."""

        def keep_part(part: str, make_part: Callable[[], Arrays]) -> Arrays:
            return self.keep(f"{name}/{part}", networks, keys, make_part)

        found = self.keep(name, networks, keys, lambda: make(keep_part))
        if self.accelerator.is_main_process:
            shutil.rmtree(self.config.paths.analysis / name, ignore_errors=True)
        return found

    def tensors(self, name: str) -> Tensors:
        """A network's weights, with identity projections where only others have some."""
        folder = self.networks[name]
        like = load_tensors(self.architecture)
        tensors = with_identity_projections(load_tensors(folder), like)
        with naming(folder):
            check_compatible(like, tensors, name)
            for key, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise UserError(f"tensor {key} holds NaN or infinite values")
        return tensors

    def load(self, name: str) -> nn.Module:
        """A network as it is, on the device, ready to predict."""
        return freeze(load_denoiser(self.networks[name]), self.accelerator.device, "no", may_pack=False)

    @cached_property
    def network(self) -> nn.Module:
        """One of the architecture of all, whose weights change from use to use."""
        return freeze(load_denoiser(self.architecture), self.accelerator.device, "no", may_pack=False)

    @cached_property
    def architecture(self) -> Path:
        """The folder whose config.json is that of all networks, with projections where any has some."""
        return common_architecture(list(self.networks.values()))

    @cached_property
    def scheduler(self) -> DDPMScheduler:
        """The pretrained noise schedule."""
        return load_scheduler(self.pretrained)

    @cached_property
    def encoder(self) -> Encoder:
        """What stands between images and networks."""
        network = load_denoiser(denoiser_folder(self.pretrained))
        encoder = load_encoder(self.pretrained, network)
        try_out(network, self.scheduler, encoder)
        encoder.prepare(self.accelerator.device, "no")
        return encoder

    @cached_property
    def data(self) -> TrainingImages:
        """The images that training sees, and those that it does not."""
        config = self.config
        return load_examples(config, config.finetune, self.encoder, self.made_of, self.accelerator)

    @property
    def measured_on(self) -> str:
        """Which images losses are measured on."""
        return "held-out" if self.config.data.held_out_images > 0 else "training"

    @property
    def measured_images(self) -> Examples:
        """Those images."""
        return self.data.held_out if self.measured_on == "held-out" else self.data.training

    def clean(self, images: Examples, number: int) -> CleanImages:
        """As many as are asked for, or as there are.

        Args:
            number: keeps the random draws of different analyses apart.
        """
        count = min(self.config.analyze.images, len(images) // 2 * 2)
        if count == 0:
            raise UserError(f"data.name={self.config.data.name}: {len(images)} image, an analysis needs at least 2")
        stream = (self.config.seed, STREAM, number)
        return draw_clean(images, self.encoder, self.scheduler, stream, count, self.batch_size, self.accelerator)

    def spread(self, count: int, number: int) -> list[Batch]:
        """This process's share of `count` noisy images, spread evenly over the timesteps, in batches."""
        stream = (self.config.seed, STREAM, number)
        drawn = (self.ranges, stream, range(count), ENCODED_AT_ONCE, self.accelerator)
        return regrouped(draw_probes(self.measured_images, self.encoder, self.scheduler, *drawn), self.batch_size)
