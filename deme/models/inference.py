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

    On a GPU all of it has the type `mixed_precision` (no, fp16 or bf16), on a CPU its convolutions and linear layers.
    Weights that will be written to later must not be packed.
    """
    on_cpu = torch.device(device).type == "cpu"
    network = network.eval().requires_grad_(False).to(device, memory_format=memory_format(device))
    dtype = AUTOCAST_TYPES[mixed_precision]
    if dtype is not None:
        compute_in(dtype, network, whole=not on_cpu)
    convolutions = {name: module for name, module in network.named_modules() if type(module) is nn.Conv2d}
    width = max((module.out_channels for module in convolutions.values()), default=0)
    if may_pack and on_cpu and can_pack(dtype is not None) and width >= LEAST_PACKED_WIDTH:
        for name, module in convolutions.items():
            network.set_submodule(name, PackedConv2d(module))
    return network


def compute_in(dtype: torch.dtype, network: nn.Module, whole: bool) -> None:
    """Make a network compute in fp16 or bf16, in place, with all of its weights or those of the heavy layers.

    The `whole` network takes images and conditions of the type, but not timesteps: bf16 has no 999. Else only
    convolutions and linear layers have the type, and it runs under autocast, with normalizations in float32.
    """
    for module in network.modules():
        if whole or isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.Module.to(module, dtype)  # diffusers' own warns
    network.forward = partial(_predict, network.forward, dtype, whole)


def _predict(
    forward: Callable, dtype: torch.dtype, whole: bool, images: torch.Tensor, timesteps: torch.Tensor, **named: Any
) -> Any:
    if whole:
        images = images.to(dtype)
        named = {name: value.to(dtype) if name == "encoder_hidden_states" else value for name, value in named.items()}
    with torch.autocast(images.device.type, dtype, enabled=not whole):
        return forward(images, timesteps, **named)


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
