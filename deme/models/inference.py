"""Frozen networks made ready to predict: what a forward pass would do to the weights each time is done once.

The predictions are those of the network as it was loaded, up to float error.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from deme.job.machine import can_pack

LEAST_PACKED_WIDTH = 128  # channels of a network's widest convolution, below which packing gains nothing
AUTOCAST_TYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def memory_format(device: torch.device | str) -> torch.memory_format:
    """How networks and images lie on a device: channels last on a GPU.

    On a CPU oneDNN reorders both anyway; channels_last costs narrow networks a fifth of their time in group
    normalizations, and in training wide ones copies of their weights.
    """
    return torch.contiguous_format if torch.device(device).type == "cpu" else torch.channels_last


def freeze(network: nn.Module, device: torch.device | str, mixed_precision: str, may_pack: bool = True) -> nn.Module:
    """Prepare a network for predicting on a device, in place.

    The network takes float32 inputs and needs no autocast around it.

    Args:
        mixed_precision: no, fp16 or bf16. On a GPU the whole network has this type. On a CPU its convolutions and
            linear layers have it, and the network runs under autocast.
        may_pack: False where its weights will be written to later.
    """
    on_cpu = torch.device(device).type == "cpu"
    network = network.eval().requires_grad_(False).to(device, memory_format=memory_format(device))
    dtype = AUTOCAST_TYPES[mixed_precision]
    if dtype is not None:
        compute_in(dtype, network, whole=not on_cpu)
    if may_pack and on_cpu and can_pack(dtype is not None) and _width(network) >= LEAST_PACKED_WIDTH:
        for module in list(network.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Conv2d:
                    setattr(module, name, PackedConv2d(child))
    return network


def compute_in(dtype: torch.dtype, network: nn.Module, whole: bool) -> None:
    """Make a network compute in fp16 or bf16, in place.

    Args:
        whole: all of it, and images and conditions are cast to this type. Timesteps are not: bf16 has no 999. Otherwise
            its convolutions and linear layers, under autocast, which runs normalizations in float32.
    """
    for module in [network] if whole else network.modules():
        if whole or isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.Module.to(module, dtype)  # diffusers' own warns
    network.forward = partial(_predict, network.forward, dtype, whole)


def _predict(
    forward: Callable, dtype: torch.dtype, whole: bool, images: torch.Tensor, timesteps: torch.Tensor, **named: Any
) -> Any:
    def cast(value: Any) -> Any:
        is_cast = whole and isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if is_cast else value

    with torch.autocast(images.device.type, dtype, enabled=not whole):
        return forward(cast(images), timesteps, **{name: cast(value) for name, value in named.items()})


def _width(network: nn.Module) -> int:
    return max((module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)), default=0)


class PackedConv2d(nn.Module):
    """A convolution on a CPU whose weight is kept in oneDNN's own layout, instead of being reordered at every call.

    With the 114 M parameters of LSUN-Church's network on small images that is a fifth of the time.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution: nn.Conv2d | None = convolution  # until the first input, whose size the layout depends on
        self.dtype = convolution.weight.dtype
        self.geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        self.bias = convolution.bias
        self.packed: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → (N, C', H', W') in the weight's type."""
        if self.packed is None:
            weight = self.convolution.weight
            self.convolution = None
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(images.shape))
        images = images.to(self.dtype)
        return torch.ops.mkldnn._convolution_pointwise(images, self.packed, self.bias, *self.geometry, "none", [], "")
