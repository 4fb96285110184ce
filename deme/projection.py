"""Importing this module is all that `DDIMPipeline.from_pretrained` needs to load a network with projections.

Merged folders' model_index.json name it, and diffusers looks for its own base class beside the one that is named: all
names must stay here.
"""

from diffusers import ModelMixin

from deme.models.denoisers import DENOISER_CLASSES
from deme.models.kinds import PROJECTED

PROJECTED_CLASSES = {name: kind for name, kind in DENOISER_CLASSES.items() if name.startswith(PROJECTED)}
globals().update(PROJECTED_CLASSES)

__all__ = ["ModelMixin", *PROJECTED_CLASSES]
