"""Gradient descent on the coefficients, with early stopping on images that it does not descend on."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from deme.config.sections import GRADIENT_PASSES, Search
from deme.method.candidates import Candidates
from deme.search.probes import Squares, weighted_squares
from deme.search.state import Trace, load_state, save_state

MEASURED_EVERY = 10  # steps
BETAS = (0.9, 0.999)
EPSILON = 1e-8


def gradient_descent(
    squares: Squares,
    held_out: Squares,
    candidates: Candidates,
    network: nn.Module,
    settings: Search,
    start: np.ndarray,
    file: Path,
) -> Trace:
    """Adam (Kingma and Ba 2015) on the coefficients, a batch a step.

    The gradient by the weights, which one backward pass gives, times the task vectors is the gradient by the
    coefficients: candidates are formed in place, and no graph over merged copies of the weights is held.

    Args:
        held_out: the same objective on other images; once it has not fallen for long, the descent stops.
        network: that candidates are formed in.
        start: shape (groups, ranges); what the pull is to.
        file: how far it has come, written with each measurement.

    Returns:
        the measurements: the objective on the held-out images.
    """
    accelerator = squares.accelerator
    origin = torch.from_numpy(np.array(start, dtype=np.float64))  # a copy: the array may be read-only
    state = {
        "step": torch.zeros((), dtype=torch.int64),
        "spent": torch.zeros((), dtype=torch.int64),  # passes
        "coefficients": origin.clone(),
        "mean": torch.zeros_like(origin),
        "square": torch.zeros_like(origin),
    }
    found = load_state(accelerator, file, state, candidates.shape)
    trace = Trace()
    if found is not None:
        trace = Trace.of(found)
        state = {name: found[name] for name in state}

    def measure() -> None:
        candidates.form(network, state["coefficients"])
        value = held_out.value(network)
        state["spent"] += held_out.passes
        trace.add(int(state["spent"]), value, state["coefficients"].numpy())
        save_state(accelerator, file, state | trace.tensors())

    if found is None:
        state["spent"] += held_out.spent
        measure()
    network.requires_grad_(True)
    try:
        while state["step"] < settings.gradient_steps:
            if len(trace.values) - 1 - trace.best >= settings.gradient_patience:
                break
            step = int(state["step"])
            gradient, images = _gradient(squares, step, candidates, network, state["coefficients"])
            gradient += 2 * settings.pull * (state["coefficients"] - origin) / origin.numel()
            state["step"] += 1
            state["spent"] += GRADIENT_PASSES * images
            _adam_step(state, gradient, settings)
            if int(state["step"]) % MEASURED_EVERY == 0 or state["step"] == settings.gradient_steps:
                measure()
    finally:
        network.requires_grad_(False)
        network.zero_grad()
    return trace


def _gradient(
    squares: Squares, step: int, candidates: Candidates, network: nn.Module, coefficients: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """The gradient of the objective on one batch, and how many images that is, over all processes."""
    accelerator = squares.accelerator
    batch = squares.batches[step % len(squares.batches)]
    candidates.form(network, coefficients)
    found = torch.zeros(candidates.shape, dtype=torch.float64, device=accelerator.device)
    if len(batch.weights) > 0:
        network.zero_grad()
        weighted_squares(batch, batch.predict(network)).backward()
        found = candidates.gradient(network)
    images = torch.tensor(len(batch.weights), device=accelerator.device)
    found, images = accelerator.reduce(found, "sum").cpu(), int(accelerator.reduce(images, "sum"))
    return found * squares.images / images, images


def _adam_step(state: dict[str, torch.Tensor], gradient: torch.Tensor, settings: Search) -> None:
    """Adam's update of the coefficients, then back into the bounds."""
    first, second = BETAS
    step = int(state["step"])
    state["mean"] = first * state["mean"] + (1 - first) * gradient
    state["square"] = second * state["square"] + (1 - second) * gradient**2
    size = settings.gradient_learning_rate / (1 - first**step)
    scale = (state["square"] / (1 - second**step)).sqrt() + EPSILON
    state["coefficients"] = (state["coefficients"] - size * state["mean"] / scale).clamp(*settings.interval)
