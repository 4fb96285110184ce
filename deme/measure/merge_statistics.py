"""What some merge methods need of each network: squared gradients, and products of its layers' inputs."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from deme.job.processes import Processes
from deme.measure.noisy import Batch

LARGEST = 2304  # inputs of a layer whose products are measured: 3×3 patches of 256 channels; float32: 21 MB

Statistics = dict[str, torch.Tensor]  # by name of the weight


def measure_statistics(
    network: nn.Module, images: Sequence[Batch], count: int, processes: Processes
) -> tuple[Statistics, Statistics]:
    """The statistics of a network, in one pass over each process's share of `count` noisy images, one image at a time.

    Returns:
        The mean square of the gradient of an image's denoising loss, of each parameter's shape: the diagonal of the
        empirical Fisher information.
        The mean of x xᵀ over a layer's inputs x, shape (D, D), of linear layers and of convolutions, whose inputs are
        patches (D = channels · height · width), if D is at most LARGEST.
    """
    parameters = dict(network.requires_grad_(True).named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    products: Statistics = {}
    rows: dict[str, torch.Tensor] = {}
    layers = {f"{name}.weight": layer for name, layer in network.named_modules() if inputs_of(layer) <= LARGEST}
    for name, layer in layers.items():
        size, device = inputs_of(layer), layer.weight.device
        products[name], rows[name] = torch.zeros(size, size, device=device), torch.zeros((), device=device)
    hooks = [layer.register_forward_pre_hook(adding_products(products[n], rows[n])) for n, layer in layers.items()]
    for batch in images:
        for place in range(len(batch.noisy)):
            network.zero_grad()
            batch.part(slice(place, place + 1)).losses(network).sum().backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    squares[name].addcmul_(parameter.grad, parameter.grad)
    for hook in hooks:
        hook.remove()
    squares = {name: processes.reduce(total, "sum") / count for name, total in squares.items()}
    totals = {name: processes.reduce(total, "sum") for name, total in rows.items()}
    seen = {name: processes.reduce(total, "sum") / totals[name].clamp(min=1) for name, total in products.items()}
    return squares, seen


def inputs_of(layer: nn.Module) -> float:
    """The number of inputs of one output of a linear layer or a convolution; infinite for all else."""
    is_matrix = type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)
    return layer.weight[0].numel() if is_matrix else float("inf")


def adding_products(total: torch.Tensor, rows: torch.Tensor) -> Callable:
    """A forward pre-hook that adds x xᵀ of all inputs x of a layer, and their number."""

    @torch.no_grad()
    def add(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros":
                x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = layer.padding if layer.padding_mode == "zeros" else 0
            x = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)
        x = x.reshape(-1, x.shape[-1])
        total.addmm_(x.T, x)
        rows.add_(len(x))

    return add
