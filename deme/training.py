"""The training loop that pretrain.py and finetune.py share.

A run is a function of its configuration: every random draw of micro-batch m of optimizer step s comes from a
generator seeded with (seed, stream, s, m), whichever process computes it, so neither the number of processes nor an
interruption changes what is trained on. The loop never waits for the device between two log lines.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from deme.checkpoints import (
    CheckpointWriter,
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    prepare_checkpoints,
)
from deme.config import Pretrain, RunError, Training
from deme.data import HELD_OUT, MICRO_BATCH, CroppedImages, batch_indices
from deme.devices import Agreement, in_main_process, keep_freed_memory, peak_memory
from deme.files import make_folder
from deme.inference import freeze
from deme.losses import decoupled_loss
from deme.run_log import RunLog
from deme.sampling import sample_images, save_grid
from deme.signals import Interrupted, noted_signals
from deme.timesteps import choose_interval, sample_timesteps

TIME_IS_UP = 1  # why a run stops before its end, beside the signals' numbers
LEAST_FALL = 1e-3  # a held-out loss that is lower by a smaller fraction has not fallen
MAX_SKIPPED_STEPS = 50  # fp16: steps without finite gradients in a row that stop the run
PREVIEW_IMAGES = 64
PREVIEW_STEPS = 50


@dataclass(frozen=True)
class Objective:
    """What one run trains: which timesteps, and how strongly it is held to the teacher."""

    name: str  # for messages: "timesteps 0000-0250"
    stream: tuple[int, ...]  # keeps the random draws of different runs of one experiment apart
    timestep_range: tuple[int, int]  # [low, high)
    global_probability: float = 0.0  # p
    consistency_weight: float = 0.0  # λ


class Trainer:
    """One training run in `folder`: checkpoints/, previews/, TensorBoard logs/ and log.jsonl.

    Args:
        student: trained in place; float32.
        teacher: the frozen pretrained network, or None.
        seed: the experiment's.
        held_out: pretraining measures its loss on these images, and may stop by it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: nn.Module | None,
        scheduler: DDPMScheduler,
        images: CroppedImages,
        objective: Objective,
        settings: Training,
        seed: int,
        folder: Path,
        held_out: CroppedImages | None = None,
    ):
        self.held_out = held_out if isinstance(settings, Pretrain) and held_out else None
        self.accelerator, self.scheduler, self.images = accelerator, scheduler, images
        self.objective, self.settings, self.seed, self.folder = objective, settings, seed, folder
        self.device = accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.micro_batch_size = settings.micro_batch_size or settings.batch_size
        self.micro_batches = settings.batch_size // self.micro_batch_size

        self.student = student.to(self.device, memory_format=torch.channels_last).train()
        if settings.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.teacher = None
        if teacher is not None:
            teacher = freeze(teacher, self.device, settings.mixed_precision)
            self.teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
        ema = EMAModel(
            self.student.parameters(),
            decay=settings.ema_decay,
            use_ema_warmup=True,
            inv_gamma=settings.ema_inv_gamma,
            power=settings.ema_power,
            foreach=True,
        )
        optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
            fused=True,
        )
        # schedules are functions of the optimizer step; stepping one through accelerate would count processes
        self.lr_factor: Callable[[int], float] = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_steps,
        ).lr_lambdas[0]
        self.state = TrainingState(self.student, ema, optimizer, accelerator.scaler)
        self.model, self.optimizer = accelerator.prepare(self.student, optimizer)
        self.writer = CheckpointWriter(self.checkpoints, settings.checkpoints_kept)

        # on the device, read only when logging: sums since the last log line, and what went wrong
        self.sums = torch.zeros(4, device=self.device)  # loss, denoising, consistency, gradient norm
        self.first_bad_step = torch.full((), -1, device=self.device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.device)  # fp16: in a row, up to now
        self.most_skipped_steps = self.skipped_steps.clone()

    def run(self, deadline: float | None = None) -> bool:
        """Train to max_steps, or until the held-out loss has stopped falling, resuming from the newest checkpoint.

        Args:
            deadline: time.monotonic() at which to stop with a checkpoint.

        Returns:
            True when training is over (`student` then holds the EMA weights), False when stopped by the deadline.

        Raises:
            RunError: the loss, its gradient or the weights are not finite; the disk is full.
            Interrupted: by a signal, with a checkpoint.
        """
        in_main_process(self.accelerator, lambda: prepare_checkpoints(self.checkpoints))
        self._resume()
        with noted_signals() as signals, self.writer.thread:  # which is waited for also where an error ends the run
            reason = self._train(deadline, signals)
            in_main_process(self.accelerator, self.writer.wait)
            in_main_process(self.accelerator, lambda: self.log.close())  # which only it has
            if reason <= TIME_IS_UP and signals:  # it came during the wait
                reason = signals[0]
        if reason > TIME_IS_UP:
            raise Interrupted(reason, f"checkpoint of step {self.state.step} saved, the same command resumes")
        if not self._is_over():
            return False
        self.state.ema.copy_to(self.student.parameters())
        return True

    def _train(self, deadline: float | None, signals: list[int]) -> int:
        """The loop, to its end or to where all processes stop with a checkpoint.

        Args:
            signals: numbers of those received, appended as they come.

        Returns:
            why it stopped: TIME_IS_UP, a signal's number, or 0.
        """
        settings, state = self.settings, self.state
        agree, reason = Agreement(), 0
        silent = not self.accelerator.is_main_process
        bar = {"total": settings.max_steps, "initial": state.step, "desc": self.objective.name, "mininterval": 1}
        with tqdm(**bar, disable=silent) as progress:
            self.window_start, self.window_steps = time.monotonic(), 0
            while not (reason or self._is_over()):
                self._optimizer_step()
                self.window_steps += 1
                progress.update()
                logging = state.step % settings.log_every == 0
                time_is_up = deadline is not None and time.monotonic() >= deadline
                reason = agree(signals[0] if signals else TIME_IS_UP * time_is_up)
                measuring = self.held_out is not None and state.step % settings.held_out_every == 0
                saving = reason or state.step % settings.checkpoint_every == 0
                if logging or saving or measuring or state.step == settings.max_steps:
                    self._log(progress, measuring)
                if saving or self._is_over():
                    self._save(last=reason != 0)
                elif logging:
                    in_main_process(self.accelerator, self.writer.check)
                if settings.preview_every is not None and state.step % settings.preview_every == 0:
                    in_main_process(self.accelerator, self._preview)
                if self.window_steps == 0:
                    self.window_start = time.monotonic()  # the images per second are training's
        return max(reason, agree(signals[0] if signals else 0), agree.close())  # one may have come in the last step

    def _is_over(self) -> bool:
        patience = None if self.held_out is None else self.settings.patience
        has_converged = patience is not None and self.state.held_out_losses_since >= patience
        return has_converged or self.state.step >= self.settings.max_steps

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _resume(self) -> None:
        """Load the newest checkpoint; cut the logs back to it, so that they neither repeat nor skip a step."""
        found = in_main_process(self.accelerator, lambda: load_newest_checkpoint(self.checkpoints, self.state))
        if found is not None and not self.accelerator.is_main_process:
            load_checkpoint(found, self.state)  # the same one, whatever this process can read
        self.skipped_steps.fill_(self.state.skipped_steps)

        def open_log() -> None:
            if found is not None:
                print(f"{self.objective.name}: resuming from {found}")
            self.log = RunLog(self.folder, self.state.step)

        in_main_process(self.accelerator, open_log)

    def _optimizer_step(self) -> None:
        accelerator, state = self.accelerator, self.state
        learning_rate = self.settings.learning_rate * self.lr_factor(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses = torch.zeros(3, device=self.device)
        mine = range(accelerator.process_index, self.micro_batches, accelerator.num_processes)
        for micro_batch in mine:
            last = micro_batch == mine[-1]
            with nullcontext() if last else accelerator.no_sync(self.model):  # gradients are exchanged once per step
                denoising, consistency = self._losses(micro_batch)
                loss = denoising + self.objective.consistency_weight * consistency
                accelerator.backward(loss / len(mine))
            losses += torch.stack([loss, denoising, consistency]).detach() / len(mine)
        gradient_norm = accelerator.clip_grad_norm_(self.student.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        self._update_ema()

        bad = ~torch.isfinite(gradient_norm)  # the same in every process; a loss that is not finite shows in it too
        if accelerator.scaler is None:
            self.first_bad_step = torch.where((self.first_bad_step < 0) & bad, state.step, self.first_bad_step)
        else:  # the loss scaler has skipped the step
            gradient_norm = torch.where(bad, 0, gradient_norm)
            self.skipped_steps = torch.where(bad, self.skipped_steps + 1, 0)
            self.most_skipped_steps = torch.maximum(self.most_skipped_steps, self.skipped_steps)
        self.sums += torch.cat([losses, gradient_norm.detach().reshape(1)])

    def _update_ema(self) -> None:
        """shadow ← shadow + (1 − decay)(weight − shadow): EMAModel.step in one pass over the memory instead of two."""
        ema = self.state.ema
        ema.optimization_step += 1
        ema.cur_decay_value = ema.get_decay(ema.optimization_step)
        weights = [parameter.detach() for parameter in self.student.parameters()]
        torch._foreach_lerp_(ema.shadow_params, weights, 1 - ema.cur_decay_value)

    def _losses(self, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both terms of the objective on one micro-batch, all its random draws seeded by its place in the run."""
        objective, size, step = self.objective, self.micro_batch_size, self.state.step
        random = np.random.default_rng((self.seed, *objective.stream, MICRO_BATCH, step, micro_batch))
        start = step * self.settings.batch_size + micro_batch * size
        indices = batch_indices(self.seed, objective.stream, len(self.images), start, size)
        low, high = choose_interval(
            objective.timestep_range,
            self.scheduler.config.num_train_timesteps,
            objective.global_probability,
            random.random(),
        )
        clean = self._scaled(self.images.batch(indices, random))

        torch.manual_seed(int(random.integers(2**63)))  # for the draws on the device: dropout takes no generator
        timesteps = sample_timesteps(size, low, high, self.device)
        noise = torch.randn_like(clean)
        return decoupled_loss(self.model, self.teacher, self.scheduler, clean, noise, timesteps)

    def _scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images to [−1, 1] on the device, same shape."""
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        pixels = pixels.to(self.device, non_blocking=True)
        return pixels.float().div_(127.5).sub_(1)

    def _log(self, progress: tqdm, measuring: bool) -> None:
        """Write the means since the last log line; the only place that waits for the device.

        Args:
            measuring: the held-out loss too.

        Raises:
            RunError: the loss or its gradient was not finite.
        """
        steps = self.window_steps
        means = (self.accelerator.reduce(self.sums, "mean") / steps).tolist()
        seconds = time.monotonic() - self.window_start
        self.window_steps = 0
        self.sums.zero_()
        self._check_finite()
        step = self.state.step
        line = {
            "step": step,
            **dict(zip(("loss", "denoising_loss", "consistency_loss", "gradient_norm"), means, strict=True)),
            "skipped_steps": self.state.skipped_steps,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "ema_decay": self.state.ema.cur_decay_value,
            "images_per_second": steps * self.settings.batch_size / seconds,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        if measuring:
            line["held_out_loss"] = self._measure_held_out_loss()
        in_main_process(self.accelerator, lambda: self.log.write(line))
        progress.set_postfix(
            loss=f"{line['loss']:.4f}",
            consistency=f"{line['consistency_loss']:.4f}",
            lr=f"{line['learning_rate']:.1e}",
            images_s=f"{line['images_per_second']:.0f}",
        )

    def _save(self, last: bool) -> None:
        """Have a checkpoint written behind the training; bad weights never replace good ones.

        Args:
            last: the run stops here.

        Raises:
            RunError: the weights are not finite (a last step can do that without another's loss to show it); full disk.
        """
        state = self.state
        norms = torch.stack(torch._foreach_norm([*self.student.parameters(), *state.ema.shadow_params]))
        if not torch.isfinite(norms).all():
            self._stop(f"the weights are not finite at step {state.step}")

        in_main_process(self.accelerator, lambda: self.writer.write(state, self.log.sync, last))

    def _check_finite(self) -> None:
        first_bad, most_skipped = int(self.first_bad_step), int(self.most_skipped_steps)
        self.state.skipped_steps = int(self.skipped_steps)
        if first_bad < 0 and most_skipped < MAX_SKIPPED_STEPS:
            return
        if first_bad >= 0:
            self._stop(f"the loss or its gradient is not finite at step {first_bad}")
        self._stop(f"{most_skipped} steps in a row without finite gradients up to step {self.state.step}")

    def _stop(self, what: str) -> NoReturn:
        self.writer.wait()
        saved = list_checkpoints(self.checkpoints)
        raise RunError(f"{self.objective.name}: {what}; last good checkpoint: {saved[0] if saved else 'none'}")

    def _preview(self) -> None:
        """Save a grid of images drawn with the EMA weights."""
        size = self.student.config.sample_size
        shape = (self.student.config.in_channels, size, size)
        steps = min(PREVIEW_STEPS, self.scheduler.config.num_train_timesteps)
        seeds = torch.arange(PREVIEW_IMAGES).split(self.micro_batch_size)  # so many fit into memory
        with self._ema_weights() as unet:
            parts = [
                sample_images(lambda _: unet, self.scheduler, part.tolist(), shape, self.device, steps)
                for part in seeds
            ]
        path = self.folder / "previews" / f"step-{self.state.step:08d}.png"
        make_folder(path.parent, "output_dir")
        save_grid(torch.cat(parts), path)

    @contextmanager
    def _ema_weights(self) -> Iterator[nn.Module]:
        """The student in eval mode with the EMA weights, for as long as the block lasts."""
        unet, ema = self.student, self.state.ema
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        try:
            yield unet.eval()
        finally:
            ema.restore(unet.parameters())
            unet.train()

    @torch.no_grad()
    def _measure_held_out_loss(self) -> float:
        """The denoising loss of the EMA weights on the held-out images, always with the same timesteps and noise."""
        images, size, state = self.held_out, self.micro_batch_size, self.state
        starts = range(0, len(images), size)[self.accelerator.process_index :: self.accelerator.num_processes]
        total = torch.zeros((), device=self.device)
        generator = torch.Generator()
        with self._ema_weights() as unet, self.accelerator.autocast():
            for start in starts:
                batch = range(start, min(start + size, len(images)))
                clean = self._scaled(images.batch(batch))
                generator.manual_seed(int(np.random.default_rng((HELD_OUT, start)).integers(2**63)))
                # evenly spread over [0, T), so that few images give a steady mean
                timesteps = torch.arange(start, batch.stop) * self.scheduler.config.num_train_timesteps // len(images)
                noise = torch.randn(clean.shape, generator=generator).to(self.device)
                loss, _ = decoupled_loss(unet, None, self.scheduler, clean, noise, timesteps.to(self.device))
                total += loss * len(batch)
        loss = float(self.accelerator.reduce(total, "sum")) / len(images)
        if state.lowest_held_out_loss is None or loss < (1 - LEAST_FALL) * state.lowest_held_out_loss:
            state.lowest_held_out_loss, state.held_out_losses_since = loss, 0
        else:
            state.held_out_losses_since += 1
        return loss
