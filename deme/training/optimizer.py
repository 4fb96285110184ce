"""AdamW, the learning rate as a function of the step, and the EMA of the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from deme.config.sections import Training


def make_optimizer(
    network: nn.Module,
    settings: Training,
    weighting: nn.Module | None = None,
    weighting_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over all weights, fused into one pass over the memory.

    Args:
        weighting: learned weights of the loss, with a learning rate of their own and without decay.
    """
    groups: list[dict] = [{"params": list(network.parameters())}]
    if weighting is not None:
        groups.append({"params": list(weighting.parameters()), "lr": weighting_learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        fused=True,
    )


def learning_rate_factor(optimizer: torch.optim.Optimizer, settings: Training) -> Callable[[int], float]:
    """Optimizer step → factor of each group's initial learning rate.

    A scheduler that is stepped through accelerate would count the steps of all processes.
    """
    steps = {"num_warmup_steps": settings.lr_warmup_steps, "num_training_steps": settings.max_steps}
    return get_scheduler(settings.lr_scheduler, optimizer, **steps).lr_lambdas[0]


def make_ema(network: nn.Module, settings: Training) -> EMAModel:
    """The EMA with decay min(ema_decay, 1 − (1 + n / inv_gamma)^(−power)) after optimizer step n + 1."""
    return EMAModel(
        network.parameters(),
        decay=settings.ema_decay,
        use_ema_warmup=True,
        inv_gamma=settings.ema_inv_gamma,
        power=settings.ema_power,
        foreach=True,
    )


def update_ema(ema: EMAModel, network: nn.Module) -> None:
    """shadow ← shadow + (1 − decay)(weight − shadow): EMAModel.step in one pass over the memory instead of two."""
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    weights = [parameter.detach() for parameter in network.parameters()]
    torch._foreach_lerp_(ema.shadow_params, weights, 1 - ema.cur_decay_value)


@contextmanager
def ema_weights(ema: EMAModel, network: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode with the EMA weights, inside the block."""
    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    try:
        yield network.eval()
    finally:
        ema.restore(network.parameters())
        network.train()
