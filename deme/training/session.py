"""Training runs and their records. Imports no torch, so that a finished run is reported at once."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.trainings import Training
from deme.errors import naming
from deme.job.files import checkpoint_steps, make_folder
from deme.job.rank import is_main_process
from deme.job.records import IMAGE_COLUMN, RUN, Record, changes, provenance, read_record


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

    def check_same(self) -> bool:
        """True if the run in the folder has a checkpoint or final weights; one of other settings is refused."""
        before = read_record(RUN, self.folder)
        has_trained = self.output.exists() or checkpoint_steps(self.folder / "checkpoints") != []
        if before is None or not has_trained:
            return False
        free, now = before.beside["free"], self.record.beside["free"]
        allowed = changes(free, {key: now[key] for key in now if key in free})
        also = f"; {', '.join(allowed)} may change" if allowed else ""
        with naming(self.folder):
            before.fits(self.record, self.folder, f"set this back, or give the run another name{also}")
        return True

    def claim(self) -> None:
        """Write the record into the run's folder, also over that of a run without a checkpoint."""
        if not self.check_same():
            make_folder(self.folder, "output_dir")
            self.record.write(self.folder)


class Session:
    """One training command, from its start to its deadline; its settings are config.pretrain or config.finetune."""

    def __init__(self, config: Config, settings: Training):
        self.config, self.settings = config, settings
        self.takes_labels = False  # the network does
        is_installed = "wandb" not in settings.log_with or find_spec("wandb") is not None
        settings.check("log_with", is_installed, "Weights & Biases is not installed: pip install wandb")
        self.deadline = time.monotonic() + 60 * (settings.max_minutes or math.inf)

    def new_run(
        self, objective: Objective, settings: Training, folder: Path, output: Path, made_from: dict, renamed: dict
    ) -> TrainingRun:
        """A run with its record, except for the hashes of the data.

        `made_from`, key → value, determines the weights beside seed, data and settings. `renamed` has the key that the
        value of a setting comes from, if that is another one.
        """
        tagged: dict[str, dict[str, Any]] = {"weights": {}, "free": {}}
        for section, tag in product((self.config.data, settings), tagged):
            is_plain = self.config.data.caption_column is None and not self.takes_labels
            unused = section.tagged("text") if is_plain else {}
            for key, value in section.tagged(tag).items():
                name = f"{section.section}.{key}"
                if key not in unused and name != IMAGE_COLUMN:  # `with_data` adds the one that is read
                    tagged[tag][renamed.get(name, name)] = value
        fixed = {"seed": self.config.seed, **self.config.timesteps.drawn_from}
        beside = {"free": tagged["free"], **provenance(self.config)}
        record = Record(RUN, {**fixed, **tagged["weights"], **made_from}, beside)
        return TrainingRun(objective, settings, folder, output, record)

    @cached_property
    def source(self) -> Any:
        """The data set, opened once."""
        from deme.data.opening import open_source

        return open_source(self.config.data)

    @cached_property
    def data_hashes(self) -> dict[str, str]:
        """SHA-256 of the images with what is read beside them. Imports torch, as nothing else reads images."""
        from deme.data.opening import data_hashes

        return data_hashes(self.source, self.config.paths.image_cache, self.takes_labels, with_captions=True)

    def with_data(self, run: TrainingRun) -> TrainingRun:
        """The run with the hashes of the data in its record."""
        data = self.data_hashes | {IMAGE_COLUMN: self.source.data.image_column}
        return replace(run, record=replace(run.record, made_from=run.record.made_from | data))

    def is_complete(self, run: TrainingRun) -> bool:
        """True, and printed, if the run has written its output."""
        run.check_same()
        if not run.output.exists():
            return False
        self.with_data(run).check_same()
        if is_main_process():
            print(f"{run.output} is complete")
        return True
