"""A training run's curves: sums on the device, one JSON line per logged step, and accelerate's trackers."""

import json
import math
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from deme.errors import UserError, one_line
from deme.job.files import atomic_file, sync_to_disk, writing

MAX_SKIPPED_STEPS = 50  # fp16: steps without finite gradients in a row that stop the run
MEASURED = ("loss", "denoising_loss", "consistency_loss", "gradient_norm")


class Meter:
    """Sums over the steps since the last log line, and the first fault. Only `read` and `fault` wait for the device."""

    def __init__(self, accelerator: Accelerator):
        device = accelerator.device
        self.accelerator = accelerator
        self.steps = 0  # since the last log line
        self.since = time.monotonic()
        self.sums = torch.zeros(len(MEASURED), device=device)
        self.first_bad_step = torch.full((), -1, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)  # fp16: in a row, up to now
        self.most_skipped_steps = self.skipped_steps.clone()

    def restart_clock(self) -> None:
        """Leave the time since the last log line out of the speed."""
        self.since = time.monotonic()

    def add(self, step: int, losses: torch.Tensor, gradient_norm: torch.Tensor) -> None:
        """Add an optimizer step.

        Args:
            losses: loss, denoising loss and consistency loss, shape (3,): this process's means.
            gradient_norm: before clipping; the same in every process, and not finite if a loss is not.
        """
        bad = ~torch.isfinite(gradient_norm)
        if self.accelerator.scaler is None:
            self.first_bad_step = torch.where((self.first_bad_step < 0) & bad, step, self.first_bad_step)
        else:  # the loss scaler has skipped the step
            gradient_norm = torch.where(bad, 0, gradient_norm)
            self.skipped_steps = torch.where(bad, self.skipped_steps + 1, 0)
            self.most_skipped_steps = torch.maximum(self.most_skipped_steps, self.skipped_steps)
        self.sums += torch.cat([losses, gradient_norm.detach().reshape(1)])
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means over steps and processes since the last log line, and steps per second."""
        means = (self.accelerator.reduce(self.sums, "mean") / self.steps).tolist()
        speed = self.steps / (time.monotonic() - self.since)
        self.sums.zero_()
        self.steps = 0
        return dict(zip(MEASURED, means, strict=True)) | {"steps_per_second": speed}

    def fault(self, step: int) -> str | None:
        """Why the run can't go on after optimizer step `step`, if it can't."""
        first_bad = int(self.first_bad_step)
        most_skipped = int(self.most_skipped_steps)
        if first_bad >= 0:
            return f"the loss or its gradient is not finite at step {first_bad}"
        if most_skipped >= MAX_SKIPPED_STEPS:
            return f"{most_skipped} steps in a row without finite gradients up to step {step}"
        return None


class RunLog:
    """`folder`/log.jsonl and the trackers, cut back to the step that a run resumes from.

    All methods raise RunError if the disk is full or fails.

    Args:
        last_step: later lines are dropped, as their steps are repeated; so are lines that a crash left incomplete.
        trackers: tensorboard (`folder`/logs/) and wandb (`folder`/wandb/, or its server).
        settings: shown by Weights & Biases beside the curves.
    """

    def __init__(self, folder: Path, last_step: int, trackers: Sequence[str], settings: dict[str, Any]):
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
        """Append a line, which has the key `step`."""
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with writing(self.file):
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
            values = {name: value for name, value in line.items() if name != "step"}
            for tracker in self.trackers:  # they write at once, so a killed run loses and repeats no step
                tracker.log(values, step=line["step"])

    def sync(self) -> None:
        """Force the log to disk, so that a crash loses no line of a step before a checkpoint."""
        with writing(self.file):
            sync_to_disk(self.file)

    def close(self) -> None:
        """Flush and close the trackers."""
        with writing(self.file):
            for tracker in self.trackers:
                tracker.finish()


def logged_step(line: str) -> int:
    """The step of a line of log.jsonl; 0 if the line is incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0


def wandb_tracker(folder: Path, settings: dict[str, Any]) -> WandBTracker:
    """The Weights & Biases run of a folder; the same one after a resume."""
    import wandb

    file = folder / "wandb-id.txt"
    if not file.exists():
        with atomic_file(file) as temporary:
            temporary.write_text(secrets.token_hex(8), encoding="utf-8")
    run_id = file.read_text(encoding="utf-8").strip()
    tracker = WandBTracker("deme", id=run_id, resume="allow", dir=folder, name=str(folder), config=settings)
    try:
        tracker.start()
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {one_line(error)}") from error
    return tracker
