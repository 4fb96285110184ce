"""Importing this module is all that `DDIMPipeline.from_pretrained` needs to load a UNet with projections.

Merged folders' model_index.json name it, and diffusers looks for its own base class beside the one that is named: all
names must stay here.
"""

from diffusers import ModelMixin

from deme.models.denoisers import ProjectedUNet2DConditionModel, ProjectedUNet2DModel

__all__ = ["ModelMixin", "ProjectedUNet2DConditionModel", "ProjectedUNet2DModel"]
