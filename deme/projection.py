"""The paper's channel-wise projection: a trainable bias-free 1×1 convolution after every block of a UNet.

Importing this module is all that `DDIMPipeline.from_pretrained` needs to load a projected UNet from a pipeline folder.
"""

import functools

import torch
from diffusers import (
    ModelMixin,  # noqa: F401  diffusers looks for its base class in the module that a model_index.json names
    UNet2DModel,
)
from torch import nn

from deme.pipelines import PROJECTION_SUFFIX


def add_projections(unet: nn.Module) -> None:
    """Put an identity projection on the output of every down, mid and up block of a diffusers UNet, in place.

    Skip connections are taken before it: a down block returns them beside its output and they stay as they are. The
    channel counts are those of the blocks' last residual layers. An identity projection changes no bit in float32
    (TF32 convolutions on CUDA round their input, as they do everywhere else in the network).
    """
    mid_blocks = [unet.mid_block] if unet.mid_block is not None else []
    for block in (*unet.down_blocks, *mid_blocks, *unet.up_blocks):
        channels = block.resnets[-1].out_channels
        block.projection = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        nn.init.dirac_(block.projection.weight)
        block.register_forward_hook(_project_output)


def _project_output(block: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    """Forward hook: the block's output (N, C, H, W) through its projection; what stands beside it is left alone."""
    if isinstance(output, tuple):
        return (block.projection(output[0]), *output[1:])
    return block.projection(output)


class ProjectedUNet2DModel(UNet2DModel):
    """`UNet2DModel` with a channel-wise projection after every block; saved and loaded like any diffusers model.

    Its configuration names this class, so that the projections are not lost on loading.
    """

    # diffusers reads a model's settings from the signature of __init__; wraps() gives this one UNet2DModel's
    @functools.wraps(UNet2DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        add_projections(self)

    @classmethod
    def from_unet(cls, unet: UNet2DModel) -> "ProjectedUNet2DModel":
        """A projected copy of `unet`, its projections identities."""
        projected = cls.from_config(unet.config)
        identities = {
            name: weight for name, weight in projected.state_dict().items() if name.endswith(PROJECTION_SUFFIX)
        }
        projected.load_state_dict({**identities, **unet.state_dict()})
        return projected
