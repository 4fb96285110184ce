"""What a training run changes: weights, their EMA, AdamW's moments, and scalars such as the step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from deme.config.trainings import Training
from deme.models.encoders import Encoder

STUDENT = "student.safetensors"
EMA = "ema.safetensors"
OPTIMIZER = "optimizer.safetensors"
WEIGHTING = "loss_weighting.safetensors"  # only if it is learned


@dataclass(frozen=True)
class Networks:
    """The networks of a run, and what they need."""

    student: nn.Module  # trained in place; float32
    teacher: nn.Module | None  # the pretrained network, or all experts as one; the trainer freezes it
    scheduler: DDPMScheduler  # the noise schedule
    encoder: Encoder


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
        self.student = student
        self.scaler = scaler
        self.weighting = weighting
        self.trained = dict(student.named_parameters())  # all parameters that the optimizer trains
        groups: list[dict] = [{"params": list(student.parameters())}]
        if weighting is not None:
            self.trained |= weighting.named_parameters(prefix="loss_weighting")
            groups.append({"params": list(weighting.parameters()), "lr": weighting_learning_rate, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
            fused=True,
        )
        # a scheduler that is stepped through accelerate would count the steps of all processes
        steps = {"num_warmup_steps": settings.lr_warmup_steps, "num_training_steps": settings.max_steps}
        self.learning_rate_factor = get_scheduler(settings.lr_scheduler, self.optimizer, **steps).lr_lambdas[0]
        options = {"decay": settings.ema_decay, "inv_gamma": settings.ema_inv_gamma, "power": settings.ema_power}
        self.ema = EMAModel(student.parameters(), use_ema_warmup=True, foreach=True, **options)

    def set_learning_rate(self) -> None:
        """Set each group's learning rate for the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.learning_rate_factor(self.step)

    def finish_step(self) -> None:
        """Count an optimizer step and update the EMA: shadow ← shadow + (1 − decay)(weight − shadow).

        This is EMAModel.step in one pass over the memory instead of two.
        """
        self.step += 1
        self.ema.cur_decay_value = self.ema.get_decay(self.step)
        weights = [parameter.detach() for parameter in self.student.parameters()]
        torch._foreach_lerp_(self.ema.shadow_params, weights, 1 - self.ema.cur_decay_value)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The student has the EMA weights, in eval mode, inside the block."""
        self.ema.store(self.student.parameters())
        self.ema.copy_to(self.student.parameters())
        try:
            self.student.eval()
            yield
        finally:
            self.ema.restore(self.student.parameters())
            self.student.train()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """File name → tensors; AdamW has its moments only after the first step."""
        moments = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.trained.items()}
        files = {
            STUDENT: self.student.state_dict(),
            EMA: dict(zip(self.trained, self.ema.shadow_params, strict=False)),  # the student's come first
            OPTIMIZER: {f"{name}/{key}": value for name, values in moments.items() for key, value in values.items()},
        }
        return files if self.weighting is None else files | {WEIGHTING: self.weighting.state_dict()}

    def load(self, saved: dict[str, dict[str, torch.Tensor]]) -> None:
        """Copy saved tensors into those of this state."""
        for file, tensors in self.tensors().items():
            for name, tensor in tensors.items():
                if file != OPTIMIZER:
                    tensor.copy_(saved[file][name])
        for key, value in saved[OPTIMIZER].items():
            name, moment = key.rsplit("/", 1)
            parameter = self.trained[name]
            # a fused step needs everything on the parameter's device, and the moments in its memory format
            like = parameter if value.shape == parameter.shape else torch.empty_like(value, device=parameter.device)
            self.optimizer.state[parameter][moment] = torch.empty_like(like).copy_(value)
