"""What a script reads of models: a pipeline and UNets that work with it, looked at before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deme.config.experiment import Config
from deme.config.sections import Sample
from deme.job.files import Watched, read_json, sha256
from deme.job.records import ENCODER, SCHEDULE
from deme.models.pipelines import (
    SCHEDULER_CONFIG,
    encoder_files,
    encoders_hash,
    num_train_timesteps,
    sample_size,
    scheduler_folder,
    takes_text,
)
from deme.models.weights import weights_files


@dataclass(frozen=True)
class Inputs:
    """A pipeline folder, whose noise schedule and encoders are used, and UNet folders."""

    pipeline: Path
    unets: Sequence[Path]

    @property
    def schedule(self) -> Path:
        """The file of the noise schedule."""
        return scheduler_folder(self.pipeline) / SCHEDULER_CONFIG

    def check_fits(self, config: Config) -> None:
        """Compare resolution and number of timesteps with what is configured."""
        sizes = {folder: sample_size(folder, self.pipeline) for folder in self.unets}
        config.check_fits(sizes, scheduler_folder(self.pipeline), num_train_timesteps(self.pipeline))

    def watched(self, *more: Path) -> Watched:
        """The files that are read for their hash and for their content, and others."""
        weights = [file for folder in self.unets for file in weights_files(folder)]
        return Watched([*weights, self.schedule, *encoder_files(self.pipeline).values(), *more])

    def hashes(self) -> dict[str, str]:
        """What tells the noise schedule, and the encoders of a text-to-image pipeline, from others."""
        found = {SCHEDULE: sha256(self.schedule)}
        return found | ({ENCODER: encoders_hash(self.pipeline)} if takes_text(self.pipeline) else {})

    def spacing(self, settings: Sample) -> dict[str, str]:
        """What tells images by the spacing of their timesteps from those of the time before it could be set: nothing
        where it is what it was then, "leading" for DDIM and the schedule's for other samplers."""
        given = settings.timestep_spacing
        if settings.is_ddim:
            given = given or read_json(self.schedule).get("timestep_spacing", "leading")
            given = None if given == "leading" else given
        return {} if given is None else {"sample.timestep_spacing": given}
