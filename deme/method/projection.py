"""The paper's channel-wise projection: a trainable bias-free linear map of the channels after every block.

Of a UNet's block it is a 1×1 convolution, of a transformer's a linear layer on each token.
"""

from typing import Any

import torch
from torch import nn

from deme.method.task_vectors import BLOCK, Tensors, in_order

PROJECTION_SUFFIX = ".projection.weight"  # of the tensors' names


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a denoiser by name, in the order of the forward pass: down, mid, up, or those of a transformer."""
    blocks = {name: module for name, module in network.named_modules() if BLOCK.fullmatch(f"{name}.")}
    return {name: blocks[name] for name in in_order(blocks)}


def add_projections(network: nn.Module) -> None:
    """Add an identity projection to the output of every block of a diffusers denoiser, in place.

    What a block returns beside the images, skip connections or the tokens of a text, is left alone. An identity
    projection changes no bit in float32 (TF32 on CUDA rounds its input, as everywhere in the network).
    """
    for block in blocks_of(network).values():
        if hasattr(block, "resnets"):
            channels = block.resnets[-1].out_channels
            block.projection = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
            nn.init.dirac_(block.projection.weight)
        else:
            channels = network.config.num_attention_heads * network.config.attention_head_dim
            block.projection = nn.Linear(channels, channels, bias=False)
            nn.init.eye_(block.projection.weight)
        block.register_forward_hook(_project_output)


def place_of_images(block: nn.Module, output: torch.Tensor | tuple) -> int | None:
    """Where in a block's output the images are; None if they are all of it.

    Those of UNets return them before skip connections, blocks with two streams after the text.
    """
    return None if isinstance(output, torch.Tensor) else int(not hasattr(block, "resnets"))


def _project_output(block: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> Any:
    """Forward hook: project the images (N, C, H, W), or tokens (N, tokens, C), in the block's output."""
    place = place_of_images(block, output)
    if place is None:
        return block.projection(output)
    return (*output[:place], block.projection(output[place]), *output[place + 1 :])


def with_identity_projections(pretrained: Tensors, finetuned: Tensors) -> dict[str, torch.Tensor]:
    """The state dict `pretrained` with an identity, (C, C, 1, 1) or (C, C), for those only `finetuned` has."""
    missing = {n: p for n, p in finetuned.items() if n.endswith(PROJECTION_SUFFIX) and n not in pretrained}
    return {**pretrained, **{name: torch.eye(len(p)).reshape(p.shape) for name, p in missing.items()}}
