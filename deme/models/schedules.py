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
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")  # of flow matching alone
FLOW = "flow_prediction"  # what a network predicts by flow matching, as diffusers calls it


def prediction_type(schedule: Mapping[str, Any]) -> str:
    """What networks predict by the settings of a noise schedule: epsilon, sample, v_prediction or FLOW."""
    if schedule.get("_class_name") in FLOW_SCHEDULERS:
        return FLOW
    given, flows = schedule.get("prediction_type", "epsilon"), bool(schedule.get("use_flow_sigmas"))
    if (given == FLOW) != flows:
        raise UserError(f"prediction_type={given} does not fit use_flow_sigmas={shown(flows)}")
    return given
