"""The paper's channel-wise projection: a trainable bias-free 1×1 convolution after every block of a UNet."""

import torch
from torch import nn

from deme.method.task_vectors import Tensors

PROJECTION_SUFFIX = ".projection.weight"  # of the tensors' names


def add_projections(unet: nn.Module) -> None:
    """Add an identity projection to the output of every down, mid and up block of a diffusers UNet, in place.

    The skip connections that a down block also returns are left alone. An identity projection changes no bit in float32
    (TF32 convolutions on CUDA round their input, as everywhere in the network).
    """
    mid_blocks = [unet.mid_block] if unet.mid_block is not None else []
    for block in (*unet.down_blocks, *mid_blocks, *unet.up_blocks):
        channels = block.resnets[-1].out_channels
        block.projection = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        nn.init.dirac_(block.projection.weight)
        block.register_forward_hook(_project_output)


def _project_output(block: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    """Forward hook: project the block's output (N, C, H, W), the first of a tuple."""
    if isinstance(output, tuple):
        return (block.projection(output[0]), *output[1:])
    return block.projection(output)


def with_identity_projections(pretrained: Tensors, finetuned: Tensors) -> dict[str, torch.Tensor]:
    """The state dict `pretrained` with an identity (C, C, 1, 1) for each projection that only `finetuned` has."""
    missing = [name for name in finetuned if name.endswith(PROJECTION_SUFFIX) and name not in pretrained]
    return {**pretrained, **{name: torch.eye(len(finetuned[name]))[:, :, None, None] for name in missing}}
