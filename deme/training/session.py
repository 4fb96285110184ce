"""What stands around the training loop in every command that trains: is this the run that stands there, is it complete,
lock, train, write. torch is imported after what can be answered without it."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deme.config.experiment import Config
from deme.config.sections import WEIGHTINGS, Training
from deme.errors import naming
from deme.job.files import atomic_folder, checkpoint_steps, make_folder
from deme.job.locks import clear_lock
from deme.job.records import IMAGE_COLUMN, RUN, Record, changes, provenance, read_record

if TYPE_CHECKING:
    from accelerate import Accelerator

    from deme.training.trainer import Trainer

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
class Run:
    """One training run: where it lies, what it makes, what determines that."""

    folder: Path  # checkpoints, logs and previews
    output: Path  # the folder that it makes
    record: Record

    def reading(self, data_hashes: dict[str, str], image_column: str) -> "Run":
        """The same run, now that it is known which data it reads."""
        made_from = self.record.made_from | data_hashes | {IMAGE_COLUMN: image_column}
        return replace(self, record=replace(self.record, made_from=made_from))


class Session:
    """One command that trains, from its start to its deadline.

    Args:
        settings: config.pretrain or config.finetune.
    """

    def __init__(self, config: Config, settings: Training):
        self.config = config
        self.settings = settings
        there = "wandb" not in settings.log_with or find_spec("wandb") is not None
        settings.check("log_with", there, "Weights & Biases is not installed: pip install wandb")
        self.deadline = None if settings.max_minutes is None else time.monotonic() + 60 * settings.max_minutes

    def run(
        self,
        folder: Path,
        output: Path,
        settings: Training,
        others: dict[str, Any],
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> Run:
        """A run of this command.

        Args:
            settings: the run's own.
            others: what else determines its weights.
            names: of settings whose values come from elsewhere: section.key → what the configuration calls it.
        """
        parts = {part.section: asdict(part) for part in (self.config.data, settings)}
        left_out = {key for key, weightings in OF_WEIGHTING.items() if settings.loss_weighting not in weightings}
        left_out |= set(OF_TEXT) if self.config.data.caption_column is None else set()
        left_out |= {"uncertainty_learning_rate"}  # which the task that it counts for names
        left_out |= {"image_column"}  # which `reading` names
        left_out |= {key for part in parts.values() for key, usual in UNNAMED.items() if part.get(key, ...) == usual}
        values = {
            names.get(f"{section}.{key}", f"{section}.{key}"): value
            for section, part in parts.items()
            for key, value in part.items()
            if key not in left_out
        }
        free = {name: value for name, value in values.items() if name.split(".")[1] in FREE_KEYS}
        made_from = {
            "seed": self.config.seed,
            "timesteps.num_train_timesteps": self.config.timesteps.num_train_timesteps,
            **{name: value for name, value in values.items() if name not in free},
            **others,
        }
        return Run(folder, output, Record(RUN, made_from, {"free": free, **provenance(self.config)}))

    @cached_property
    def data_hashes(self) -> dict[str, str]:
        """What tells the data and its captions from others; torch is imported for it, as nothing else reads images."""
        from deme.data.sources import data_hashes

        return data_hashes(self.config.data, self.config.paths.image_cache, with_captions=True)

    def reading(self, run: Run) -> Run:
        """A run, now that its data has been read."""
        from deme.data.sources import as_opened

        return run.reading(self.data_hashes, as_opened(self.config.data).image_column)

    def is_complete(self, run: Run) -> bool:
        """Whether there is nothing left to do, which is said."""
        check_same_run(run)
        if not run.output.exists():
            return False
        check_same_run(self.reading(run))
        clear_lock(run.folder)
        if os.environ.get("RANK", "0") == "0":  # all processes find the same, before they know each other
            print(f"{run.output} is complete")
        return True

    def train(
        self, accelerator: "Accelerator", run: Run, make_trainer: Callable[[], "Trainer"], write: Callable[[Path], None]
    ) -> "Trainer | None":
        """Train to the end and write the output; None where time was up before, which is said.

        Args:
            write: fills the output's folder.
        """
        from deme.job.processes import in_main_process, locked_by_all

        def finish() -> None:
            with atomic_folder(run.output) as temporary:
                write(temporary)
            print(f"wrote {run.output}")

        with locked_by_all(accelerator, run.folder, "output_dir"):
            in_main_process(accelerator, lambda: claim(run))
            trainer = make_trainer()
            if trainer.run(self.deadline):
                in_main_process(accelerator, finish)
                return trainer
        key = f"{self.settings.section}.max_minutes"
        accelerator.print(f"stopped after {key}={self.settings.max_minutes}; the same command resumes")
        return None


def check_same_run(run: Run) -> None:
    """Compare a run with the one that its folder holds, if any."""
    found = read_record(RUN, run.folder)
    if found is None or not has_trained(run):
        return
    changed = changes(found.made_from, run.record.made_from, RUN.later)
    free = found.beside["free"]
    allowed = changes(free, {key: value for key, value in run.record.beside["free"].items() if key in free})
    remedy = f"set {'it' if len(changed) == 1 else 'them'} back, or give this run another name"
    also = f"; {', '.join(allowed)} may change" if allowed else ""
    with naming(run.folder):
        found.fits(run.record, run.folder, remedy + also)


def has_trained(run: Run) -> bool:
    """Whether a run's folder holds anything that its settings matter to: a checkpoint, or what it makes."""
    return run.output.exists() or checkpoint_steps(run.folder / "checkpoints") != []


def claim(run: Run) -> None:
    """Create a run's folder with its record, or make sure that the run in it is the same.

    One that ended before its first checkpoint, as after running out of memory, starts again under other settings.
    """
    check_same_run(run)
    found = read_record(RUN, run.folder)
    if found is not None and not has_trained(run) and changes(found.made_from, run.record.made_from, RUN.later):
        print(f"{run.folder}: a run of other settings ended before its first checkpoint; it starts again under these")
        found = None
    if found is None:
        make_folder(run.folder, "output_dir")
        run.record.write(run.folder)
