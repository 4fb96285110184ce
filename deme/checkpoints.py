"""Checkpoints of a training run: student, EMA and optimizer as safetensors, scalars as JSON.

`checkpoints/step-00005000/` appears whole or not at all; only the newest few are kept.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from deme.config import UserError
from deme.files import atomic_folder, make_folder, remove_leftovers

SCALARS = (
    "step",
    "skipped_steps",
    "lowest_held_out_loss",
    "held_out_losses_since",
)  # of TrainingState, saved as they are


@dataclass
class TrainingState:
    """Everything that a resumed run needs; the random draws follow from the step."""

    student: nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # fp16's loss scale
    step: int = 0  # optimizer steps done
    skipped_steps: int = 0  # fp16: steps skipped in a row
    lowest_held_out_loss: float | None = None
    held_out_losses_since: int = 0  # measured since the lowest one


def save_checkpoint(folder: Path, state: TrainingState, keep: int) -> None:
    """Write `folder`/step-…, then delete all but it and the `keep` − 1 before it."""
    path = folder / f"step-{state.step:08d}"
    names = [name for name, _ in state.student.named_parameters()]
    scalars = {
        **{name: getattr(state, name) for name in SCALARS},
        "ema_step": state.ema.optimization_step,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
    }
    with atomic_folder(path) as temporary:
        _save(state.student.state_dict(), temporary / "student.safetensors")
        _save(dict(zip(names, state.ema.shadow_params, strict=True)), temporary / "ema.safetensors")
        moments = state.optimizer.state_dict()["state"]
        _save(
            {f"{names[i]}/{key}": value for i, values in moments.items() for key, value in values.items()},
            temporary / "optimizer.safetensors",
        )
        (temporary / "state.json").write_text(json.dumps(scalars, indent=2), encoding="utf-8")
    checkpoints = list_checkpoints(folder)
    position = checkpoints.index(path)  # newer ones could not be read, or the run would have gone on from there
    for other in checkpoints[:position] + checkpoints[position + keep :]:
        shutil.rmtree(other)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), reverse=True)


def load_newest_checkpoint(folder: Path, state: TrainingState) -> Path | None:
    """Fill `state` from the newest checkpoint that can be read; unreadable ones are reported and passed over.

    Raises:
        UserError: there are checkpoints but none can be read.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        try:
            _load_checkpoint(path, state)
            return path
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            print(f"{path}: unreadable, trying the one before it ({error})")
    if checkpoints:
        raise UserError(
            f"{folder}: none of the {len(checkpoints)} checkpoints can be read; delete the folder to restart"
        )
    return None


def _load_checkpoint(path: Path, state: TrainingState) -> None:
    # read everything before changing anything: a truncated file must not leave half a state
    scalars = json.loads((path / "state.json").read_text(encoding="utf-8"))
    student, ema, moments = (load_file(path / f"{part}.safetensors") for part in ("student", "ema", "optimizer"))
    state.student.load_state_dict(student)
    names = [name for name, _ in state.student.named_parameters()]
    for name, shadow in zip(names, state.ema.shadow_params, strict=True):
        shadow.copy_(ema[name])
    parameters = dict(state.student.named_parameters())
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


def prepare_checkpoints(folder: Path) -> None:
    """Create `folder` and delete what a killed run left half-written in it."""
    make_folder(folder, "output_dir")
    remove_leftovers(folder)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
