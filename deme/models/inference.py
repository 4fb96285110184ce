"""Frozen networks made ready to predict: the weights are converted once, not in every forward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from deme.job.machine import can_pack

LEAST_PACKED_WIDTH = 128  # channels of a network's widest convolution; below, packing gains nothing
AUTOCAST_TYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def memory_format(device: torch.device | str) -> torch.memory_format:
    """The memory format of networks and images: channels last on a GPU; on a CPU it would slow group normalization."""
    return torch.contiguous_format if torch.device(device).type == "cpu" else torch.channels_last


def freeze(network: nn.Module, device: torch.device | str, mixed_precision: str, may_pack: bool = True) -> nn.Module:
    """Prepare a network for predicting float32 inputs on a device, in place; it needs no autocast around it.

    Args:
        mixed_precision: no, fp16 or bf16: on a GPU the type of the whole network, on a CPU that of its convolutions and
            linear layers, under autocast.
        may_pack: False if its weights will be written to later.
    """
    on_cpu = torch.device(device).type == "cpu"
    network = network.eval().requires_grad_(False).to(device, memory_format=memory_format(device))
    dtype = AUTOCAST_TYPES[mixed_precision]
    if dtype is not None:
        compute_in(dtype, network, whole=not on_cpu)
    width = max((module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)), default=0)
    if may_pack and on_cpu and can_pack(dtype is not None) and width >= LEAST_PACKED_WIDTH:
        for module in list(network.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Conv2d:
                    setattr(module, name, PackedConv2d(child))
    return network


def compute_in(dtype: torch.dtype, network: nn.Module, whole: bool) -> None:
    """Make a network compute in fp16 or bf16, in place.

    Args:
        whole: images and conditions are cast, too, but not timesteps: bf16 has no 999. Otherwise only convolutions and
            linear layers have the type, and the network runs under autocast, with normalizations in float32.
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


class PackedConv2d(nn.Module):
    """A convolution on a CPU whose weight is kept in oneDNN's layout instead of being reordered at every call.

    LSUN-Church's network of 114 M parameters saves a fifth of its time on small images.
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
