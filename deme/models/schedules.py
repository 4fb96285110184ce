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

PREDICTS, PREDICTS_V = "modelspec.prediction_type", "ss_v_parameterization"  # keys of headers; the latter: kohya's
ZERO_SNR, MERGED_FROM = "ss_zero_terminal_snr", "modelspec.merged_from"  # kohya's, too
SAID = {"v": "v_prediction", "v_pred": "v_prediction", "eps": "epsilon", "None": None, "": None}  # values of PREDICTS


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


def check_header(header: Mapping[str, str], schedule: Mapping[str, Any], whose: str, is_lora: bool = False) -> None:
    """Refuse a file of weights whose header says that they were trained by other settings than a noise schedule has.

    Args:
        whose: the schedule is, for messages.
        is_lora: PREDICTS=epsilon is what kohya's programs write by default, and their merges any value.
    """
    predicts = prediction_type(schedule)
    if predicts == FLOW:  # kohya's programs write epsilon of flow matching, too
        return
    given = header.get(PREDICTS, "")
    given = SAID.get(given, given)
    if is_lora and (given == "epsilon" or MERGED_FROM in header):
        given = None
    said = {PREDICTS: given, PREDICTS_V: "v_prediction" if is_set(header, PREDICTS_V) else None}
    for key, kind in said.items():
        if kind not in (None, predicts):
            raise UserError(f"{key}={header[key]} in its header, but {whose} has prediction_type={predicts}")
    if is_set(header, ZERO_SNR) and not schedule.get("rescale_betas_zero_snr"):
        raise UserError(f"{ZERO_SNR}={header[ZERO_SNR]} in its header, but {whose} has rescale_betas_zero_snr=false")


def is_set(header: Mapping[str, str], key: str) -> bool:
    """True if a header has a truth value that is true."""
    return header.get(key, "").lower() == "true"


def of_sampling(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ENFORCED by the settings of a noise schedule, with the defaults of its class."""
    return {
        "clip_sample": schedule.get("clip_sample", schedule["_class_name"] in CLIPPING),
        "steps_offset": schedule.get("steps_offset", 0),
    }
