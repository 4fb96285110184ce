"""Checkpoints of a training run: `checkpoints/step-00005000/`, each whole or absent.

Student, EMA and optimizer are safetensors; `state.json` holds the scalars and the SHA-256 of the other files.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from deme.errors import RunError, UserError, one_line
from deme.job.files import atomic_folder, checked, checkpoint_steps, make_folder, remove_leftovers, sha256

STUDENT = "student.safetensors"
EMA = "ema.safetensors"
OPTIMIZER = "optimizer.safetensors"
WEIGHTING = "loss_weighting.safetensors"  # only if it is learned
STATE = "state.json"
SCALARS = {  # of TrainingState
    "step": int,
    "skipped_steps": int,
    "lowest_held_out_loss": float | None,
    "held_out_losses_since": int,
}
SAVED = SCALARS | {"ema_step": int, "sha256": dict[str, str]}  # in state.json, beside the state of the loss scaler


@dataclass
class TrainingState:
    """Everything that a resumed run needs; the random draws follow from the step."""

    student: nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16's loss scale
    weighting: nn.Module | None = None  # of the loss, if it is learned
    step: int = 0  # optimizer steps done
    skipped_steps: int = 0  # fp16: steps skipped in a row
    lowest_held_out_loss: float | None = None
    held_out_losses_since: int = 0  # measured since the lowest one

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters that the optimizer trains, in its order."""
        weights = {} if self.weighting is None else dict(self.weighting.named_parameters(prefix="loss_weighting"))
        return dict(self.student.named_parameters()) | weights

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """File name → tensors."""
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.trained.items()}
        learned = {} if self.weighting is None else {WEIGHTING: self.weighting.state_dict()}
        names = (name for name, _ in self.student.named_parameters())
        return {
            STUDENT: self.student.state_dict(),
            EMA: dict(zip(names, self.ema.shadow_params, strict=True)),
            **learned,
            OPTIMIZER: {f"{name}/{key}": value for name, values in moments.items() for key, value in values.items()},
        }

    def scalars(self) -> dict:
        """The content of state.json, without the hashes."""
        return {
            **{name: getattr(self, name) for name in SCALARS},
            "ema_step": self.ema.optimization_step,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }


class CheckpointWriter:
    """Writes `folder`/step-… in the background: the state is copied, and a thread writes the copy to disk.

    One checkpoint is written at a time; then all but the last `keep` are deleted. The copy stays allocated, as a
    process fills new memory slowly.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep
        self.copies: dict[str, dict[str, torch.Tensor]] = {}
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.unfinished: Future | None = None

    def write(self, state: TrainingState, before: Callable[[], None], last: bool = False) -> None:
        """Copy the state and have the copy written. Raises RunError if the previous checkpoint could not be written.

        Args:
            before: called in the thread before the checkpoint gets its name.
            last: the run stops after this checkpoint, so it is tried even if the previous one failed.
        """
        try:
            self.wait()
        except RunError as error:
            if not last:
                raise
            print(error)
        for file, tensors in state.tensors().items():
            if self.copies.get(file, {}).keys() != tensors.keys():
                pinned = any(tensor.is_cuda for tensor in tensors.values())
                self.copies[file] = {
                    name: torch.empty_like(tensor, device="cpu", pin_memory=pinned) for name, tensor in tensors.items()
                }
            torch._foreach_copy_(list(self.copies[file].values()), list(tensors.values()))
        self.unfinished = self.thread.submit(self._write, state.step, state.scalars(), before)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any. Raises RunError if it could not be written."""
        if self.unfinished is not None:
            unfinished, self.unfinished = self.unfinished, None
            unfinished.result()

    def check(self) -> None:
        """Like `wait`, but returns at once if the checkpoint is still being written."""
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
        for newer in list_checkpoints(self.folder):  # unreadable, or the run would have resumed from it
            if newer > path:
                shutil.rmtree(newer, ignore_errors=True)
        self.delete_older(path)

    def delete_older(self, path: Path) -> None:
        """Delete all checkpoints before `path` but for the `keep` − 1 newest of them."""
        older = [other for other in list_checkpoints(self.folder) if other < path]
        for other in older[self.keep - 1 :]:
            shutil.rmtree(other, ignore_errors=True)  # a later call deletes the rest


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return [folder / f"step-{step:08d}" for step in reversed(checkpoint_steps(folder))]


def load_newest_checkpoint(folder: Path, state: TrainingState, max_steps: int) -> Path | None:
    """Fill `state` from the newest intact checkpoint. Damaged ones are reported and skipped.

    A failing disk raises RunError: the failure may pass, and resuming from an older checkpoint would delete the newest.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        try:
            load_checkpoint(path, state, max_steps)
            return path
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a damaged file leads to errors of json, safetensors and torch
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise RunError(f"{path}: cannot be read: {one_line(error)}") from error
            print(f"{path}: unreadable, trying the one before it ({one_line(error)})")
    if checkpoints:
        message = f"none of the {len(checkpoints)} checkpoints can be read; delete the folder to restart"
        raise UserError(f"{folder}: {message}")
    return None


def load_checkpoint(path: Path, state: TrainingState, max_steps: int) -> None:
    """Fill `state` from a checkpoint; a damaged one raises an exception of any type."""
    content = json.loads((path / STATE).read_text(encoding="utf-8"))
    scalars = {name: checked(content[name], kind, name) for name, kind in SAVED.items()}
    step = scalars["step"]
    if step != int(path.name.removeprefix("step-")) or step > max_steps:
        raise ValueError(f"step={step}")
    files = [STUDENT, EMA, OPTIMIZER] + ([WEIGHTING] if state.weighting is not None else [])
    for file in files:
        if sha256(path / file) != scalars["sha256"].get(file):
            raise ValueError(f"the SHA-256 of {file} differs from the one in {STATE}")
    tensors = {file: load_file(path / file) for file in files}

    state.student.load_state_dict(tensors[STUDENT])
    if state.weighting is not None:
        state.weighting.load_state_dict(tensors[WEIGHTING])
    for (name, _), shadow in zip(state.student.named_parameters(), state.ema.shadow_params, strict=True):
        shadow.copy_(tensors[EMA][name])
    trained = state.trained
    for key, value in tensors[OPTIMIZER].items():
        name, moment = key.rsplit("/", 1)
        parameter = trained[name]
        # a fused step needs everything on the parameter's device, and the moments in its memory format
        like = parameter if value.shape == parameter.shape else torch.empty_like(value, device=parameter.device)
        state.optimizer.state[parameter][moment] = torch.empty_like(like).copy_(value)
    for name in SCALARS:
        setattr(state, name, scalars[name])
    state.ema.optimization_step = scalars["ema_step"]
    if state.scaler is not None and content["scaler"] is not None:
        state.scaler.load_state_dict(content["scaler"])


def prepare_checkpoints(folder: Path) -> None:
    """Create `folder` and delete what a killed run left half-written in it."""
    make_folder(folder, "output_dir")
    remove_leftovers(folder, "step-*")
