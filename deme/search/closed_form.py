"""The closed form: a network is nearly linear in the coefficients, so that least squares gives them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from deme.measure.noisy import Batch
from deme.method.candidates import Candidates
from deme.search.probes import Squares
from deme.search.state import Trace, load_state, save_state

# torch makes forward derivatives by it, and warns of that itself
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)

JVP_PASSES = 2  # a Jacobian-vector product also computes what it is the derivative of


@torch.no_grad()
def linearized(batch: Batch, candidates: Candidates, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch adds to the normal equations about the network's weights.

    With the residual r_i = y_i − ε(x_i) and the columns J_i of derivatives by the coefficients, it is Σ c_i J_iᵀ J_i
    and Σ c_i J_iᵀ r_i: float64, shapes (P, P) and (P,), P = groups · ranges in row-major order.
    """
    parameters = dict(network.named_parameters())

    def predict(some: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = (batch.noisy, batch.timesteps)
        keywords = {**batch.condition, "return_dict": False}
        return functional_call(network, parameters | some, inputs, keywords)[0].float()

    groups, ranges = candidates.shape
    columns = []
    with sdpa_kernel(SDPBackend.MATH), contiguous_norms(network):  # torch's faster kernels have no forward derivatives
        for group in range(groups):
            for number in range(ranges):
                tangent = candidates.task_vector(group, number)  # of these alone: what lies before them is constant
                moved = {name: parameters[name] for name in tangent}
                prediction, column = jvp(predict, (moved,), (tangent,))
                columns.append(column.flatten())
    scale = batch.weights.sqrt()[:, None].expand(-1, prediction[0].numel()).flatten()
    jacobian = (torch.stack(columns) * scale).double()
    residual = ((batch.target - prediction).flatten() * scale).double()
    return jacobian @ jacobian.T, jacobian @ residual


@contextmanager
def contiguous_norms(network: nn.Module) -> Iterator[None]:
    """Give group normalizations contiguous inputs: torch 2.11 has no forward derivative for others."""
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ridge_step(
    curvature: np.ndarray, slope: np.ndarray, about: np.ndarray, pull: float, interval: tuple[float, float]
) -> np.ndarray:
    """argmin over w of (w − w₀)ᵀ A (w − w₀) − 2 bᵀ (w − w₀) + pull · ‖w‖² within bounds: float64, shape (P,).

    Args:
        curvature: A, positive semidefinite, shape (P, P).
        slope: b, shape (P,).
        about: w₀, shape (P,).
        interval: of each coefficient.
    """
    values, vectors = np.linalg.eigh(curvature + pull * np.eye(len(slope)))
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    roots = np.sqrt(np.where(kept, values, 0))
    # the same least squares as rows: ‖√Λ Vᵀ w − Λ^(−½) Vᵀ (A w₀ + b)‖²
    rows = roots[:, None] * vectors.T
    target = vectors.T @ (curvature @ about + slope)
    return lsq_linear(rows, np.where(kept, target / np.where(kept, roots, 1), 0), interval).x


def closed_form(
    squares: Squares,
    candidates: Candidates,
    network: nn.Module,
    ridge: float,
    repeats: int,
    interval: tuple[float, float],
    file: Path,
) -> Trace:
    """Ridge regression on the normal equations about the pretrained network, then about its solution (Gauss-Newton).

    Args:
        network: that candidates are formed in.
        ridge: the pull to 0, relative to the mean curvature at the pretrained network.
        repeats: of the step, each about the best coefficients so far; one that is no better is the last.
        interval: that each coefficient has to lie in.
        file: how far it has come, written after each batch.

    Returns:
        the pretrained network, and the solution of each step.
    """
    accelerator = squares.accelerator
    count = candidates.shape[0] * candidates.shape[1]
    device = accelerator.device
    state = {
        "done": torch.zeros(2, dtype=torch.int64),  # steps, and batches of the next one
        "curvature": torch.zeros(count, count, dtype=torch.float64),
        "slope": torch.zeros(count, dtype=torch.float64),
        "pull": torch.zeros((), dtype=torch.float64),
        "spent": torch.zeros((), dtype=torch.int64),  # passes
    }
    found = load_state(accelerator, file, state, candidates.shape)
    trace = Trace()
    if found is None:
        state["spent"] += squares.spent
        trace.add(squares.spent, 1.0, np.zeros(candidates.shape))
    else:
        trace = Trace.of(found)
        state = {name: found[name] for name in state}

    def save() -> None:
        save_state(accelerator, file, state | trace.tensors())

    while int(state["done"][0]) <= repeats and trace.best == len(trace.values) - 1:
        steps, batches = state["done"].tolist()
        start = trace.coefficients[trace.best]
        candidates.form(network, start)
        for place in range(batches, len(squares.batches)):
            added = [torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)]
            if len(squares.batches[place].weights) > 0:
                added = linearized(squares.batches[place], candidates, network)
            for name, part in zip(("curvature", "slope"), added, strict=True):
                state[name] = state[name] + accelerator.reduce(part.to(device), "sum").cpu()
            images = accelerator.reduce(torch.tensor(len(squares.batches[place].weights), device=device), "sum")
            state["spent"] = state["spent"] + JVP_PASSES * count * int(images)
            state["done"] = torch.tensor([steps, place + 1])
            save()
        if steps == 0:
            state["pull"] = ridge * state["curvature"].diagonal().mean()
        equations = (state[name].numpy() for name in ("curvature", "slope"))
        coefficients = ridge_step(*equations, start.ravel(), float(state["pull"]), interval).reshape(candidates.shape)
        candidates.form(network, coefficients)
        value = squares.value(network)
        state["spent"] = state["spent"] + squares.passes
        trace.add(int(state["spent"]), value, coefficients)
        state |= {name: torch.zeros_like(state[name]) for name in ("curvature", "slope")}
        state["done"] = torch.tensor([steps + 1, 0])
        save()
    return trace
