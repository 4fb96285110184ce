"""The classes of noise schedules, and what networks predict by them. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from deme.errors import UserError, shown

SCHEDULERS = (  # their configurations say the same of the noise: betas, and what is predicted
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
)
CLIPPING = tuple(f"{name}{kind}Scheduler" for name in ("DDPM", "DDIM") for kind in ("", "Parallel"))  # by default
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")  # of flow matching alone
FLOW = "flow_prediction"  # what a network predicts by flow matching, as diffusers calls it

ENFORCED = {"clip_sample": False, "steps_offset": 1}  # by StableDiffusionPipeline, whatever the file says


def prediction_type(schedule: Mapping[str, Any]) -> str:
    """What networks predict by the settings of a noise schedule: epsilon, sample, v_prediction or FLOW."""
    if schedule.get("_class_name") in FLOW_SCHEDULERS:
        return FLOW
    given, flows = schedule.get("prediction_type", "epsilon"), bool(schedule.get("use_flow_sigmas"))
    if (given == FLOW) != flows:
        raise UserError(f"prediction_type={given} does not fit use_flow_sigmas={shown(flows)}")
    if schedule.get("predict_epsilon") is False and given == "epsilon":  # of diffusers before 0.10
        raise UserError("predict_epsilon=false does not fit prediction_type=epsilon: set prediction_type to sample")
    return given


def of_sampling(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ENFORCED by the settings of a noise schedule, with the defaults of its class."""
    return {
        "clip_sample": schedule.get("clip_sample", schedule["_class_name"] in CLIPPING),
        "steps_offset": schedule.get("steps_offset", 0),
    }
