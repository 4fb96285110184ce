"""Match and loss, which are sums of squares, and their least: in closed form, or by gradient descent."""

import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from deme.config.sections import Search
from deme.config.trainings import GRADIENT_PASSES
from deme.errors import UserError
from deme.job.processes import Processes, in_main_process
from deme.job.records import read_arrays, write_arrays
from deme.measure.noisy import Batch
from deme.method.task_vectors import Candidates

# torch makes forward derivatives by it, and warns of that itself
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)

LOSS_BINS = 16  # of timesteps, within which the denoising loss is compared with the pretrained network's
NO_DISTANCE = 1e-10  # of squares, relative to those of the predictions themselves: rounding
JVP_PASSES = 2  # a Jacobian-vector product also computes what it is the derivative of
MEASURED_EVERY = 10  # steps of the gradient descent
EQUATIONS = ("curvature", "slope")
COLUMNS = ("trace.passes", "trace.values", "trace.coefficients")  # of the candidates in a file


class Squares:
    """An objective Σ_i c_i ‖ε_w(x_i) − y_i‖² over all processes, which is 1 for the pretrained network.

    `match` compares with the expert y_i of the range that the timestep belongs to: the mean over the ranges of the
    squared distance relative to the pretrained network's. `loss` compares with what a network is trained to predict:
    the mean over LOSS_BINS bins of timesteps of the denoising loss relative to the pretrained network's.
    Candidates are formed in `network`.
    """

    @torch.no_grad()
    def __init__(
        self,
        name: str,
        probes: Sequence[Batch],
        candidates: Candidates,
        network: nn.Module,
        num_train_timesteps: int,
        processes: Processes,
    ):
        self.name, self.candidates, self.network, self.processes = name, candidates, network, processes
        if name == "match":
            count = candidates.shape[1]
            batches = [replace(batch, target=torch.empty_like(batch.target)) for batch in probes]
            for number in range(count):
                candidates.form_expert(network, number)
                for batch in batches:
                    if (chosen := batch.ranges == number).any():
                        batch.target[chosen] = batch.part(chosen).predict(network)
        else:
            count = LOSS_BINS
            batches = [
                replace(batch, ranges=(batch.timesteps * count // num_train_timesteps).long()) for batch in probes
            ]
        candidates.form(network, torch.zeros(candidates.shape))
        sums = torch.zeros(2, count, dtype=torch.float64, device=processes.device)
        for batch in batches:
            if len(batch.ranges) > 0:
                for row, difference in zip(sums, (batch.predict(network) - batch.target, batch.target), strict=True):
                    row.index_add_(0, batch.ranges, difference.square().flatten(1).sum(1).double())
        distances, sizes = processes.reduce(sums, "sum")
        for number in (distances <= NO_DISTANCE * sizes).nonzero().flatten().tolist():
            if name == "match":
                raise UserError(f"the expert of range {number} predicts what the pretrained network does")
            raise UserError(f"no image falls into bin {number} of {count} bins of timesteps")
        weights = (1 / (count * distances)).float()
        self.batches = [replace(batch, weights=weights[batch.ranges]) for batch in batches]  # this process's shares
        lengths = torch.tensor([len(batch.ranges) for batch in batches], device=processes.device)
        self.sizes: list[int] = processes.reduce(lengths, "sum").tolist()  # of the batches, over all processes
        self.images = sum(self.sizes)  # the UNet passes of one value
        self.spent = self.images * (2 if name == "match" else 1)  # UNet passes up to here

    def of_batch(self, batch: Batch) -> torch.Tensor:
        """What a batch adds to the objective of the network as it is: a scalar."""
        return (batch.weights * (batch.predict(self.network) - batch.target).square().flatten(1).sum(1)).sum()

    @torch.no_grad()
    def value(self, coefficients: np.ndarray) -> float:
        """The objective of a candidate; infinite if a prediction is not finite."""
        self.candidates.form(self.network, coefficients)
        added = [self.of_batch(batch).double() for batch in self.batches if len(batch.weights) > 0]
        start = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        value = float(self.processes.reduce(sum(added, start), "sum"))
        return value if math.isfinite(value) else math.inf  # numpy would take NaN for the lowest


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A candidate that was scored."""

    way: str
    objective: str  # match, loss, or fd with its number of images
    passes: int  # through the UNet since the search began
    value: float
    coefficients: np.ndarray  # float64, shape (groups, ranges)


class Progress:
    """A solver's state, with the UNet passes `spent`, and the candidates that it has scored; kept in a file."""

    def __init__(self, processes: Processes, file: Path, way: str, objective: str, state: dict[str, torch.Tensor]):
        self.processes, self.file, self.way, self.objective, self.state = processes, file, way, objective, state
        self.rows: list[Evaluated] = []
        arrays = in_main_process(processes, lambda: read_arrays(file, {}))  # the search's folder has the record
        if arrays is not None:
            columns = [arrays.pop(name) for name in COLUMNS]
            self.state = {name: torch.from_numpy(array) for name, array in arrays.items()}
            self.rows = [Evaluated(way, objective, int(p), float(v), w) for p, v, w in zip(*columns, strict=True)]

    @property
    def stale(self) -> int:
        """How many candidates were scored since the best one, the first of the lowest value."""
        return len(self.rows) - 1 - int(np.argmin([row.value for row in self.rows]))

    def add(self, value: float, coefficients: np.ndarray) -> None:
        """Add a candidate that was scored after the passes in the state."""
        row = np.array(coefficients, dtype=np.float64)  # a copy
        self.rows.append(Evaluated(self.way, self.objective, int(self.state["spent"]), value, row))

    def save(self) -> None:
        """Write the state and the candidates."""
        columns = zip(*((row.passes, row.value, row.coefficients) for row in self.rows), strict=True)
        arrays = {name: tensor.numpy() for name, tensor in self.state.items()}
        arrays |= dict(zip(COLUMNS, map(np.array, columns), strict=True))
        in_main_process(self.processes, lambda: write_arrays(self.file, arrays, {}))


# --- closed form


def closed_form(squares: Squares, settings: Search, file: Path, way: str = "closed form") -> list[Evaluated]:
    """Least squares, as a network is nearly linear in the coefficients.

    Ridge regression solves the normal equations about the pretrained network, then about the solution (Gauss-Newton)
    while that is better. The ridge is relative to the mean curvature at the pretrained network.

    Returns the pretrained network and the solution of each step. The file is written after each batch.
    """
    candidates, processes = squares.candidates, squares.processes
    size = int(np.prod(candidates.shape))
    shapes = {"curvature": (size, size), "slope": (size,), "pull": ()}
    state = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    state["done"] = torch.zeros(2, dtype=torch.int64)  # steps, and batches of the next one
    progress = Progress(processes, file, way, squares.name, state | {"spent": torch.tensor(squares.spent)})
    state = progress.state
    if not progress.rows:
        progress.add(1.0, np.zeros(candidates.shape))
    while state["done"][0] <= settings.gauss_newton and progress.stale == 0:
        start = progress.rows[-1].coefficients
        candidates.form(squares.network, start)
        for number in range(int(state["done"][1]), len(squares.batches)):
            batch = squares.batches[number]
            added = [torch.zeros_like(state[name]) for name in EQUATIONS]
            if len(batch.weights) > 0:
                added = linearized(batch, candidates, squares.network)
            for name, part in zip(EQUATIONS, added, strict=True):
                state[name] += processes.reduce(part.to(processes.device), "sum").cpu()
            state["spent"] += JVP_PASSES * size * squares.sizes[number]
            state["done"][1] += 1
            progress.save()
        if state["done"][0] == 0:
            state["pull"] = settings.ridge * state["curvature"].diagonal().mean()
        curvature, slope, pull = (state[name].numpy() for name in (*EQUATIONS, "pull"))
        coefficients = ridge_step(curvature, slope, start.ravel(), float(pull), settings.interval).reshape(start.shape)
        state["spent"] += squares.images
        progress.add(squares.value(coefficients), coefficients)
        state |= {name: torch.zeros_like(state[name]) for name in EQUATIONS}
        state["done"] = torch.tensor([int(state["done"][0]) + 1, 0])
        progress.save()
    return progress.rows


@torch.no_grad()
def linearized(batch: Batch, candidates: Candidates, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch adds to the normal equations about the network's weights.

    With the residual r_i = y_i − ε(x_i) and the columns J_i of derivatives by the coefficients, it is Σ c_i J_iᵀ J_i
    and Σ c_i J_iᵀ r_i: float64, shapes (P, P) and (P,), P = groups · ranges in row-major order.
    """
    parameters = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    keywords = {**batch.condition, "return_dict": False}

    def predict(some: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(network, parameters | some, (batch.noisy, batch.timesteps), keywords)[0].float()

    columns = []
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # faster kernels have no forward derivatives
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):  # torch 2.11 has forward derivatives for contiguous inputs alone
                stack.enter_context(module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)))
        for group, number in np.ndindex(candidates.shape):
            tangent = candidates.task_vector(group, number)  # of these alone: what lies before them is constant
            moved = {name: parameters[name] for name in tangent}
            prediction, column = jvp(predict, (moved,), (tangent,))
            columns.append(column.flatten())
    scale = batch.weights.sqrt().repeat_interleave(prediction[0].numel())
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
    """Adam (Kingma and Ba 2015) on the coefficients, pulled to the start; the values on held-out images stop it early.

    One backward pass gives the gradient by the weights; times the task vectors it is the gradient by the coefficients.
    So candidates are formed in place, and no graph over merged copies of the weights is held.
    """
    processes, candidates, network = squares.processes, squares.candidates, squares.network
    origin = torch.from_numpy(np.array(start, dtype=np.float64))  # a copy: the array may be read-only
    state = {"step": torch.tensor(0), "spent": torch.tensor(spent + held_out.spent), "coefficients": origin.clone()}
    state |= {"mean": torch.zeros_like(origin), "square": torch.zeros_like(origin)}
    progress = Progress(processes, file, "gradient", f"{squares.name}, held-out images", state)
    state = progress.state

    def measure() -> None:
        state["spent"] += held_out.images
        coefficients = state["coefficients"].numpy()
        progress.add(held_out.value(coefficients), coefficients)
        progress.save()

    if not progress.rows:
        measure()
    network.requires_grad_(True)
    while (step := int(state["step"])) < settings.gradient_steps and progress.stale < settings.gradient_patience:
        number = step % len(squares.batches)
        batch, images = squares.batches[number], squares.sizes[number]
        candidates.form(network, state["coefficients"])
        gradient = torch.zeros(candidates.shape, dtype=torch.float64, device=processes.device)
        if len(batch.weights) > 0:
            network.zero_grad()
            squares.of_batch(batch).backward()
            gradient = candidates.gradient(network)
        gradient = processes.reduce(gradient, "sum").cpu() * squares.images / images
        gradient += 2 * settings.pull * (state["coefficients"] - origin) / origin.numel()
        _adam_step(state, gradient, settings)
        state["spent"] += GRADIENT_PASSES * images
        if (step + 1) % MEASURED_EVERY == 0 or step + 1 == settings.gradient_steps:
            measure()
    network.requires_grad_(False).zero_grad()
    return progress.rows


def _adam_step(state: dict[str, torch.Tensor], gradient: torch.Tensor, settings: Search) -> None:
    """Adam's update of the coefficients, then back into the bounds."""
    first, second, epsilon = 0.9, 0.999, 1e-8
    state["step"] += 1
    state["mean"] = first * state["mean"] + (1 - first) * gradient
    state["square"] = second * state["square"] + (1 - second) * gradient**2
    rate = settings.gradient_learning_rate / (1 - first ** int(state["step"]))
    scale = (state["square"] / (1 - second ** int(state["step"]))).sqrt() + epsilon
    state["coefficients"] = (state["coefficients"] - rate * state["mean"] / scale).clamp(*settings.interval)
