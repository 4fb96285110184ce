"""A training run's folder and the settings it belongs to."""

from pathlib import Path

from accelerate import Accelerator

from deme.config import UserError
from deme.files import make_folder, read_yaml, write_yaml


def check_same_run(folder: Path, trained_from: dict) -> None:
    """
    Args:
        trained_from: key → value of everything that determines the weights.

    Raises:
        UserError: the folder holds a run of other settings; names those that differ.
    """
    file = folder / "config.yaml"
    if not file.exists():
        return
    before = read_yaml(file).get("trained_from", {})
    changed = [
        f"{key}={trained_from.get(key)} (was {before.get(key)})"
        for key in sorted({*before, *trained_from})
        if before.get(key) != trained_from.get(key)
    ]
    if changed:
        raise UserError(f"{folder} holds a run of other settings: {', '.join(changed)}; change name or delete it")


def claim_folder(accelerator: Accelerator, folder: Path, trained_from: dict, record: dict) -> None:
    """Create a run's folder with its config.yaml, or make sure that the run in it is the same.

    Args:
        record: provenance, written beside `trained_from`.

    Raises:
        UserError: as check_same_run, or the folder can't be written.
    """
    check_same_run(folder, trained_from)
    accelerator.wait_for_everyone()
    file = folder / "config.yaml"
    if accelerator.is_main_process and not file.exists():
        make_folder(folder, "output_dir")
        write_yaml(file, {"trained_from": trained_from, **record})
    accelerator.wait_for_everyone()
