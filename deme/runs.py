"""A training run's folder and the settings it belongs to."""

from pathlib import Path
from typing import TYPE_CHECKING

from deme.config import UserError
from deme.files import make_folder, read_yaml, write_yaml

if TYPE_CHECKING:
    from accelerate import Accelerator


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
