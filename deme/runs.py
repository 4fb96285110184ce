"""A training run's folder and the settings it belongs to."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme.config import Config, Section, Training, UserError
from deme.files import make_folder, read_yaml, write_yaml

if TYPE_CHECKING:
    from accelerate import Accelerator

FREE_TRAINING_KEYS = (  # of the sections data, pretrain and finetune: may change in the middle of a run
    "label_column",
    "cache_gb",
    "gradient_checkpointing",
    "max_minutes",
    "log_every",
    "checkpoint_every",
    "checkpoints_kept",
    "preview_every",
)


def training_inputs(config: Config, settings: Training) -> dict[str, Any]:
    """Everything that determines a training run's weights, flat: a run resumes only where all of it is the same."""
    values = {"seed": config.seed, "timesteps.num_train_timesteps": config.timesteps.num_train_timesteps}
    return values | _flat(lambda key: key not in FREE_TRAINING_KEYS, config.data, settings)


def free_training_settings(config: Config, settings: Training) -> dict[str, Any]:
    """The other settings of a training run, flat: they may change where it is resumed."""
    return _flat(lambda key: key in FREE_TRAINING_KEYS, config.data, settings)


def _flat(wanted: Callable[[str], bool], *parts: Section) -> dict[str, Any]:
    return {f"{part.section}.{key}": value for part in parts for key, value in asdict(part).items() if wanted(key)}


def check_same_run(folder: Path, trained_from: dict, free: dict) -> None:
    """
    Args:
        trained_from: key → value of everything that determines the weights.
        free: key → value of the settings that may change where a run is resumed.

    Raises:
        UserError: the folder holds a run of other settings; names those that differ, and which of them may.
    """
    file = folder / "config.yaml"
    if not file.exists():
        return
    record = read_yaml(file)
    if not all(isinstance(record.get(key), dict) for key in ("trained_from", "free")):
        raise UserError(f"{file}: not the record of a run: trained_from or free is missing")
    changed = _changes(record["trained_from"], trained_from)
    if changed:
        allowed = _changes(record["free"], free)
        remedy = f"set {'it' if len(changed) == 1 else 'them'} back, or give this run another name"
        also = f"; {', '.join(allowed)} may change" if allowed else ""
        raise UserError(f"{folder} holds a run of other settings: {', '.join(changed)}; {remedy}{also}")


def _changes(before: dict, now: dict) -> list[str]:
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return [f"{key}={now.get(key)} (was {before.get(key)})" for key in keys]


def claim_folder(accelerator: "Accelerator", folder: Path, trained_from: dict, free: dict, record: dict) -> None:
    """Create a run's folder with its config.yaml, or make sure that the run in it is the same.

    Args:
        record: provenance, written beside the settings.

    Raises:
        UserError: as check_same_run, or the folder can't be written.
    """
    from deme.devices import in_main_process

    def claim() -> None:
        check_same_run(folder, trained_from, free)
        if not (folder / "config.yaml").exists():
            make_folder(folder, "output_dir")
            write_yaml(folder / "config.yaml", {"trained_from": trained_from, "free": free, **record})

    in_main_process(accelerator, claim)
