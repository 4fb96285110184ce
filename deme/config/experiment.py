"""The whole configuration of an experiment, and what has to hold between its sections."""

from dataclasses import dataclass, field
from pathlib import Path

from deme.config.paths import Paths
from deme.config.section import Section
from deme.config.sections import (
    CONTINUED,
    Data,
    Evaluate,
    Finetune,
    Merge,
    Model,
    Pretrain,
    Sample,
    Timesteps,
)


@dataclass(frozen=True)
class Config(Section):
    """One experiment."""

    name: str = "digits"
    output_dir: str = "runs"
    seed: int = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    timesteps: Timesteps = field(default_factory=Timesteps)
    pretrain: Pretrain = field(default_factory=Pretrain)
    finetune: Finetune = field(default_factory=Finetune)
    merge: Merge = field(default_factory=Merge)
    sample: Sample = field(default_factory=Sample)
    evaluate: Evaluate = field(default_factory=Evaluate)

    def __post_init__(self):
        self.check_seed("seed")
        self.check("name", self.name not in ("", ".", "..") and "/" not in self.name, "must be a plain folder name")
        count = len(self.timesteps.ranges)
        chosen = self.finetune.range
        is_range = isinstance(chosen, int) and 0 <= chosen < count
        self.finetune.check(
            "range", chosen in (None, CONTINUED) or is_range, f"must be null, {CONTINUED}, or one of 0 … {count - 1}"
        )
        measured = self.pretrain.patience is None or self.data.held_out_images > 0
        self.pretrain.check("patience", measured, "needs data.held_out_images above 0")
        total = self.timesteps.num_train_timesteps
        few = self.sample.num_inference_steps <= total
        self.sample.check("num_inference_steps", few, f"must be at most timesteps.num_train_timesteps={total}")
        for given in map(len, self.coefficient_groups.values()):
            self.merge.check("coefficients", given == count, f"{given} coefficients for {count} timestep ranges")

    @property
    def paths(self) -> Paths:
        """Where everything of it lies."""
        return Paths(self)

    @property
    def coefficient_groups(self) -> dict[str, list[float]]:
        """Name pattern → merging coefficients, one per range; a plain list holds for all tensors."""
        coefficients = self.merge.coefficients
        count = len(self.timesteps.ranges)
        if isinstance(coefficients, dict):
            return coefficients
        return {"*": coefficients if coefficients is not None else [1 / count] * count}

    def check_fits(
        self, sample_sizes: dict[Path, int | None], scheduler_folder: Path, num_train_timesteps: int
    ) -> None:
        """Compare networks and a noise schedule with what is configured.

        Args:
            sample_sizes: UNet folder → the resolution that it is made for.
            scheduler_folder: where the noise schedule lies.
            num_train_timesteps: its T.

        Raises:
            UserError: another resolution, another number of timesteps.
        """
        for folder, size in sample_sizes.items():
            fits = size == self.data.resolution
            self.data.check("resolution", fits, f"the UNet in {folder} has sample_size={size}")
        fits = num_train_timesteps == self.timesteps.num_train_timesteps
        self.timesteps.check(
            "num_train_timesteps", fits, f"the scheduler in {scheduler_folder} has {num_train_timesteps}"
        )
