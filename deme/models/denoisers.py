"""Denoisers and noise schedules of a pipeline folder, loaded and tried out."""

import functools
from pathlib import Path

import torch
from diffusers import DDPMScheduler, ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import nn

from deme.config.paths import DENOISER
from deme.errors import UserError, blaming, one_line
from deme.method.losses import prediction_target
from deme.method.projection import PROJECTION_SUFFIX, add_projections
from deme.method.sampling import SCHEDULE
from deme.method.task_vectors import FLOATS
from deme.models.encoders import Encoder
from deme.models.kinds import PROJECTED, check_settings, denoiser_class, read_index, read_part, schedule_file
from deme.models.pipelines import default_settings, takes_text
from deme.models.weights import load_tensors, weights_files


def projected_class(unet_class: type[ModelMixin]) -> type[ModelMixin]:
    """A UNet class with a channel-wise projection after every block; saved and loaded like any diffusers model."""

    # diffusers reads a model's settings from the signature of __init__; wraps() gives it the UNet's
    @functools.wraps(unet_class.__init__)
    def __init__(self: ModelMixin, *args: object, **kwargs: object) -> None:
        unet_class.__init__(self, *args, **kwargs)
        add_projections(self)

    # diffusers writes the module into a pipeline's model_index.json
    members = {"__init__": __init__, "__module__": "deme.projection", "__doc__": f"{unet_class.__name__}, projected."}
    return type(f"{PROJECTED}{unet_class.__name__}", (unet_class,), members)


ProjectedUNet2DModel, ProjectedUNet2DConditionModel = map(projected_class, (UNet2DModel, UNet2DConditionModel))
DENOISERS = (UNet2DModel, UNet2DConditionModel, ProjectedUNet2DModel, ProjectedUNet2DConditionModel)
DENOISER_CLASSES = {kind.__name__: kind for kind in DENOISERS}
LATENT_SCHEDULE = {"clip_sample": False, "steps_offset": 1}  # as StableDiffusionPipeline enforces


def with_projections(unet: nn.Module) -> nn.Module:
    """A projected copy of a UNet, its projections identities."""
    name = f"{PROJECTED}{type(unet).__name__.removeprefix(PROJECTED)}"
    projected = DENOISER_CLASSES[name].from_config(dict(unet.config) | {"_class_name": name})
    identities = {key: weight for key, weight in projected.state_dict().items() if key.endswith(PROJECTION_SUFFIX)}
    projected.load_state_dict({**identities, **unet.state_dict()})
    return projected.train(unet.training)


def load_denoiser(folder: Path) -> nn.Module:
    """The denoiser in a folder: float32, in eval mode, with projections if its config.json says so."""
    settings = read_part(DENOISER, folder / "config.json")
    name = settings.get("_class_name", denoiser_class(settings))
    file, tensors = weights_files(folder)[0], load_tensors(folder)
    if not name.startswith(PROJECTED) and any(key.endswith(PROJECTION_SUFFIX) for key in tensors):
        raise UserError(f"{folder}: holds projections, but its config.json does not name {PROJECTED}{name}")
    with blaming(folder):
        denoiser = DENOISER_CLASSES[name].from_config(settings)
    parameters = denoiser.state_dict()
    given, expected = ({(key, tensor.shape) for key, tensor in all_.items()} for all_ in (tensors, parameters))
    if odd := sorted({key for key, _ in given ^ expected}):
        raise UserError(f"{folder}: weights and config.json do not fit each other ({', '.join(odd[:3])} …)")
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS and parameters[key].is_floating_point():  # such as float8, which can't be merged
            raise UserError(f"{file}: tensor {key} is of type {tensor.dtype}")
        if not parameters[key].copy_(tensor).isfinite().all():
            raise UserError(f"{file}: tensor {key} holds NaN or infinite values")
    return denoiser.eval()


def load_scheduler(pipeline: Path) -> DDPMScheduler:
    """The pretrained noise schedule as a DDPMScheduler, with the defaults of the class that its file names."""
    file = schedule_file(pipeline)
    named = read_index(pipeline).get("scheduler")
    settings = read_part("scheduler", file, named)
    own = default_settings(settings.get("_class_name", named))
    defaults = {key: own[key] for key in SCHEDULE if key in own}
    with blaming(file):
        return DDPMScheduler.from_config(defaults | settings | (LATENT_SCHEDULE if takes_text(pipeline) else {}))


def try_out(denoiser: nn.Module, scheduler: DDPMScheduler, encoder: Encoder) -> None:
    """Predict once and take one step, so that parts that do not fit are found before anything is written."""
    channels, size = denoiser.config.in_channels, denoiser.config.sample_size
    check_settings(DENOISER, denoiser.config)  # it may have been made from settings, and not loaded
    check_settings("scheduler", scheduler.config)
    if channels != encoder.channels:
        raise UserError(f"in_channels={channels}: the encoder gives {encoder.channels}")
    condition = encoder.condition([""])  # load_encoder has tried it
    try:
        images = torch.zeros(1, channels, size, size)
        last = torch.tensor([scheduler.config.num_train_timesteps - 1])
        with torch.no_grad():
            prediction = denoiser(images, last, **condition).sample
        target = prediction_target(scheduler, images, images, last)
        if prediction.shape != target.shape:
            raise UserError(f"the network maps {tuple(target.shape)} to {tuple(prediction.shape)}")
        scheduler.step(prediction, int(last), images)
    except Exception as error:  # torch and diffusers raise anything
        raise UserError(one_line(error)) from None
