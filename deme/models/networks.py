"""Networks and noise schedules of a pipeline folder, loaded and tried out."""

import functools
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from deme.errors import UserError, one_line
from deme.method.losses import prediction_target
from deme.method.projection import PROJECTION_SUFFIX, add_projections
from deme.models.encoders import MODES
from deme.models.pipelines import (
    PROJECTED_CLASS,
    SCHEDULER_CONFIG,
    WEIGHTS,
    is_projected,
    scheduler_folder,
    weights_file,
)


class ProjectedUNet2DModel(UNet2DModel):
    """`UNet2DModel` with a channel-wise projection behind every block; saved and loaded like any diffusers model.

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


ProjectedUNet2DModel.__module__ = "deme.projection"  # what diffusers writes into a pipeline's model_index.json


def load_unet(folder: Path) -> UNet2DModel:
    """The UNet in a folder, float32, in eval mode; with projections where its configuration says so.

    Raises:
        UserError: missing or damaged files, projections that the configuration does not name, NaN or infinite weights.
    """
    weights = weights_file(folder)
    unet_class = ProjectedUNet2DModel if is_projected(folder) else UNet2DModel
    try:
        unet, report = unet_class.from_pretrained(
            folder, use_safetensors=weights.name == WEIGHTS, output_loading_info=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers and torch raise whatever a wrong value or a damaged file leads to
        raise UserError(f"{folder}: {one_line(error)}") from None
    unknown = report["unexpected_keys"]
    if any(name.endswith(PROJECTION_SUFFIX) for name in unknown):
        raise UserError(f"{folder}: holds projections, but its config.json does not name {PROJECTED_CLASS}")
    if report["missing_keys"] or unknown:
        names = ", ".join([*report["missing_keys"], *unknown][:3])
        raise UserError(f"{folder}: weights and config.json do not fit each other ({names} …)")
    for name, tensor in unet.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{weights}: tensor {name} holds NaN or infinite values")
    return unet


def load_scheduler(pipeline: Path) -> DDPMScheduler:
    """The pretrained noise schedule: betas, clipping, prediction and variance type as the pipeline folder says.

    Raises:
        UserError: values that diffusers can't use.
    """
    folder = scheduler_folder(pipeline)
    try:
        return DDPMScheduler.from_pretrained(folder)
    except Exception as error:  # diffusers raises whatever a wrong value leads to
        raise UserError(f"{folder / SCHEDULER_CONFIG}: {one_line(error)}") from None


def try_out(unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
    """Predict once and take one step, so that what does not work together shows before anything is written.

    Raises:
        UserError: it does not; says why.
    """
    channels = unet.config.in_channels
    size = unet.config.sample_size
    if channels not in MODES:
        raise UserError(f"in_channels={channels}: images have {' or '.join(map(str, MODES))} channels")
    try:
        images = torch.zeros(1, channels, size, size)
        last = torch.tensor([scheduler.config.num_train_timesteps - 1])
        with torch.no_grad():
            prediction = unet(images, last).sample
        target = prediction_target(scheduler, images, images, last)
        if prediction.shape != target.shape:
            raise UserError(f"the network maps {tuple(target.shape)} to {tuple(prediction.shape)}")
        scheduler.step(prediction, int(last), images)
    except Exception as error:  # torch and diffusers raise whatever does not fit
        raise UserError(one_line(error)) from None
