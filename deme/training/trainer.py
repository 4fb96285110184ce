"""The training loop of pretrain.py and finetune.py, and how they open networks and data and write what is trained.

Every random draw of micro-batch m of optimizer step s comes from a generator seeded with (seed, stream, s, m). So
neither the number of processes nor an interruption changes what a run is trained on. Between two log lines the loop
never waits for the device.
"""

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from tqdm import tqdm

from deme.config.networks import is_lora
from deme.config.paths import SNAPSHOTS, average_name, snapshot_path
from deme.config.trainings import Pretrain
from deme.data.examples import MicroBatch, TrainingImages, load_examples, micro_batches
from deme.errors import RunError, naming
from deme.job import processes
from deme.job.command import Interrupted, noted_signals
from deme.job.files import Watched, atomic_file, atomic_folder, make_folder, remove_leftovers
from deme.job.records import SNAPSHOT, Record
from deme.method.losses import UncertaintyWeights, choose_ranges, decoupled_loss, loss_weights
from deme.models.denoisers import freeze, memory_format
from deme.models.variants import write_denoiser
from deme.training.progress import Meter, RunLog, held_out_loss, save_preview
from deme.training.session import Session, TrainingRun
from deme.training.state import CheckpointWriter, Networks, TrainingState, list_checkpoints, load_newest_checkpoint

# why a run stops early: one of these or a signal's number; if processes differ, the greatest counts for all
GO_ON, TIME_IS_UP = 0, 1
LEAST_FALL = 1e-3  # relative: a smaller decrease of the held-out loss does not count


def open_training(
    session: Session, load: Callable[[], Networks], watched: Watched, made_from: dict[str, str]
) -> tuple[Accelerator, Networks, TrainingImages]:
    """The accelerator, networks and data that all runs of a command share.

    `load` reads the files in `watched`; `made_from` has their hashes.
    """
    settings = session.settings
    accelerator = processes.make_accelerator(settings.mixed_precision, f"{settings.section}.mixed_precision")
    settings.check_shares(accelerator.num_processes)
    networks = load()
    accelerator.wait_for_everyone()
    watched.check()  # every process has read the same files
    made_of = session.data_hashes | made_from
    images = load_examples(session.config, settings, session.source, networks.encoder, made_of, accelerator)
    return accelerator, networks, images


class Trainer:
    """A training run; fills its folder with checkpoints/, previews/, log.jsonl and the trackers' files.

    Pretraining measures the loss on the held-out images, if there are any.
    """

    def __init__(self, accelerator: Accelerator, networks: Networks, images: TrainingImages, run: TrainingRun):
        objective, settings = run.objective, run.settings
        self.accelerator, self.device = accelerator, accelerator.device
        self.networks, self.resolution = networks, images.resolution
        self.held_out = images.held_out if isinstance(settings, Pretrain) else None
        self.objective, self.settings = objective, settings
        self.folder, self.checkpoints = run.folder, run.folder / "checkpoints"
        self.made_from = run.record.made_from
        if self.device.type == "cpu":
            processes.keep_freed_memory()

        precision, teacher = settings.mixed_precision, networks.teacher
        networks.encoder.prepare(self.device, precision)
        self.student = networks.student.to(self.device, memory_format=memory_format(self.device)).train()
        if settings.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        shared = teacher is not None and not {*teacher.parameters()}.isdisjoint(self.student.parameters())
        self.teacher = None if teacher is None else freeze(teacher, self.device, precision, shares_weights=shared)
        rate = objective.uncertainty_learning_rate
        learned = None if rate is None else UncertaintyWeights(objective.ranges).to(self.device)
        self.weighting = learned  # each image's squared error and timesteps → the denoising loss; None: the mean error
        if learned is None and settings.loss_weighting is not None:
            with naming(f"{settings.section}.loss_weighting", settings.loss_weighting):
                weights = loss_weights(settings.loss_weighting, networks.process, settings)
            self.weighting = lambda errors, timesteps: (weights(timesteps) * errors).mean()
        self.state = TrainingState(self.student, settings, accelerator.scaler, learned, rate)
        self.model, self.optimizer = accelerator.prepare(self.student, self.state.optimizer)

        self.micro_batch_size = settings.micro_batch_size or settings.batch_size
        count = settings.batch_size // self.micro_batch_size
        self.mine = range(accelerator.process_index, count, accelerator.num_processes)  # micro-batches of each step
        self.batches = micro_batches(images.training, objective.stream, settings, self.mine, lambda: self.state.step)
        self.meter = Meter(accelerator)
        self.writer = CheckpointWriter(self.checkpoints, settings.checkpoints_kept)
        self.log: RunLog | None = None  # in the main process, while the run lasts

    def run(self, deadline: float = math.inf) -> bool:
        """Train to max_steps, or until the held-out loss has stopped falling, resuming from the newest checkpoint.

        True if training is over, and `student` has the EMA weights; False if it stopped with a checkpoint when
        time.monotonic() reached `deadline`. A signal raises Interrupted after a checkpoint. A loss, gradient or weight
        that is not finite, or a full disk, raises RunError.
        """
        self._resume()
        with noted_signals() as signals, self.writer.thread:  # an error, too, waits for the thread

            def wish() -> int:
                return max([TIME_IS_UP if time.monotonic() >= deadline else GO_ON, *signals[:1]])

            try:
                stop = self._train(wish)
            finally:
                self.batches.close()
            processes.in_main_process(self.accelerator, self.writer.wait)
            processes.in_main_process(self.accelerator, lambda: self.log.close())
            stop = max([stop, *signals[:1]])  # one may have come during the wait
        if stop > TIME_IS_UP:
            raise Interrupted(stop, f"checkpoint of step {self.state.step} saved, the same command resumes")
        if not self._is_over():
            return False
        self.state.ema.copy_to(self.state.weights)
        return True

    def _resume(self) -> None:
        """Load the newest checkpoint and cut the logs back to it."""
        steps = self.settings.max_steps

        def resume() -> Path | None:
            newest = load_newest_checkpoint(self.checkpoints, self.state, steps)
            if newest is not None:
                print(f"{self.objective.name}: resuming from {newest}")
                self.writer.delete_older(newest)  # if the run was killed before it could
            self._delete_snapshots()
            self.log = RunLog(self.folder, self.state.step, self.settings)
            return newest

        newest = processes.in_main_process(self.accelerator, resume)
        if newest is not None and not self.accelerator.is_main_process:
            self.state.load(newest, steps)  # the same one in every process
        self.meter.skipped_steps.fill_(self.state.skipped_steps)

    def _train(self, wish: Callable[[], int]) -> int:
        """The loop, to its end or until all processes stop with a checkpoint; why it stopped."""
        settings, state = self.settings, self.state
        agree = processes.Agreement()
        stop = GO_ON
        bar = {"total": settings.max_steps, "initial": state.step, "desc": self.objective.name, "mininterval": 1}
        with tqdm(**bar, disable=not self.accelerator.is_main_process) as progress:
            while not (stop or self._is_over()):
                self.step()
                progress.update()
                stop = agree(wish())
                measuring = bool(self.held_out) and state.step % settings.held_out_every == 0
                saving = stop or state.step % settings.checkpoint_every == 0
                logging = state.step % settings.log_every == 0
                if logging or saving or measuring or state.step == settings.max_steps:
                    self._log(progress, measuring)
                if settings.snapshot_every is not None and state.step % settings.snapshot_every == 0:
                    # before the checkpoint: a run that resumes from that has all snapshots up to it
                    processes.in_main_process(self.accelerator, self._snapshot)
                if saving or self._is_over():
                    self.save(last=stop != GO_ON)
                elif logging:
                    processes.in_main_process(self.accelerator, lambda: self.writer.wait(block=False))
                if settings.preview_every is not None and state.step % settings.preview_every == 0:
                    processes.in_main_process(self.accelerator, self._preview)
        return max(stop, agree(wish()), agree.close())  # a signal may have come in the last step

    def step(self) -> None:
        """One optimizer step, from the images to the EMA of the weights."""
        accelerator, objective = self.accelerator, self.objective
        self.meter.start_step()
        for group in self.state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.state.learning_rate_factor(self.state.step)
        share = len(self.mine)
        losses = torch.zeros(3, device=self.device)
        for batch in itertools.islice(self.batches, share):
            is_last = batch.number == self.mine[-1]
            with nullcontext() if is_last else accelerator.no_sync(self.model):  # gradients are exchanged once per step
                denoising, consistency = self.losses(batch)
                loss = objective.denoising_weight * denoising + objective.consistency_weight * consistency
                accelerator.backward(loss / share)
            losses += torch.stack([loss, denoising, consistency]).detach() / share
        if self.state.weighting is not None:  # it is not part of the model whose gradients are exchanged
            for weight in self.state.weighting.parameters():
                weight.grad = accelerator.reduce(weight.grad, "mean")
        gradient_norm = accelerator.clip_grad_norm_(self.student.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.finish_step()
        self.meter.add(self.state.step, losses, gradient_norm)

    def losses(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Denoising and consistency loss of one micro-batch, float32 scalars."""
        objective, process = self.objective, self.networks.process
        ranges = choose_ranges(objective.ranges, process.total, objective.global_probability, batch.uniform)
        torch.manual_seed(batch.seed)  # for the draws on the device: dropout takes no generator
        clean, condition = self.networks.encoder.encode(batch.examples)
        timesteps = process.draw(len(clean), ranges, self.device, antithetic=self.settings.antithetic)
        inputs = (process, clean, torch.randn_like(clean), timesteps, condition)
        return decoupled_loss(self.model, self.teacher, *inputs, self.weighting)

    def save(self, last: bool = False) -> None:
        """Have a checkpoint written in the background; weights that are not finite are refused."""
        weights = [*self.state.trained.values(), *self.state.ema.shadow_params]
        if not torch.isfinite(torch.stack(torch._foreach_norm(weights))).all():
            self._fail(f"the weights are not finite at step {self.state.step}")
        processes.in_main_process(self.accelerator, lambda: self.writer.write(self.state, self.log.file, last))

    def measure_held_out(self) -> float:
        """The held-out loss of the EMA weights. Updates the lowest one in the state."""
        state = self.state
        with state.ema_weights():
            loss = held_out_loss(self.networks, self.held_out, self.micro_batch_size, self.accelerator)
        state.held_out_losses_since += 1
        if state.lowest_held_out_loss is None or loss < (1 - LEAST_FALL) * state.lowest_held_out_loss:
            state.lowest_held_out_loss, state.held_out_losses_since = loss, 0
        return loss

    def _log(self, progress: tqdm, measuring: bool) -> None:
        """Write a log line, with the held-out loss if `measuring`. Nothing else waits for the device."""
        state = self.state
        means, steps_per_second = self.meter.read()
        if fault := self.meter.fault(state.step):
            self._fail(fault)
        state.skipped_steps = int(self.meter.skipped_steps)
        line = {"step": state.step, **means, "skipped_steps": state.skipped_steps}
        line |= {"learning_rate": state.optimizer.param_groups[0]["lr"], "ema_decay": state.ema.cur_decay_value}
        line["images_per_second"] = steps_per_second * self.settings.batch_size
        line["peak_memory_gib"] = processes.peak_memory(self.device.type) / 2**30
        if state.weighting is not None:
            line |= {f"log_variance_{k}": value for k, value in enumerate(state.weighting.log_variances.tolist())}
        if measuring:
            line["held_out_loss"] = self.measure_held_out()
        processes.in_main_process(self.accelerator, lambda: self.log.write(line))
        shown = ("loss", "consistency_loss", "learning_rate", "images_per_second")
        progress.set_postfix({key: line[key] for key in shown})

    def _preview(self) -> None:
        path = self.folder / "previews" / f"step-{self.state.step:08d}.png"
        with self.state.ema_weights():
            save_preview(self.networks, self.resolution, self.settings.preview_prompts, self.micro_batch_size, path)

    def _snapshot(self) -> None:
        """Write the EMA weights in half precision, and the averages of `ema_profiles`: folders as of trained networks.

        The latter stay float32: finetuning changes weights by little more than half precision can tell apart.
        """
        path, key = snapshot_path(self.folder, self.state.step), f"{self.settings.section}.snapshot_every"
        settings = json.loads(self.student.to_json_string())

        def averaged(width: float | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
            weights = self.student.state_dict() | self.state.averaged(width)
            return {name: weight.to("cpu", dtype).contiguous() for name, weight in weights.items()}

        halves = averaged(None, torch.float16)
        if not all(half.isfinite().all() for half in halves.values()):
            rule = f"the weights do not fit half precision at step {self.state.step}: {key} keeps them in it"
            self._fail(self.meter.fault(self.state.step) or rule)
        make_folder(path.parent, "output_dir")
        with atomic_folder(path) as temporary:
            write_denoiser(temporary, halves, settings)
            for width in self.state.profiles:
                write_denoiser(temporary / average_name(width), averaged(width, torch.float32), settings)
            Record(SNAPSHOT, self.made_from | {"step": self.state.step}).write(temporary)

    def _delete_snapshots(self) -> None:
        """Delete what is written again: snapshots after the current step, also those of a run that starts anew."""
        folder = self.folder / SNAPSHOTS
        remove_leftovers(folder, "*")
        for path in folder.glob("*"):
            if path.name.isdecimal() and int(path.name) > self.state.step:
                shutil.rmtree(path)

    def _is_over(self) -> bool:
        patience = self.settings.patience if self.held_out else None
        has_converged = patience is not None and self.state.held_out_losses_since >= patience
        return has_converged or self.state.step >= self.settings.max_steps

    def _fail(self, what: str) -> NoReturn:
        self.writer.wait()
        saved = list_checkpoints(self.checkpoints)
        raise RunError(f"{self.objective.name}: {what}; last good checkpoint: {saved[0] if saved else 'none'}")


def train(
    session: Session, run: TrainingRun, networks: Networks, images: TrainingImages, write: Callable[[Path], None]
) -> Trainer | None:
    """Train to the end and have `write` fill the output's folder or file; None if time was up first."""
    settings, run = session.settings, session.with_data(run)
    key = f"{settings.section}.mixed_precision"
    accelerator = processes.make_accelerator(settings.mixed_precision, key)  # anew, as each run has its own loss scale

    def finish() -> None:
        with (atomic_file if is_lora(run.output) else atomic_folder)(run.output) as temporary:
            write(temporary)
        print(f"wrote {run.output}")

    with processes.locked_by_all(accelerator, run.folder, "output_dir"):
        processes.in_main_process(accelerator, run.claim)
        trainer = Trainer(accelerator, networks, images, run)
        if trainer.run(session.deadline):
            processes.in_main_process(accelerator, finish)
            return trainer
    accelerator.print(f"stopped after {settings.section}.max_minutes={settings.max_minutes}; the same command resumes")
    return None
