"""Checkpoints of a training run: student, EMA and optimizer as safetensors, scalars as JSON.

`checkpoints/step-00005000/` appears whole or not at all; only the newest few are kept.
"""

import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from deme.errors import RunError, UserError, one_line
from deme.job.files import (
    REPLACED,
    atomic_folder,
    checkpoint_steps,
    make_folder,
    remove_unfinished,
    settle_replacement,
    sha256,
)

WRONG = (ValueError, TypeError, AttributeError, RuntimeError)  # as damaged content leads to
STUDENT = "student.safetensors"
EMA = "ema.safetensors"
OPTIMIZER = "optimizer.safetensors"
WEIGHTING = "loss_weighting.safetensors"  # where it is learned
STATE = "state.json"
SCALARS = ("step", "skipped_steps", "lowest_held_out_loss", "held_out_losses_since")  # of TrainingState


@dataclass
class TrainingState:
    """Everything that a resumed run needs; the random draws follow from the step."""

    student: nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16's loss scale
    weighting: nn.Module | None = None  # of the loss, where it is learned
    step: int = 0  # optimizer steps done
    skipped_steps: int = 0  # fp16: steps skipped in a row
    lowest_held_out_loss: float | None = None
    held_out_losses_since: int = 0  # measured since the lowest one

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters that the optimizer trains, in its order."""
        weights = {} if self.weighting is None else dict(self.weighting.named_parameters(prefix="loss_weighting"))
        return dict(self.student.named_parameters()) | weights


class CheckpointWriter:
    """Writes `folder`/step-… behind the training: the state is copied, and a thread brings the copy to the disk.

    One checkpoint at a time; then all but it and the `keep` − 1 before it are deleted. The copy stays allocated: memory
    that is new to the process is slow to fill.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep
        self.copies: dict[str, dict[str, torch.Tensor]] = {}
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.unfinished: Future | None = None

    def write(self, state: TrainingState, before: Callable[[], None], last: bool = False) -> None:
        """Copy the state and have the copy written.

        Args:
            before: what has to be done in the thread before the checkpoint gets its name.
            last: the run stops after it, so that it is tried even where the one before could not be written.

        Raises:
            RunError: the one before could not be written.
        """
        try:
            self.wait()
        except RunError as error:
            if not last:
                raise
            print(error)
        for file, tensors in _tensors(state).items():
            if self.copies.get(file, {}).keys() != tensors.keys():
                pinned = any(tensor.is_cuda for tensor in tensors.values())
                self.copies[file] = {
                    name: torch.empty_like(tensor, device="cpu", pin_memory=pinned) for name, tensor in tensors.items()
                }
            torch._foreach_copy_(list(self.copies[file].values()), list(tensors.values()))
        self.unfinished = self.thread.submit(self._write, state.step, _scalars(state), before)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            RunError: the checkpoint that was being written could not be.
        """
        unfinished = self.unfinished
        self.unfinished = None
        if unfinished is not None:
            unfinished.result()

    def check(self) -> None:
        """Like `wait`, but does not wait."""
        if self.unfinished is not None and self.unfinished.done():
            self.wait()

    def _write(self, step: int, scalars: dict, before: Callable[[], None]) -> None:
        before()
        path = self.folder / f"step-{step:08d}"
        with atomic_folder(path) as temporary:
            for file, tensors in self.copies.items():
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / file)
            hashes = {"sha256": {file: sha256(temporary / file) for file in self.copies}}
            (temporary / STATE).write_text(json.dumps(scalars | hashes, indent=2), encoding="utf-8")
        for newer in list_checkpoints(self.folder):  # could not be read, or the run would have gone on from there
            if newer > path:
                shutil.rmtree(newer, ignore_errors=True)
        self.delete_older(path)

    def delete_older(self, path: Path) -> None:
        """Delete all checkpoints before `path` but for the `keep` − 1 newest of them."""
        older = [other for other in list_checkpoints(self.folder) if other < path]
        for other in older[self.keep - 1 :]:
            shutil.rmtree(other, ignore_errors=True)  # what is left of it goes the next time


def _tensors(state: TrainingState) -> dict[str, dict[str, torch.Tensor]]:
    """File name → tensors."""
    of_student = [name for name, _ in state.student.named_parameters()]
    names = list(state.trained)
    moments = state.optimizer.state_dict()["state"]
    learned = {} if state.weighting is None else {WEIGHTING: state.weighting.state_dict()}
    return {
        STUDENT: state.student.state_dict(),
        EMA: dict(zip(of_student, state.ema.shadow_params, strict=True)),
        **learned,
        OPTIMIZER: {f"{names[i]}/{key}": value for i, values in moments.items() for key, value in values.items()},
    }


def _scalars(state: TrainingState) -> dict:
    return {
        **{name: getattr(state, name) for name in SCALARS},
        "ema_step": state.ema.optimization_step,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
    }


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return [folder / f"step-{step:08d}" for step in reversed(checkpoint_steps(folder))]


def load_newest_checkpoint(folder: Path, state: TrainingState, max_steps: int) -> Path | None:
    """Fill `state` from the newest checkpoint that is whole and sound; others are reported and passed over.

    Raises:
        RunError: the disk does not let them be read, which may pass: going on from an older one would be for good.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        try:
            load_checkpoint(path, state, max_steps)
            return path
        except torch.OutOfMemoryError:
            raise
        except (FileNotFoundError, SafetensorError, ArithmeticError, LookupError, *WRONG) as error:
            print(f"{path}: unreadable, trying the one before it ({one_line(error)})")
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {one_line(error)}") from error
    if checkpoints:
        raise UserError(
            f"{folder}: none of the {len(checkpoints)} checkpoints can be read; delete the folder to restart"
        )
    return None


def load_checkpoint(path: Path, state: TrainingState, max_steps: int) -> None:
    """Fill `state` from a checkpoint.

    Raises:
        Exception: whatever a damaged one leads to; nothing of it gets into `state`.
    """
    # read and check everything before changing anything: a damaged file must not leave half a state
    scalars = json.loads((path / STATE).read_text(encoding="utf-8"))
    _check_scalars(scalars, path, max_steps)
    for file, expected in scalars.get("sha256", {}).items():  # which checkpoints of before did not have
        if sha256(path / file) != expected:
            raise ValueError(f"{file} is not what was written")
    student, ema, moments = (load_file(path / file) for file in (STUDENT, EMA, OPTIMIZER))
    learned = {} if state.weighting is None else load_file(path / WEIGHTING)
    parameters = state.trained
    _check_tensors(state, student, ema, learned, moments)

    state.student.load_state_dict(student)
    if state.weighting is not None:
        state.weighting.load_state_dict(learned)
    for name, shadow in zip(dict(state.student.named_parameters()), state.ema.shadow_params, strict=True):
        shadow.copy_(ema[name])
    for key, value in moments.items():
        name, moment = key.rsplit("/", 1)
        parameter = parameters[name]
        # a fused step needs everything on the parameter's device, and the moments in its memory format
        like = parameter if value.shape == parameter.shape else torch.empty_like(value, device=parameter.device)
        state.optimizer.state[parameter][moment] = torch.empty_like(like).copy_(value)
    for name in SCALARS:
        setattr(state, name, scalars[name])
    state.ema.optimization_step = scalars["ema_step"]
    if state.scaler is not None and scalars["scaler"] is not None:
        state.scaler.load_state_dict(scalars["scaler"])


def _check_scalars(scalars: dict[str, Any], path: Path, max_steps: int) -> None:
    """
    Raises:
        Exception: values that no run of so many steps has in a checkpoint of this name.
    """
    for name in ("step", "skipped_steps", "held_out_losses_since", "ema_step"):
        if type(scalars[name]) is not int or scalars[name] < 0:
            raise ValueError(f"{name}={scalars[name]!r}")
    if scalars["step"] != int(path.name.removeprefix("step-")) or scalars["step"] > max_steps:
        raise ValueError(f"step={scalars['step']}")
    lowest = scalars["lowest_held_out_loss"]
    if lowest is not None and not (isinstance(lowest, float) and math.isfinite(lowest)):
        raise ValueError(f"lowest_held_out_loss={lowest!r}")


def _check_tensors(
    state: TrainingState,
    student: dict[str, torch.Tensor],
    ema: dict[str, torch.Tensor],
    learned: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
) -> None:
    """
    Raises:
        ValueError: tensors that are missing, of other shapes or not finite.
    """
    parameters = state.trained
    expected = dict(state.student.named_parameters())
    of_weighting = {} if state.weighting is None else dict(state.weighting.named_parameters())
    for file, tensors, wanted in (
        (STUDENT, student, expected),
        (EMA, ema, expected),
        (WEIGHTING, learned, of_weighting),
    ):
        if any(name not in tensors or tensors[name].shape != weight.shape for name, weight in wanted.items()):
            raise ValueError(f"{file} is of another network")
    kinds = {key.rsplit("/", 1)[1] for key in moments}  # none where fp16 has skipped all steps
    if moments.keys() != {f"{name}/{kind}" for name in parameters for kind in kinds}:
        raise ValueError(f"{OPTIMIZER} is not whole")
    for file, tensors in ((STUDENT, student), (EMA, ema), (WEIGHTING, learned), (OPTIMIZER, moments)):
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: tensor {name} holds NaN or infinite values")


def prepare_checkpoints(folder: Path) -> None:
    """Create `folder` and delete what a killed run left half-written in it."""
    make_folder(folder, "output_dir")
    for aside in folder.glob(f"{REPLACED}step-*"):
        settle_replacement(folder / aside.name.removeprefix(REPLACED))
    remove_unfinished(folder, "step-*")
