"""The record and the completeness of a training run. Imports no torch, so that a finished run is reported at once."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deme.config.experiment import Config
from deme.config.sections import WEIGHTINGS, Training
from deme.errors import naming
from deme.job.files import checkpoint_steps, make_folder
from deme.job.locks import clear_lock
from deme.job.records import IMAGE_COLUMN, RUN, Record, changes, provenance, read_record

FREE_KEYS = (  # of the sections data, pretrain and finetune: may change in the middle of a run
    "label_column",
    "cache_gb",
    "cache_disk_gb",
    "gradient_checkpointing",
    "max_minutes",
    "log_every",
    "log_with",
    "checkpoint_every",
    "checkpoints_kept",
    "preview_every",
    "preview_prompts",
)
OF_WEIGHTING = {  # settings that count with some weightings of the loss alone
    "normalize_loss_weighting": WEIGHTINGS,
    "min_snr_gamma": ("min_snr",),
    "p2_k": ("p2",),
    "p2_gamma": ("p2",),
}
UNNAMED = {"loss_weighting": None, "antithetic": True, "skip_uncaptioned": False}  # usual, so older records lack them
OF_TEXT = ("caption_column", "skip_uncaptioned", "cache_latents", "cached_views", "caption_dropout")  # alone
OF_TEXT += ("preview_prompts", "encoders")


@dataclass(frozen=True)
class Objective:
    """Which timesteps a run trains on, and which losses it minimizes."""

    name: str  # for messages: "0000-0250"
    stream: tuple[int, ...]  # of random draws; (seed, 3) is that of search.py
    ranges: Sequence[tuple[int, int]]  # of timesteps; a micro-batch is spread evenly over them
    global_probability: float = 0.0  # p
    denoising_weight: float = 1.0
    consistency_weight: float = 0.0  # λ
    uncertainty_learning_rate: float | None = None  # of learned loss weights, one per range (ANT-UW); None: not learned


@dataclass(frozen=True)
class TrainingRun:
    """One training run, and everything that determines its weights."""

    objective: Objective
    settings: Training
    folder: Path  # checkpoints, logs and previews
    output: Path  # the folder that it writes at its end
    record: Record

    @property
    def has_trained(self) -> bool:
        """True if the run has a checkpoint or final weights."""
        return self.output.exists() or checkpoint_steps(self.folder / "checkpoints") != []

    def check_same(self) -> None:
        """Compare the run with the one in its folder, if any."""
        found = read_record(RUN, self.folder)
        if found is None or not self.has_trained:
            return
        changed = changes(found.made_from, self.record.made_from, RUN.later)
        free = found.beside["free"]
        allowed = changes(free, {key: value for key, value in self.record.beside["free"].items() if key in free})
        remedy = f"set {'it' if len(changed) == 1 else 'them'} back, or give this run another name"
        also = f"; {', '.join(allowed)} may change" if allowed else ""
        with naming(self.folder):
            found.fits(self.record, self.folder, remedy + also)

    def claim(self) -> None:
        """Create the run's folder with its record, or check that the run in it is the same.

        A run without a checkpoint, for example after running out of memory, is replaced.
        """
        self.check_same()
        found = read_record(RUN, self.folder)
        if found is not None and not self.has_trained and changes(found.made_from, self.record.made_from, RUN.later):
            print(f"{self.folder}: a run of other settings ended before its first checkpoint; starting again")
            found = None
        if found is None:
            make_folder(self.folder, "output_dir")
            self.record.write(self.folder)


class Session:
    """One training command, from its start to its deadline.

    Args:
        settings: config.pretrain or config.finetune.
    """

    def __init__(self, config: Config, settings: Training):
        self.config = config
        self.settings = settings
        is_installed = "wandb" not in settings.log_with or find_spec("wandb") is not None
        settings.check("log_with", is_installed, "Weights & Biases is not installed: pip install wandb")
        self.deadline = None if settings.max_minutes is None else time.monotonic() + 60 * settings.max_minutes

    def new_run(
        self,
        objective: Objective,
        settings: Training,
        folder: Path,
        output: Path,
        made_from: dict[str, Any],
        renamed: Mapping[str, str] = MappingProxyType({}),
    ) -> TrainingRun:
        """A run with its record, except for the hashes of the data.

        Args:
            made_from: what determines the weights beside seed, data and settings.
            renamed: section.key of a setting → the key that its value comes from.
        """
        parts = {part.section: asdict(part) for part in (self.config.data, settings)}
        left_out = {key for key, weightings in OF_WEIGHTING.items() if settings.loss_weighting not in weightings}
        left_out |= set(OF_TEXT) if self.config.data.caption_column is None else set()
        left_out |= {"uncertainty_learning_rate"}  # in `made_from` where it is used
        left_out |= {"image_column"}  # added with the hashes of the data
        left_out |= {key for part in parts.values() for key, usual in UNNAMED.items() if part.get(key, ...) == usual}
        values = {
            renamed.get(f"{section}.{key}", f"{section}.{key}"): value
            for section, part in parts.items()
            for key, value in part.items()
            if key not in left_out
        }
        free = {name: value for name, value in values.items() if name.split(".")[1] in FREE_KEYS}
        made_from = {
            "seed": self.config.seed,
            "timesteps.num_train_timesteps": self.config.timesteps.num_train_timesteps,
            **{name: value for name, value in values.items() if name not in free},
            **made_from,
        }
        record = Record(RUN, made_from, {"free": free, **provenance(self.config)})
        return TrainingRun(objective, settings, folder, output, record)

    @cached_property
    def data_hashes(self) -> dict[str, str]:
        """SHA-256 of the images and captions. Imports torch, as nothing else reads images."""
        from deme.data.sources import data_hashes

        return data_hashes(self.config.data, self.config.paths.image_cache, with_captions=True)

    def with_data(self, run: TrainingRun) -> TrainingRun:
        """The run with the hashes of the data in its record."""
        from deme.data.opening import open_source

        made_from = run.record.made_from | self.data_hashes
        made_from[IMAGE_COLUMN] = open_source(self.config.data).data.image_column
        return replace(run, record=replace(run.record, made_from=made_from))

    def is_complete(self, run: TrainingRun) -> bool:
        """True, and printed, if the run has written its output."""
        run.check_same()
        if not run.output.exists():
            return False
        self.with_data(run).check_same()
        clear_lock(run.folder)
        if os.environ.get("RANK", "0") == "0":  # accelerate is not imported yet
            print(f"{run.output} is complete")
        return True
