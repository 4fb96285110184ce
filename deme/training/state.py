"""What a training run changes, and its checkpoints: `checkpoints/step-00005000/`, each whole or absent.

Student, EMA and optimizer are safetensors; `state.json` holds the scalars and the SHA-256 of the other files.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from deme.config.paths import average_name
from deme.config.sections import Timesteps
from deme.config.trainings import Finetune, Training
from deme.data.opening import torch_seed
from deme.errors import RunError, UserError, is_out_of_memory, naming, one_line
from deme.job import files
from deme.method.losses import Experts
from deme.method.posthoc_ema import decay
from deme.method.process import Process, process_of
from deme.models.adapters import freeze_base, load_denoisers, new_lora, sharing_weights
from deme.models.denoisers import load_scheduler
from deme.models.encoder_loading import load_encoder, try_out
from deme.models.encoders import Encoder
from deme.models.variants import ModelFiles
from deme.training.session import Objective

STUDENT, EMA, OPTIMIZER = "student.safetensors", "ema.safetensors", "optimizer.safetensors"
WEIGHTING = "loss_weighting.safetensors"  # only if it is learned
STATE = "state.json"
LORA_START = 7  # the purpose that the seed of a LoRA's first weights names


@dataclass(frozen=True)
class Networks:
    """The networks of a run, and what they need."""

    student: nn.Module  # trained in place; float32, but for the frozen base of a LoRA
    teacher: nn.Module | None  # the pretrained network, or all experts as one; the trainer freezes it
    process: Process  # the noise
    encoder: Encoder


def load_networks(
    inputs: ModelFiles, key: str, source: str, timesteps: Timesteps, settings: Finetune | None = None
) -> Networks:
    """Load and try out a pipeline, and the experts as its teacher if `inputs` has more than one denoiser.

    Errors name the setting `key` and its value, which the pipeline comes from. `timesteps` has the density that
    training draws from. If `settings` are those of a LoRA, the denoiser is frozen, in finetune.base_precision, but for
    a LoRA that it has.
    """
    loading = load_denoisers(inputs.pipeline, inputs.denoisers)
    with naming(key, source):
        denoiser = next(loading)
        process = process_of(load_scheduler(inputs.pipeline))
        encoder = load_encoder(inputs.pipeline, denoiser)
        try_out(denoiser, process, encoder)
    experts = list(loading)
    for path, expert in zip(inputs.denoisers[1:], experts, strict=True):
        with naming(path):
            try_out(expert, process, encoder)
    if settings is not None and settings.lora_rank is not None:
        freeze_base(denoiser, settings)
    process = process_of(process.scheduler, timesteps)
    return Networks(denoiser, Experts(experts) if experts else None, process, encoder)


def with_new_lora(start: Networks, settings: Finetune, objective: Objective) -> Networks:
    """The networks that train a new LoRA on the frozen network of `start`, whose weights student and teacher share."""
    torch.manual_seed(torch_seed(np.random.default_rng((*objective.stream, LORA_START))))
    teacher = sharing_weights(start.student) if objective.consistency_weight > 0 else None
    return replace(start, student=new_lora(start.student, settings), teacher=teacher)


@dataclass
class Scalars:
    """The scalars of a run, as a checkpoint's `state.json` holds them."""

    step: int = 0  # optimizer steps done
    skipped_steps: int = 0  # fp16: steps skipped in a row
    lowest_held_out_loss: float | None = None
    held_out_losses_since: int = 0  # measured since the lowest one


class TrainingState(Scalars):
    """Everything that a resumed run needs; the random draws follow from the step.

    Learned weights of the loss have a learning rate of their own and no decay; `scaler` is fp16's loss scale.
    """

    def __init__(
        self,
        student: nn.Module,
        settings: Training,
        scaler: torch.amp.GradScaler | None = None,
        weighting: nn.Module | None = None,
        weighting_learning_rate: float | None = None,
    ):
        super().__init__()
        self.student, self.scaler, self.weighting = student, scaler, weighting
        # all parameters that the optimizer trains; the base of a LoRA is frozen
        self.trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
        self.weights = list(self.trained.values())  # those of the student
        groups: list[dict] = [{"params": list(self.weights)}]
        if weighting is not None:
            self.trained |= weighting.named_parameters(prefix="loss_weighting")
            groups.append({"params": list(weighting.parameters()), "lr": weighting_learning_rate, "weight_decay": 0.0})
        options = {"lr": settings.learning_rate, "betas": (settings.adam_beta1, settings.adam_beta2)}
        options |= {"weight_decay": settings.adam_weight_decay, "eps": settings.adam_epsilon}
        self.optimizer = torch.optim.AdamW(groups, **options, fused=True)
        # a scheduler that is stepped through accelerate would count the steps of all processes
        steps = {"num_warmup_steps": settings.lr_warmup_steps, "num_training_steps": settings.max_steps}
        self.learning_rate_factor = get_scheduler(settings.lr_scheduler, self.optimizer, **steps).lr_lambdas[0]
        options = {"decay": settings.ema_decay, "inv_gamma": settings.ema_inv_gamma, "power": settings.ema_power}
        self.ema = EMAModel(self.weights, use_ema_warmup=True, foreach=True, **options)
        widths = settings.ema_profiles if isinstance(settings, Finetune) else []
        self.profiles = {width: [weight.detach().clone() for weight in self.weights] for width in widths}

    def finish_step(self) -> None:
        """Count an optimizer step and update the EMA: shadow ← shadow + (1 − decay)(weight − shadow).

        This is EMAModel.step in one pass over the memory instead of two.
        """
        self.step += 1
        self.ema.cur_decay_value = self.ema.get_decay(self.step)
        weights = [weight.detach() for weight in self.weights]
        torch._foreach_lerp_(self.ema.shadow_params, weights, 1 - self.ema.cur_decay_value)
        for width, average in self.profiles.items():
            torch._foreach_lerp_(average, weights, 1 - decay(width, self.step))

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The student has the EMA weights, in eval mode, inside the block."""
        self.ema.store(self.weights)
        self.ema.copy_to(self.weights)
        try:
            self.student.eval()
            yield
        finally:
            self.ema.restore(self.weights)
            self.student.train()

    def averaged(self, width: float | None = None) -> dict[str, torch.Tensor]:
        """The EMA weights by name, or the average of a width of `ema_profiles`."""
        average = self.ema.shadow_params if width is None else self.profiles[width]
        return dict(zip(self.trained, average, strict=False))  # the student's come first

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """File name → tensors; AdamW has its moments only after the first step."""
        moments = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.trained.items()}
        saved = {
            STUDENT: {name: weight.detach() for name, weight in zip(self.trained, self.weights, strict=False)},
            EMA: self.averaged(),
            OPTIMIZER: {f"{name}/{key}": value for name, values in moments.items() for key, value in values.items()},
        }
        saved |= {f"{average_name(width)}.safetensors": self.averaged(width) for width in self.profiles}
        return saved if self.weighting is None else saved | {WEIGHTING: self.weighting.state_dict()}

    def load(self, checkpoint: Path, max_steps: int) -> None:
        """Read a checkpoint; a damaged one raises an exception of any type."""
        content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        scalars = files.checked(content, Scalars)
        if scalars.step != int(checkpoint.name.removeprefix("step-")) or scalars.step > max_steps:
            raise ValueError(f"step={scalars.step}")
        mine = self.tensors()
        for file in mine:
            if files.sha256(checkpoint / file) != content["sha256"].get(file):
                raise ValueError(f"the SHA-256 of {file} differs from the one in {STATE}")
        saved = {file: load_file(checkpoint / file) for file in mine}
        for file in mine.keys() - {OPTIMIZER}:
            for name, tensor in mine[file].items():
                tensor.copy_(saved[file][name])
        for key, value in saved[OPTIMIZER].items():
            name, moment = key.rsplit("/", 1)
            parameter = self.trained[name]
            # a fused step needs everything on the parameter's device, and the moments in its memory format
            like = parameter if value.shape == parameter.shape else torch.empty_like(value, device=parameter.device)
            self.optimizer.state[parameter][moment] = torch.empty_like(like).copy_(value)
        vars(self).update(asdict(scalars))
        if self.scaler is not None and content["scaler"] is not None:
            self.scaler.load_state_dict(content["scaler"])


class CheckpointWriter:
    """Writes `folder`/step-… in the background: the state is copied, and a thread writes the copy to disk.

    One checkpoint is written at a time; then all but the last `keep` are deleted. The copy stays allocated, as a
    process fills new memory slowly.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
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
                copies = (torch.empty_like(value, device="cpu", pin_memory=value.is_cuda) for value in tensors.values())
                self.copies[file] = dict(zip(tensors, copies, strict=True))
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
            state.load(path, max_steps)
            return path
        except Exception as error:  # a damaged file leads to errors of json, safetensors and torch
            if is_out_of_memory(error):
                raise
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise RunError(f"{path}: cannot be read: {one_line(error)}") from error
            print(f"{path}: unreadable, trying the one before it ({one_line(error)})")
    if not checkpoints:
        return None
    raise UserError(f"{folder}: none of the {len(checkpoints)} checkpoints can be read; delete the folder to restart")
