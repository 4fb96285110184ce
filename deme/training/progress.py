"""What a run shows of itself: losses, a log and trackers, the loss on held-out images, preview images."""

import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from deme.config.sections import Sample
from deme.config.trainings import Training
from deme.data.examples import Examples
from deme.data.opening import torch_seed
from deme.data.samples import save_grid
from deme.errors import UserError, one_line
from deme.job.files import make_folder, write_text, writing
from deme.method.losses import decoupled_loss
from deme.models.drawing import Drawing
from deme.training.state import Networks

MAX_SKIPPED_STEPS = 50  # fp16: steps without finite gradients in a row that stop the run
MEASURED = ("loss", "denoising_loss", "consistency_loss", "gradient_norm")
NOISE = 2  # the purpose that the seeds of held_out_loss name
PREVIEW_IMAGES = 64  # of a network that takes no text
PREVIEW_STEPS = 50


class Meter:
    """Sums over the steps since the last log line, and the first fault. Only `read` and `fault` wait for the device."""

    def __init__(self, accelerator: Accelerator):
        device = accelerator.device
        self.accelerator = accelerator
        self.steps = 0  # since the last log line
        self.sums = torch.zeros(len(MEASURED), device=device)
        self.first_bad_step = torch.full((), -1, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)  # fp16: in a row, up to now
        self.most_skipped_steps = self.skipped_steps.clone()

    def start_step(self) -> None:
        """Start the clock with the first step since the last log line: what lies between was no training."""
        if self.steps == 0:
            self.since = time.monotonic()

    def add(self, step: int, losses: torch.Tensor, gradient_norm: torch.Tensor) -> None:
        """Add this process's mean loss, denoising loss and consistency loss, shape (3,), in an optimizer step.

        The gradient's norm, before clipping, is that of all processes, and not finite if a loss is not.
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

    def read(self) -> tuple[dict[str, float], float]:
        """Means over steps and processes since the last log line, and steps per second."""
        means = (self.accelerator.reduce(self.sums, "mean") / self.steps).tolist()
        speed = self.steps / (time.monotonic() - self.since)
        self.sums.zero_()
        self.steps = 0
        return dict(zip(MEASURED, means, strict=True)), speed

    def fault(self, step: int) -> str | None:
        """Why the run can't go on after optimizer step `step`, if it can't."""
        if self.first_bad_step >= 0:
            return f"the loss or its gradient is not finite at step {self.first_bad_step}"
        if self.most_skipped_steps >= MAX_SKIPPED_STEPS:
            return f"{self.most_skipped_steps} steps in a row without finite gradients up to step {step}"
        return None


class RunLog:
    """`folder`/log.jsonl and the trackers: tensorboard in `folder`/logs/, wandb in `folder`/wandb/ or on its server.

    Lines after `last_step` are dropped, as their steps are repeated; so are lines that a crash left incomplete. All
    methods raise RunError if the disk is full or fails.
    """

    def __init__(self, folder: Path, last_step: int, settings: Training):
        self.file = folder / "log.jsonl"
        with writing(self.file):
            before = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        kept = [f"{line}\n" for line in before.splitlines() if 0 < logged_step(line) <= last_step]
        write_text(self.file, "".join(kept))
        self.trackers: list[GeneralTracker] = []
        with writing(folder / "logs"):
            if "tensorboard" in settings.log_with:
                self.trackers.append(TensorBoardTracker("logs", folder, purge_step=last_step + 1))
                self.trackers[-1].start()
            if "wandb" in settings.log_with:
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


def wandb_tracker(folder: Path, settings: Training) -> WandBTracker:
    """The Weights & Biases run of a folder; the same one after a resume."""
    import wandb

    file = folder / "wandb-id.txt"
    if not file.exists():
        write_text(file, secrets.token_hex(8))
    run_id = file.read_text(encoding="utf-8").strip()
    tracker = WandBTracker("deme", id=run_id, resume="allow", dir=folder, name=str(folder), config=asdict(settings))
    try:
        tracker.start()
    except wandb.errors.Error as error:
        raise UserError(f"{settings.section}.log_with={settings.log_with}: wandb: {one_line(error)}") from error
    return tracker


@torch.no_grad()
def held_out_loss(networks: Networks, images: Examples, batch_size: int, accelerator: Accelerator) -> float:
    """The student's denoising loss on all images, over all processes, always with the same timesteps and noise."""
    process = networks.process
    starts = range(0, len(images), batch_size)[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device)
    generator = torch.Generator()
    with accelerator.autocast():
        for start in starts:
            batch = range(start, min(start + batch_size, len(images)))
            random = np.random.default_rng((NOISE, start))
            generator.manual_seed(torch_seed(random))
            torch.manual_seed(torch_seed(random))  # for the encoder's draws
            clean, condition = networks.encoder.encode(images.batch(batch))
            # evenly spread over [0, T): few images then give a steady mean
            timesteps = torch.arange(start, batch.stop) * process.total // len(images)
            noise = torch.randn(clean.shape, generator=generator)
            inputs = (clean, noise.to(accelerator.device), timesteps.to(accelerator.device, process.dtype), condition)
            total += decoupled_loss(networks.student, None, process, *inputs)[0] * len(batch)
    return float(accelerator.reduce(total, "sum")) / len(images)


def save_preview(networks: Networks, resolution: int, prompts: Sequence[str], batch_size: int, path: Path) -> None:
    """Save a grid of the student's images, drawn from the same seeds each time: of each prompt, or of all labels."""
    student, process, encoder = networks.student, networks.process, networks.encoder
    shape = encoder.shape_of(resolution)
    steps = min(PREVIEW_STEPS, process.total)
    scale = Sample.guidance_scale if encoder.takes_text else 1.0
    settings = Sample(num_inference_steps=steps, scheduler=process.usual_sampler, guidance_scale=scale)
    drawing = Drawing(process.scheduler, encoder, settings, shape, student.device)
    seeds = range(len(prompts) if encoder.takes_text else PREVIEW_IMAGES)
    prompts = [seed % encoder.classes for seed in seeds] if encoder.classes > 0 else prompts
    parts = [slice(start, start + batch_size) for start in seeds[::batch_size]]
    images = torch.cat([drawing.images(lambda _: student, seeds[part], prompts[part]) for part in parts])
    encoder.rest()
    make_folder(path.parent, "output_dir")
    save_grid(images, path)
