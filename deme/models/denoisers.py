"""Denoisers and noise schedules of a pipeline folder: loaded, given projections, frozen for inference."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from deme.config.paths import TRANSFORMER, UNET
from deme.errors import UserError, blaming, shown
from deme.job.processes import can_pack
from deme.method.projection import PROJECTION_SUFFIX, add_projections
from deme.method.sampling import SCHEDULE
from deme.method.task_vectors import FLOATS
from deme.models import kinds, pipelines
from deme.models.kinds import PROJECTED
from deme.models.schedules import FLOW, FLOW_SCHEDULERS, prediction_type
from deme.models.variants import default_settings
from deme.models.weights import load_tensors, weights_files

# a flow schedule is made of the settings of any sampler, of which diffusers names those that it passes over each time
logging.getLogger("diffusers.configuration_utils").addFilter(
    lambda record: "DiscreteScheduler, but are not expected" not in record.getMessage()
)
CONVOLUTIONS_AND_LINEAR = (nn.Conv2d, nn.Conv3d, nn.Linear)
LEAST_PACKED_WIDTH = 128  # channels of a network's widest convolution; below, packing gains nothing
AUTOCAST_TYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def projected_class(plain: type[ModelMixin]) -> type[ModelMixin]:
    """A class with a channel-wise projection after every block; saved and loaded like any diffusers model."""

    # diffusers reads a model's settings from the signature of __init__; wraps() gives it the plain class's
    @functools.wraps(plain.__init__)
    def __init__(self: ModelMixin, *args: object, **kwargs: object) -> None:
        plain.__init__(self, *args, **kwargs)
        add_projections(self)

    members = {"__init__": __init__, "__module__": "deme.projection"}  # diffusers writes it into model_index.json
    return type(f"{PROJECTED}{plain.__name__}", (plain,), members)


PLAIN = {name: getattr(diffusers, name) for name in kinds.DENOISERS}
DENOISER_CLASSES = PLAIN | {f"{PROJECTED}{name}": projected_class(kind) for name, kind in PLAIN.items()}
ADDED = ("text_embeds", "time_ids")  # arguments of Stable Diffusion XL's network, which it takes in a dictionary
OF_TEXT = ("encoder_hidden_states", "pooled_projections")  # arguments in the type of the weights


def with_projections(denoiser: nn.Module) -> nn.Module:
    """A projected copy of a denoiser, its projections identities."""
    name = f"{PROJECTED}{type(denoiser).__name__.removeprefix(PROJECTED)}"
    projected = make_denoiser(settings_of(denoiser) | {"_class_name": name})
    projected.load_state_dict(denoiser.state_dict(), strict=False)
    return projected.train(denoiser.training)


def make_denoiser(settings: dict[str, Any]) -> nn.Module:
    """A denoiser with random weights."""
    name = settings["_class_name"]
    return _adapted(DENOISER_CLASSES[kinds.RENAMED.get(name, name)].from_config(settings))


def new_transformer(**settings: Any) -> nn.Module:
    """A DiT to be trained from nothing, whose blocks are identities at first (Peebles and Xie 2023, adaLN-Zero)."""
    network = _adapted(diffusers.DiTTransformer2DModel(**settings))
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or "norm1.linear" in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
        elif "embedder" in name:  # of labels and timesteps
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.data.flatten(1))
    return network


def _adapted(denoiser: nn.Module) -> nn.Module:
    """Make a denoiser one that is called as network(images, timesteps, **condition), in place.

    The condition are named arguments. Of a learned variance, which follows the prediction, nothing is returned: no loss
    here trains it. Labels are not dropped by the network, which would do so in each block for itself.
    """
    settings = settings_of(denoiser)
    if kinds.is_xl(settings):
        denoiser.register_forward_pre_hook(_gather_added, with_kwargs=True)
    if kinds.subfolder_of(settings) == TRANSFORMER:
        denoiser.register_forward_pre_hook(_name_timesteps, with_kwargs=True)
    if kinds.denoiser_class(settings) == kinds.WAN:
        denoiser.register_forward_pre_hook(lambda _, args: (args[0][:, :, None],))
        denoiser.register_forward_hook(_on_images(lambda images: images[:, :, 0]))  # videos of one frame
    channels = denoiser.config.in_channels
    if denoiser.config.out_channels == 2 * channels:
        denoiser.register_forward_hook(_on_images(lambda images: images[:, :channels]))
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return denoiser


def settings_of(denoiser: nn.Module) -> dict[str, Any]:
    """A denoiser's settings, as its config.json has them."""
    return {**denoiser.config, "_class_name": type(denoiser).__name__}


def _name_timesteps(_: nn.Module, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Transformers want a timestep for each image, and have other arguments before it."""
    images, timesteps = args
    return (images,), named | {"timestep": timesteps.expand(len(images))}


def _on_images(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """A forward hook that changes the images in a network's output."""

    def hook(_network: nn.Module, _inputs: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        output.sample = change(output.sample)
        return output

    return hook


def _gather_added(_: nn.Module, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    added = {key: named[key] for key in ADDED if key in named}
    rest = {key: value for key, value in named.items() if key not in added}
    return args, rest | ({"added_cond_kwargs": added} if added else {})


def load_denoiser(folder: Path) -> nn.Module:
    """The denoiser in a folder: float32, in eval mode, with projections if its config.json says so."""
    settings = kinds.read_part(UNET, folder / "config.json")
    name = settings["_class_name"]
    file, tensors = weights_files(folder)[0], load_tensors(folder)
    if not name.startswith(PROJECTED) and any(key.endswith(PROJECTION_SUFFIX) for key in tensors):
        raise UserError(f"{folder}: holds projections, but its config.json does not name {PROJECTED}{name}")
    with blaming(folder):
        denoiser = make_denoiser(settings)
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


def load_scheduler(pipeline: Path) -> SchedulerMixin:
    """The pretrained noise schedule with the defaults of the class that its file names.

    It is a DDPMScheduler, or for flow matching a FlowMatchEulerDiscreteScheduler, whichever samplers it was saved with.
    """
    file = pipelines.schedule_file(pipeline)
    settings = pipelines.read_schedule(pipeline)
    defaults = default_settings(settings["_class_name"])
    for key, default in defaults.items():
        if isinstance(settings.get(key), str) and isinstance(default, (int, float)):
            raise UserError(f"{file}: {key}={settings[key]!r}: is a text, and must be as {shown(default)}")
    settings = {key: defaults[key] for key in SCHEDULE if key in defaults} | settings
    if prediction_type(settings) == FLOW:
        if "flow_shift" in settings and settings["_class_name"] not in FLOW_SCHEDULERS:  # where another class left it
            settings["shift"] = settings["flow_shift"]
        with blaming(file):
            return FlowMatchEulerDiscreteScheduler.from_config(settings)
    if str(settings.get("variance_type")).startswith("learned"):  # networks here return none
        settings["variance_type"] = "fixed_small"
    with blaming(file):
        return DDPMScheduler.from_config(settings | pipelines.latent_sampling(pipeline))


def memory_format(device: torch.device | str) -> torch.memory_format:
    """The memory format of networks and images: channels last on a GPU; on a CPU it would slow group normalization."""
    return torch.contiguous_format if torch.device(device).type == "cpu" else torch.channels_last


def freeze(
    network: nn.Module,
    device: torch.device | str,
    mixed_precision: str,
    may_pack: bool = True,
    shares_weights: bool = False,
) -> nn.Module:
    """Prepare a network for predicting float32 inputs on a device, in place; it needs no autocast around it.

    On a GPU all of it has the type `mixed_precision` (no, fp16 or bf16), on a CPU its convolutions and linear layers.
    Weights that will be written to later must not be packed. Those that a trained network shares are not cast either.
    """
    on_cpu = torch.device(device).type == "cpu"
    network = network.eval().requires_grad_(False).to(device, memory_format=memory_format(device))
    dtype = AUTOCAST_TYPES[mixed_precision]
    if dtype is not None:
        if shares_weights:
            network.forward = functools.partial(_predict, network.forward, dtype, False)
        else:
            compute_in(dtype, network, whole=not on_cpu)
    convolutions = {name: module for name, module in network.named_modules() if type(module) is nn.Conv2d}
    width = max((module.out_channels for module in convolutions.values()), default=0)
    may_pack &= not shares_weights and not any(hasattr(module, "peft_config") for module in network.modules())
    if may_pack and on_cpu and can_pack(dtype is not None) and width >= LEAST_PACKED_WIDTH:
        for name, module in convolutions.items():
            network.set_submodule(name, PackedConv2d(module))
    return network


def compute_in(dtype: torch.dtype, network: nn.Module, whole: bool) -> None:
    """Make a network compute in fp16 or bf16, in place: the whole of it, or its convolutions and linear layers.

    The latter runs under autocast, with normalizations in float32. Timesteps are not cast: bf16 has no 999. Neither is
    what the network's class keeps in float32.
    """
    kept = {*(getattr(network, "_keep_in_fp32_modules", None) or ())}
    for name, module in network.named_modules():
        own = module._parameters | module._buffers if whole or isinstance(module, CONVOLUTIONS_AND_LINEAR) else {}
        for key, tensor in own.items():
            if tensor is not None and tensor.is_floating_point() and kept.isdisjoint((*name.split("."), key)):
                tensor.data = tensor.data.to(dtype)
    network.forward = functools.partial(_predict, network.forward, dtype, whole)


def _predict(
    forward: Callable, dtype: torch.dtype, whole: bool, images: torch.Tensor, *timesteps: torch.Tensor, **named: Any
) -> Any:
    if whole:
        images = images.to(dtype)
        named = {name: value.to(dtype) if name in OF_TEXT else value for name, value in named.items()}
    with torch.autocast(images.device.type, dtype, enabled=not whole):
        return forward(images, *timesteps, **named)


class PackedConv2d(nn.Module):
    """A convolution on a CPU whose weight is kept in oneDNN's layout instead of being reordered at every call.

    LSUN-Church's network of 114 M parameters saves a fifth of its time on small images.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution
        self.packed: torch.Tensor | None = None  # until the first input, whose size the layout depends on

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → (N, C', H', W') in the weight's type."""
        own = self.convolution
        geometry = (own.padding, own.stride, own.dilation, own.groups)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(own.weight, *geometry, list(images.shape))
            own.weight = None
        images = images.to(self.packed.dtype)
        return torch.ops.mkldnn._convolution_pointwise(images, self.packed, own.bias, *geometry, "none", [], "")
