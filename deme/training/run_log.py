"""A training run's curves: one JSON line per logged step, and the same for accelerate's trackers."""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from deme.errors import UserError, one_line
from deme.job.files import atomic_file, sync_to_disk, writing


class RunLog:
    """`folder`/log.jsonl, and what the trackers keep, cut back to the step that a run goes on from.

    Args:
        last_step: later lines are dropped, as their steps are done again; so are lines that a crash left unfinished.
        trackers: tensorboard (`folder`/logs/) and wandb (`folder`/wandb/, or its server).
        settings: that Weights & Biases shows beside the curves.

    Raises:
        RunError: from all methods, where the disk is full or the like.
    """

    def __init__(
        self,
        folder: Path,
        last_step: int,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.file = folder / "log.jsonl"
        with writing(self.file):
            before = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        kept = [f"{line}\n" for line in before.splitlines() if 0 < logged_step(line) <= last_step]
        with atomic_file(self.file) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.trackers: list[GeneralTracker] = []
        with writing(folder / "logs"):
            if "tensorboard" in trackers:
                self.trackers.append(TensorBoardTracker("logs", folder, purge_step=last_step + 1))
                self.trackers[-1].start()
            if "wandb" in trackers:
                self.trackers.append(wandb_tracker(folder, settings))

    def write(self, line: dict[str, float]) -> None:
        """Append a line; it holds the `step`."""
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with writing(self.file):
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
            values = {name: value for name, value in line.items() if name != "step"}
            for tracker in self.trackers:  # which write at once: what a killed run has logged is not logged again
                tracker.log(values, step=line["step"])

    def sync(self) -> None:
        """Force it to disk, so that no crash drops lines of steps that are not done again."""
        with writing(self.file):
            sync_to_disk(self.file)

    def close(self) -> None:
        """Let the trackers write what they have not written yet."""
        with writing(self.file):
            for tracker in self.trackers:
                tracker.finish()


def logged_step(line: str) -> int:
    """The step of a line of log.jsonl; 0 where the line is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0


def wandb_tracker(folder: Path, settings: Mapping[str, Any]) -> WandBTracker:
    """Weights & Biases' run of a folder, which stays the same one after a resume."""
    import wandb

    file = folder / "wandb-id.txt"
    if not file.exists():
        with atomic_file(file) as temporary:
            temporary.write_text(secrets.token_hex(8), encoding="utf-8")
    run_id = file.read_text(encoding="utf-8").strip()
    tracker = WandBTracker("deme", id=run_id, resume="allow", dir=folder, name=str(folder), config=dict(settings))
    try:
        tracker.start()
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {one_line(error)}") from error
    return tracker
