"""Which kind of model is this? The classes that a pipeline's files name, and settings that change an input's meaning.

Each is looked up in a table; what is not in it is refused by name, with the list of what is. Only files are read. To
support another denoiser, add its class to PIPELINES and DENOISERS here and to DENOISER_CLASSES in denoisers.py.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme.config.paths import DENOISER
from deme.errors import UserError, naming, shown
from deme.job.files import read_json

INDEX = "model_index.json"
PROJECTED = "Projected"  # prefix of the classes with projections
ENCODERS = ("vae", "text_encoder", "tokenizer")  # parts of a text-to-image pipeline
PIPELINES = {  # the pipeline's denoiser; a denoiser's first pipeline is written where a folder names none
    "DDPMPipeline": "UNet2DModel",
    "DDIMPipeline": "UNet2DModel",
    "PNDMPipeline": "UNet2DModel",
    "StableDiffusionPipeline": "UNet2DConditionModel",
}
DENOISERS = {"UNet2DModel": (), "UNet2DConditionModel": ENCODERS}  # the parts between images and the network
SCHEDULERS = (  # their configurations say the same of the noise: betas, and what is predicted
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
)
CLASSES = {
    DENOISER: (*DENOISERS, *(f"{PROJECTED}{name}" for name in DENOISERS)),
    "scheduler": SCHEDULERS,
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
NEVER_RUN = ("safety_checker", "feature_extractor", "image_encoder")  # no image depends on them
FILES = {DENOISER: "config.json", "scheduler": "scheduler_config.json", "vae": "config.json"}  # each names its class
SETTINGS = {  # supported values; diffusers' default, where a file leaves a setting out, is one of them
    DENOISER: {
        "class_embed_type": (None,),  # labels
        "num_class_embeds": (None,),
        "time_cond_proj_dim": (None,),  # guidance, as in latent consistency models
        "addition_embed_type": (None,),  # sizes and a second text, as in Stable Diffusion XL
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "attention_type": ("default",),  # boxes
        "time_embedding_type": ("positional", "learned"),  # else a noise level in place of the timestep
        "center_input_sample": (False,),
    },
    "scheduler": {
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "use_flow_sigmas": (False, None),
        "timestep_type": ("discrete",),
        "timestep_spacing": ("leading", "trailing", "linspace"),
    },
    "vae": {"latents_mean": (None,), "latents_std": (None,)},
}


def read_index(pipeline: Path) -> dict[str, Any]:
    """A pipeline's model_index.json; empty where there is none, as in old folders."""
    return read_json(pipeline / INDEX) if (pipeline / INDEX).is_file() else {}


def index_class(index: dict[str, Any], part: str) -> Any:
    """The class of a part in a model_index.json, which names a library and a class; None if it names none."""
    entry = index.get(part)
    return entry[-1] if isinstance(entry, list) and entry else entry


def denoiser_class(settings: dict[str, Any]) -> str:
    """The denoiser's class by its config.json, without projections; old files name none."""
    return str(settings.get("_class_name", "UNet2DModel")).removeprefix(PROJECTED)


def check_pipeline(pipeline: Path, denoiser: Path, scheduler: Path) -> None:
    """Look up the classes and the settings of a pipeline folder's parts; parts that are missing are left to others."""
    index = read_index(pipeline)
    entries = {name: entry for name, entry in index.items() if name in CLASSES or isinstance(entry, list)}
    entries.pop("_class_name", None)
    parts = {name: index_class(index, name) for name, entry in entries.items() if entry != [None, None]}
    if index:
        _look_up(f"{pipeline / INDEX}: _class_name", index.get("_class_name"), PIPELINES)
    for name, given in parts.items():
        if name not in NEVER_RUN:
            _look_up(f"{pipeline / INDEX}: the part", name, CLASSES)
            _look_up(f"{pipeline / INDEX}: {name}", given, CLASSES[name])
    folders = {DENOISER: denoiser, "scheduler": scheduler, "vae": pipeline / "vae"}
    for name, folder in folders.items():
        if (folder / FILES[name]).is_file():
            check_part(name, folder / FILES[name], parts.get(name))
    if (denoiser / FILES[DENOISER]).is_file():
        name = denoiser_class(read_json(denoiser / FILES[DENOISER]))
        if index and PIPELINES[index["_class_name"]] != name:
            raise UserError(f"{pipeline / INDEX}: _class_name={index['_class_name']}: its network is a {name}")
        _check_parts(pipeline, parts, name)


def _check_parts(pipeline: Path, parts: dict[str, str], name: str) -> None:
    """"""
    there = {path.parent.name for path in pipeline.glob("*/config.json")}
    if parts:  # the index says which ones count; these would be passed over
        there &= {"vae", "vqvae"}
    for part in sorted(there | {part for part in parts if part in ENCODERS}):
        if part not in (DENOISER, "scheduler", *NEVER_RUN, *DENOISERS[name]):
            raise UserError(f"{pipeline / part}: a {name} is supported without one")


def check_part(part: str, file: Path, named: str | None = None) -> None:
    """Look up the class and the settings in the file of a part of SETTINGS.

    Args:
        named: its class in model_index.json, for files that name none.
    """
    settings = read_json(file)
    given = settings.get("_class_name", named or ("UNet2DModel" if part == DENOISER else None))
    _look_up(f"{file}: _class_name", given, CLASSES[part])
    with naming(file):
        check_settings(part, settings)


def check_settings(part: str, settings: Mapping[str, Any]) -> None:
    """Look up the settings of a part of SETTINGS."""
    for key, supported in SETTINGS[part].items():
        if key in settings:
            _look_up(key, settings[key], supported)
    scale = settings.get("scaling_factor", 1)  # of latents
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if part == "vae" and not (is_number and math.isfinite(scale) and scale != 0):
        raise UserError(f"scaling_factor={shown(scale)}: must be a finite number other than 0")


def _look_up(what: str, given: Any, supported: Any) -> None:
    """"""
    if isinstance(given, (list, dict)) or given not in supported:
        names = [shown(value) for value in supported if not str(value).startswith(PROJECTED)]
        raise UserError(f"{what}={shown(given)}: not {'one of ' * (len(names) > 1)}{', '.join(names)}")
