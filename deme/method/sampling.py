"""Sampling, one seed per image: DDIM (Song et al. 2021, eq. 12), Euler for flow matching, or others of diffusers."""

import functools
import inspect
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import nn

from deme.errors import RunError, UserError, blaming, shown
from deme.method.task_vectors import Tensors

NetworkAt = Callable[[float], Callable]  # timestep → the denoiser that is used there, or what calls it
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
NEEDED = ("rescale_betas_zero_snr", "thresholding")  # a sampler must have them if the pretrained schedule sets them
SHORT_NAMES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
FLOW_NAMES = {  # the samplers of networks that were trained by flow matching
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}
OF_EULER = (  # settings of a flow schedule that only Euler follows
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal", "stochastic_sampling"),
)


def sampler_name(name: str) -> str:
    """A sampler's short name, if it has one."""
    short_names = {kind: short for names in (SHORT_NAMES, FLOW_NAMES) for short, kind in names.items()}
    return short_names.get(name, name)


def make_sampler(
    pretrained: SchedulerMixin, name: str, timestep_spacing: str | None = None, clip: bool = False
) -> SchedulerMixin:
    """A sampler of diffusers, by its class or short name, with the pretrained betas, clipping and prediction type.

    Without a timestep_spacing (leading, trailing or linspace) it is the pretrained one. If that names none, DDIM has
    "leading" (3 steps of 1000 visit t = 666, 333, 0), others their own. A flow schedule has samplers of its own, with
    the pretrained shift. With `clip` the predicted clean image is clipped to [−1, 1], whatever the schedule says.
    """
    if isinstance(pretrained, diffusers.FlowMatchEulerDiscreteScheduler):
        return _make_flow_sampler(pretrained, name, timestep_spacing, clip)
    fitting = {kind.__name__: kind for kind in pretrained.compatibles if "beta_schedule" in _parameters(kind.__init__)}
    class_name = SHORT_NAMES.get(name, name)
    if class_name not in fitting:
        raise UserError(f"must be one of {', '.join([*SHORT_NAMES, *sorted(fitting)])}")
    kind = fitting[class_name]
    taken = _parameters(kind.__init__)
    # from_config leaves out the pretrained class's defaults, which may not be this one's
    schedule = {key: pretrained.config[key] for key in SCHEDULE if key in taken}
    of_ddim = pretrained.config.timestep_spacing if class_name == SHORT_NAMES["ddim"] else None
    if spacing := timestep_spacing or of_ddim:
        schedule["timestep_spacing"] = spacing
    needed = {*schedule, *(key for key in NEEDED if pretrained.config[key])}
    if lacking := needed - taken:
        raise UserError(f"{kind.__name__} has no {', '.join(sorted(lacking))}")
    clipping = _clipping(kind) if clip else {}
    with blaming():
        return kind.from_config(pretrained.config, **schedule, **clipping)


def _clipping(kind: type[SchedulerMixin]) -> dict[str, Any]:
    """The settings with which a sampler clips its prediction of the clean image to [−1, 1]."""
    taken = _parameters(kind.__init__)
    if "clip_sample" in taken:
        clipping = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
        return {key: value for key, value in clipping.items() if key in taken}
    if "thresholding" in taken:  # dynamic (Saharia et al. 2022); with 1 as the greatest value it is static
        return {"thresholding": True, "sample_max_value": 1.0}
    raise UserError(f"{kind.__name__} can't clip: set sample.clip=false")


def _make_flow_sampler(
    pretrained: SchedulerMixin, name: str, timestep_spacing: str | None, clip: bool
) -> SchedulerMixin:
    class_name = FLOW_NAMES.get(name, name)
    if class_name not in FLOW_NAMES.values():
        names = ", ".join([*FLOW_NAMES, *FLOW_NAMES.values()])
        raise UserError(f"must be one of {names}: the network was trained by flow matching")
    kind = getattr(diffusers, class_name)
    config = pretrained.config
    lacking = ["timestep_spacing"] if timestep_spacing is not None else []
    lacking += [key for key in OF_EULER if config.get(key) and class_name != FLOW_NAMES["euler"]]
    lacking += [key for key in ("thresholding",) if config.get(key) and key not in _parameters(kind.__init__)]
    if lacking:
        raise UserError(f"{class_name} has no {', '.join(lacking)}")
    flow = _clipping(kind) if clip else {}
    flow |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config.shift}
    taken = _parameters(kind.__init__)
    return kind.from_config(config, **{key: value for key, value in flow.items() if key in taken})


def network_calls(sampler: SchedulerMixin, num_inference_steps: int) -> int:
    """How often a sampler calls the network for an image: once per step, unless it is of a higher order."""
    sampler.set_timesteps(num_inference_steps)
    return len(sampler.timesteps)


def _network_input(sampler: SchedulerMixin, images: torch.Tensor, timestep: float) -> torch.Tensor:
    """The images as the network sees them, which samplers of flow matching alone do not scale."""
    scale = getattr(sampler, "scale_model_input", None)
    return images if scale is None else scale(images, timestep)


def passed_over(pretrained: SchedulerMixin, sampler: SchedulerMixin) -> list[str]:
    """Settings of the pretrained schedule for sampling that the sampler does not have, as key=value."""
    clips = {"clip_sample"} if sampler.config.get("thresholding") else set()
    lacking = {"clip_sample", "steps_offset"} - clips - _parameters(type(sampler).__init__)
    return [f"{key}={shown(pretrained.config[key])}" for key in sorted(lacking) if pretrained.config.get(key)]


def try_sampler(sampler: SchedulerMixin, num_inference_steps: int, shape: tuple[int, int, int]) -> None:
    """Take one step from an image of zeros: what does not work shows before anything is written."""
    images = torch.zeros(1, *shape)
    with blaming(f"{num_inference_steps} steps of {type(sampler).__name__}"):
        sampler.set_timesteps(num_inference_steps)
        timestep = sampler.timesteps.tolist()[0]
        sampler.step(_network_input(sampler, images, timestep), timestep, images)


@torch.inference_mode()
def sample_images(
    network_at: NetworkAt,
    sampler: SchedulerMixin,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    device: torch.device | str,
    num_inference_steps: int,
    eta: float = 0.0,
) -> torch.Tensor:
    """One image per seed, as the network sees images: float32 on the device, shape (len(seeds), *shape).

    An image depends on its seed alone, not on the batch or the device: random samplers, and DDIM with eta above 0, draw
    its noise from its own generator. The sampler computes in float32. An image that is not finite raises RunError: the
    weights or the noise schedule are broken, or the precision is too low. `sampler` is a new one of `make_sampler`.
    """
    sampler.set_timesteps(num_inference_steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    taken = _parameters(sampler.step)
    randomness = {key: value for key, value in (("eta", eta), ("generator", generators)) if key in taken}
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    images = (noise * getattr(sampler, "init_noise_sigma", 1.0)).to(device)
    first_bad = torch.full((len(seeds),), -1, device=device)  # step after which an image is not finite; read once
    timesteps_on_device = sampler.timesteps.to(device)  # a Python number would be copied there, and waited for
    for step, (timestep, on_device) in enumerate(zip(sampler.timesteps.tolist(), timesteps_on_device, strict=True)):
        inputs = _network_input(sampler, images, timestep)
        prediction = network_at(timestep)(inputs, on_device, return_dict=False)[0].float()
        images = sampler.step(prediction, timestep, images, **randomness).prev_sample
        bad = ~images.isfinite().flatten(1).all(dim=1)
        first_bad = torch.where((first_bad < 0) & bad, step, first_bad)
    for seed, step in zip(seeds, first_bad.tolist(), strict=True):
        if step >= 0:
            raise RunError(f"seed {seed}: NaN or infinite after step {step + 1} of {len(sampler.timesteps)}")
    return images


def guided(network_at: NetworkAt, condition: Tensors, unconditional: Tensors, guidance_scale: float) -> NetworkAt:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale · (conditional − unconditional).

    Both come from one call on twice the batch. At scale 1, or without a condition, only the second is computed. A
    condition has shape (B, …), that of an empty or negative text (1, …) or (B, …).
    """
    if guidance_scale == 1 or not condition:
        return lambda timestep: functools.partial(network_at(timestep), **condition)
    both = {name: torch.cat([unconditional[name].expand_as(value), value]) for name, value in condition.items()}

    def predict(network: Callable, images: torch.Tensor, timesteps: torch.Tensor, **options: bool) -> tuple:
        prediction = network(torch.cat([images, images]), timesteps, **both, **options)[0]
        without, with_text = prediction.float().chunk(2)
        return (without + guidance_scale * (with_text - without),)

    return lambda timestep: functools.partial(predict, network_at(timestep))


def scaled(network_at: NetworkAt, scales: Sequence[tuple[int, int, float]]) -> NetworkAt:
    """Epsilon scaling (Ning et al. 2024): predicted noise is divided by the scale of its timestep's range.

    `scales` are (low, high, scale) of the ranges [low, high). Without any, or where the scale is 1, nothing changes.
    """
    if not scales:
        return network_at
    scale_at = ensemble([scale for *_, scale in scales], [(low, high) for low, high, _ in scales])

    def predict(network: Callable, scale: float, *inputs: torch.Tensor, **options: torch.Tensor | bool) -> tuple:
        return (network(*inputs, **options)[0].float() / scale,)

    def scaled_at(timestep: float) -> Callable:
        network, scale = network_at(timestep), scale_at(timestep)
        return network if scale == 1 else functools.partial(predict, network, scale)

    return scaled_at


def ensemble(experts: Sequence[nn.Module], ranges: Sequence[tuple[int, int]]) -> NetworkAt:
    """The experts before merging: at each timestep the one that was finetuned on its range [low, high).

    The ranges rise from 0 to T. The last one includes T, where sampling by flow matching begins.
    """
    pairs = list(zip(experts, ranges, strict=True))
    starts = [low for _, (low, _) in pairs[1:]]
    return lambda timestep: pairs[bisect_right(starts, timestep)][0]


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)
