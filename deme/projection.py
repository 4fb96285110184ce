"""Importing this module is all that `DDIMPipeline.from_pretrained` needs to load a network with projections.

Merged folders' model_index.json name it, and diffusers looks for its own base class beside the one that is named: all
names must stay here.
"""

from diffusers import ModelMixin

from deme.models.denoisers import DENOISER_CLASSES

ProjectedUNet2DModel = DENOISER_CLASSES["ProjectedUNet2DModel"]
ProjectedUNet2DConditionModel = DENOISER_CLASSES["ProjectedUNet2DConditionModel"]
ProjectedDiTTransformer2DModel = DENOISER_CLASSES["ProjectedDiTTransformer2DModel"]
ProjectedSD3Transformer2DModel = DENOISER_CLASSES["ProjectedSD3Transformer2DModel"]
ProjectedSanaTransformer2DModel = DENOISER_CLASSES["ProjectedSanaTransformer2DModel"]
ProjectedWanTransformer3DModel = DENOISER_CLASSES["ProjectedWanTransformer3DModel"]

__all__ = ["ModelMixin", *(name for name in DENOISER_CLASSES if name.startswith("Projected"))]
