"""What is measured of each optimizer step, kept on the device: reading it, and waiting for it, is left to log lines."""

import time

import torch
from accelerate import Accelerator

MAX_SKIPPED_STEPS = 50  # fp16: steps without finite gradients in a row that stop the run
MEASURED = ("loss", "denoising_loss", "consistency_loss", "gradient_norm")


class Meter:
    """Sums over the steps since the last log line, and what went wrong in them."""

    def __init__(self, accelerator: Accelerator):
        device = accelerator.device
        self.accelerator = accelerator
        self.steps = 0  # since the last log line
        self.since = time.monotonic()
        self.sums = torch.zeros(len(MEASURED), device=device)
        self.first_bad_step = torch.full((), -1, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)  # fp16: in a row, up to now
        self.most_skipped_steps = self.skipped_steps.clone()

    def start(self, skipped_steps: int) -> None:
        """Begin to measure.

        Args:
            skipped_steps: in a row, before the first step.
        """
        self.skipped_steps.fill_(skipped_steps)
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done since the last log line was not training."""
        self.since = time.monotonic()

    def add(self, step: int, losses: torch.Tensor, gradient_norm: torch.Tensor) -> None:
        """Take in a step that is done.

        Args:
            losses: loss, denoising loss, consistency loss, shape (3,): this process's means.
            gradient_norm: before clipping; the same in every process, and not finite where a loss is not.
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
        """Means over the steps and processes since the last log line, and steps per second; waits for the device."""
        means = (self.accelerator.reduce(self.sums, "mean") / self.steps).tolist()
        speed = self.steps / (time.monotonic() - self.since)
        self.sums.zero_()
        self.steps = 0
        return dict(zip(MEASURED, means, strict=True)) | {"steps_per_second": speed}

    def fault(self, step: int) -> str | None:
        """What makes going on pointless, if anything; waits for the device.

        Args:
            step: optimizer steps done.
        """
        first_bad = int(self.first_bad_step)
        most_skipped = int(self.most_skipped_steps)
        if first_bad >= 0:
            return f"the loss or its gradient is not finite at step {first_bad}"
        if most_skipped >= MAX_SKIPPED_STEPS:
            return f"{most_skipped} steps in a row without finite gradients up to step {step}"
        return None
