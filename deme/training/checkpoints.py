"""Checkpoints of a training run: `checkpoints/step-00005000/`, each whole or absent.

Student, EMA and optimizer are safetensors; `state.json` holds the scalars and the SHA-256 of the other files.
"""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deme.errors import RunError, UserError, one_line
from deme.job import files
from deme.training.state import Scalars, TrainingState

STATE = "state.json"


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

    def write(self, state: TrainingState, log: Path, last: bool = False) -> None:
        """Copy the state and have the copy written. Raises RunError if the previous checkpoint could not be written.

        The run's `last` checkpoint is tried all the same. The log is synced first, so that a crash loses no line.
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
        scalars = asdict(state) | {"scaler": state.scaler and state.scaler.state_dict()}
        self.unfinished = self.thread.submit(self._write, scalars, log)

    def wait(self, block: bool = True) -> None:
        """Wait for the checkpoint under way, or return at once. Raises RunError if it could not be written."""
        if self.unfinished is not None and (block or self.unfinished.done()):
            unfinished, self.unfinished = self.unfinished, None
            unfinished.result()

    def _write(self, scalars: dict, log: Path) -> None:
        path = self.folder / f"step-{scalars['step']:08d}"
        with files.atomic_folder(path) as temporary:
            files.sync_to_disk(log)
            for file, tensors in self.copies.items():
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / file)
            hashes = {"sha256": {file: files.sha256(temporary / file) for file in self.copies}}
            (temporary / STATE).write_text(json.dumps(scalars | hashes, indent=2), encoding="utf-8")
        for newer in list_checkpoints(self.folder):  # unreadable, or the run would have resumed from it
            if newer > path:
                shutil.rmtree(newer, ignore_errors=True)
        self.delete_older(path)

    def delete_older(self, path: Path) -> None:
        """Delete all checkpoints before `path` but for the `keep` − 1 newest of them."""
        for other in [other for other in list_checkpoints(self.folder) if other < path][self.keep - 1 :]:
            shutil.rmtree(other, ignore_errors=True)  # a later call deletes the rest


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return [folder / f"step-{step:08d}" for step in reversed(files.checkpoint_steps(folder))]


def load_newest_checkpoint(folder: Path, state: TrainingState, max_steps: int) -> Path | None:
    """Fill `state` from the newest intact checkpoint. Damaged ones are reported and skipped.

    What a killed run left half-written is deleted. A failing disk raises RunError: the failure may pass, and resuming
    from an older checkpoint would delete the newest.
    """
    files.make_folder(folder, "output_dir")
    files.remove_leftovers(folder, "step-*")
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
    scalars = files.checked(content, Scalars)
    if scalars.step != int(path.name.removeprefix("step-")) or scalars.step > max_steps:
        raise ValueError(f"step={scalars.step}")
    names = state.tensors().keys()
    for file in names:
        if files.sha256(path / file) != content["sha256"].get(file):
            raise ValueError(f"the SHA-256 of {file} differs from the one in {STATE}")
    state.load({file: load_file(path / file) for file in names})
    vars(state).update(asdict(scalars))
    if state.scaler is not None and content["scaler"] is not None:
        state.scaler.load_state_dict(content["scaler"])
