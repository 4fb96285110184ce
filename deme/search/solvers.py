"""Coefficients of least match or loss: in closed form, and by gradient descent."""

import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from deme.config.sections import GRADIENT_PASSES, Search
from deme.measure.noisy import Batch
from deme.method.candidates import Candidates
from deme.search.objectives import Squares, total, weighted_squares
from deme.search.progress import Evaluated, Progress, Tensors

# torch makes forward derivatives by it, and warns of that itself
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)

JVP_PASSES = 2  # a Jacobian-vector product also computes what it is the derivative of
MEASURED_EVERY = 10  # steps of the gradient descent
EQUATIONS = ("curvature", "slope")
BETAS = (0.9, 0.999)
EPSILON = 1e-8


# --- closed form


def closed_form(squares: Squares, settings: Search, file: Path, way: str = "closed form") -> list[Evaluated]:
    """Least squares, as a network is nearly linear in the coefficients.

    Ridge regression solves the normal equations about the pretrained network, then about the solution (Gauss-Newton)
    while that is better. The ridge is relative to the mean curvature at the pretrained network.

    Returns the pretrained network and the solution of each step. The file is written after each batch.
    """
    candidates = squares.candidates
    size = int(np.prod(candidates.shape))
    state = {
        "done": torch.zeros(2, dtype=torch.int64),  # steps, and batches of the next one
        "curvature": torch.zeros(size, size, dtype=torch.float64),
        "slope": torch.zeros(size, dtype=torch.float64),
        "pull": torch.zeros((), dtype=torch.float64),
        "spent": torch.tensor(squares.spent),  # UNet passes
    }
    progress = Progress(squares.processes, file, way, squares.name, state)
    state = progress.state
    if not progress.rows:
        progress.add(1.0, np.zeros(candidates.shape))
    while int(state["done"][0]) <= settings.gauss_newton and progress.best is progress.rows[-1]:
        steps, batches = state["done"].tolist()
        start = progress.best.coefficients
        candidates.form(squares.network, start)
        for number in range(batches, len(squares.batches)):
            _add_equations(state, squares, squares.batches[number])
            state["done"] = torch.tensor([steps, number + 1])
            progress.save()
        if steps == 0:
            state["pull"] = settings.ridge * state["curvature"].diagonal().mean()
        curvature, slope = state["curvature"].numpy(), state["slope"].numpy()
        solution = ridge_step(curvature, slope, start.ravel(), float(state["pull"]), settings.interval)
        coefficients = solution.reshape(candidates.shape)
        value = squares.value(coefficients)
        state["spent"] += squares.images
        progress.add(value, coefficients)
        state |= {name: torch.zeros_like(state[name]) for name in EQUATIONS}
        state["done"] = torch.tensor([steps + 1, 0])
        progress.save()
    return progress.rows


def _add_equations(state: Tensors, squares: Squares, batch: Batch) -> None:
    """Add a batch to the normal equations about the network's weights, over all processes."""
    processes = squares.processes
    added = [torch.zeros_like(state[name]) for name in EQUATIONS]
    if len(batch.weights) > 0:
        added = linearized(batch, squares.candidates, squares.network)
    for name, part in zip(EQUATIONS, added, strict=True):
        state[name] = state[name] + processes.reduce(part.to(processes.device), "sum").cpu()
    state["spent"] += JVP_PASSES * len(state["slope"]) * total(processes, len(batch.weights))


@torch.no_grad()
def linearized(batch: Batch, candidates: Candidates, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch adds to the normal equations about the network's weights.

    With the residual r_i = y_i − ε(x_i) and the columns J_i of derivatives by the coefficients, it is Σ c_i J_iᵀ J_i
    and Σ c_i J_iᵀ r_i: float64, shapes (P, P) and (P,), P = groups · ranges in row-major order.
    """
    parameters = dict(network.named_parameters())

    def predict(some: Tensors) -> torch.Tensor:
        inputs = (batch.noisy, batch.timesteps)
        keywords = {**batch.condition, "return_dict": False}
        return functional_call(network, parameters | some, inputs, keywords)[0].float()

    columns = []
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # faster kernels have no forward derivatives
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):  # torch 2.11 has forward derivatives for contiguous inputs alone
                hook = module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
                stack.callback(hook.remove)
        for group, number in np.ndindex(candidates.shape):
            tangent = candidates.task_vector(group, number)  # of these alone: what lies before them is constant
            moved = {name: parameters[name] for name in tangent}
            prediction, column = jvp(predict, (moved,), (tangent,))
            columns.append(column.flatten())
    scale = batch.weights.sqrt()[:, None].expand(-1, prediction[0].numel()).flatten()
    jacobian = (torch.stack(columns) * scale).double()
    residual = ((batch.target - prediction).flatten() * scale).double()
    return jacobian @ jacobian.T, jacobian @ residual


def ridge_step(
    curvature: np.ndarray, slope: np.ndarray, about: np.ndarray, pull: float, interval: tuple[float, float]
) -> np.ndarray:
    """argmin over w in bounds of (w − w₀)ᵀ A (w − w₀) − 2 bᵀ (w − w₀) + pull · ‖w‖²: float64, shape (P,).

    A is the curvature, positive semidefinite, of shape (P, P); b is the slope; w₀ is `about`.
    """
    values, vectors = np.linalg.eigh(curvature + pull * np.eye(len(slope)))
    positive = values > values.max() * len(values) * np.finfo(np.float64).eps
    roots = np.sqrt(np.where(positive, values, 0))
    # the same least squares as rows: ‖√Λ Vᵀ w − Λ^(−½) Vᵀ (A w₀ + b)‖²
    rows = roots[:, None] * vectors.T
    target = vectors.T @ (curvature @ about + slope)
    return lsq_linear(rows, np.where(positive, target / np.where(positive, roots, 1), 0), interval).x


# --- gradient descent


def gradient_descent(
    squares: Squares, held_out: Squares, settings: Search, start: np.ndarray, file: Path, spent: int = 0
) -> list[Evaluated]:
    """Adam (Kingma and Ba 2015) on the coefficients, a batch a step; returns the measurements on the held-out images.

    One backward pass gives the gradient by the weights; times the task vectors it is the gradient by the coefficients.
    So candidates are formed in place, and no graph over merged copies of the weights is held.

    Args:
        held_out: the same objective on other images, which stops the descent early.
        start: what the pull is to, shape (groups, ranges).
        spent: UNet passes before.
    """
    origin = torch.from_numpy(np.array(start, dtype=np.float64))  # a copy: the array may be read-only
    state = {
        "step": torch.zeros((), dtype=torch.int64),
        "spent": torch.tensor(spent + held_out.spent),  # UNet passes
        "coefficients": origin.clone(),
        "mean": torch.zeros_like(origin),
        "square": torch.zeros_like(origin),
    }
    progress = Progress(squares.processes, file, "gradient", f"{squares.name}, held-out images", state)
    state = progress.state

    def measure() -> None:
        coefficients = state["coefficients"].numpy()
        value = held_out.value(coefficients)
        state["spent"] += held_out.images
        progress.add(value, coefficients)
        progress.save()

    if not progress.rows:
        measure()
    squares.network.requires_grad_(True)
    try:
        while state["step"] < settings.gradient_steps:
            if len(progress.rows) - 1 - progress.rows.index(progress.best) >= settings.gradient_patience:
                break
            gradient, images = _gradient(squares, int(state["step"]), state["coefficients"])
            gradient += 2 * settings.pull * (state["coefficients"] - origin) / origin.numel()
            state["step"] += 1
            state["spent"] += GRADIENT_PASSES * images
            _adam_step(state, gradient, settings)
            if int(state["step"]) % MEASURED_EVERY == 0 or state["step"] == settings.gradient_steps:
                measure()
    finally:
        squares.network.requires_grad_(False)
        squares.network.zero_grad()
    return progress.rows


def _gradient(squares: Squares, step: int, coefficients: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The gradient of the objective on one batch, and how many images that is, over all processes."""
    processes, candidates, network = squares.processes, squares.candidates, squares.network
    batch = squares.batches[step % len(squares.batches)]
    candidates.form(network, coefficients)
    gradient = torch.zeros(candidates.shape, dtype=torch.float64, device=processes.device)
    if len(batch.weights) > 0:
        network.zero_grad()
        weighted_squares(batch, batch.predict(network)).backward()
        gradient = candidates.gradient(network)
    images = total(processes, len(batch.weights))
    return processes.reduce(gradient, "sum").cpu() * squares.images / images, images


def _adam_step(state: Tensors, gradient: torch.Tensor, settings: Search) -> None:
    """Adam's update of the coefficients, then back into the bounds."""
    first, second = BETAS
    step = int(state["step"])
    state["mean"] = first * state["mean"] + (1 - first) * gradient
    state["square"] = second * state["square"] + (1 - second) * gradient**2
    size = settings.gradient_learning_rate / (1 - first**step)
    scale = (state["square"] / (1 - second**step)).sqrt() + EPSILON
    state["coefficients"] = (state["coefficients"] - size * state["mean"] / scale).clamp(*settings.interval)
