"""A training run's curves: one JSON line per logged step, and the same for TensorBoard."""

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from deme.job.files import atomic_file, sync_to_disk, writing


class RunLog:
    """`folder`/log.jsonl and `folder`/logs/, cut back to the step that a run goes on from.

    Args:
        last_step: later lines are dropped, as their steps are done again; so are lines that a crash left unfinished.

    Raises:
        RunError: from all methods, where the disk is full or the like.
    """

    def __init__(self, folder: Path, last_step: int):
        self.file = folder / "log.jsonl"
        with writing(self.file):
            before = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        kept = [f"{line}\n" for line in before.splitlines() if 0 < logged_step(line) <= last_step]
        with atomic_file(self.file) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        with writing(folder / "logs"):
            self.writer = SummaryWriter(folder / "logs", purge_step=last_step + 1)

    def write(self, line: dict[str, float]) -> None:
        """Append a line; it holds the `step`."""
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with writing(self.file):
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
            for name, value in line.items():
                if name != "step":
                    self.writer.add_scalar(name, value, line["step"])
            self.writer.flush()  # what a killed run has logged up to its last checkpoint is not logged again

    def sync(self) -> None:
        """Force it to disk, so that no crash drops lines of steps that are not done again."""
        with writing(self.file):
            sync_to_disk(self.file)

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        with writing(self.file):
            self.writer.close()


def logged_step(line: str) -> int:
    """The step of a line of log.jsonl; 0 where the line is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return 0
