"""Which kind of model is this? The classes that a pipeline's files name, and settings that change an input's meaning.

Each is looked up in a table; what is not in it is refused by name, with the list of what is. Only files are read. To
support another denoiser, add its class to PIPELINES and DENOISERS here and to DENOISER_CLASSES in denoisers.py.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from deme.config.paths import DENOISER
from deme.config.section import is_finite
from deme.errors import UserError, naming, shown
from deme.job.files import read_json

INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
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
CLASSES = {  # that a model_index.json may name
    "_class_name": PIPELINES,
    DENOISER: (*DENOISERS, *(f"{PROJECTED}{name}" for name in DENOISERS)),
    "scheduler": SCHEDULERS,
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
NEVER_RUN = ("safety_checker", "feature_extractor", "image_encoder")  # no image depends on them
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
    """The classes in model_index.json: `_class_name`, the pipeline's, and its parts'; empty where there is no file."""
    index = read_json(pipeline / INDEX) if (pipeline / INDEX).is_file() else {}
    return {
        part: entry[-1] if isinstance(entry, list) and entry else entry  # a library and a class
        for part, entry in index.items()
        if (part in CLASSES or isinstance(entry, list)) and entry != [None, None] and part not in NEVER_RUN
    }


def denoiser_class(settings: dict[str, Any]) -> str:
    """The denoiser's class by its config.json, without projections; old files name none."""
    return str(settings.get("_class_name", "UNet2DModel")).removeprefix(PROJECTED)


def denoiser_folder(pipeline: Path) -> Path:
    """The folder of a pipeline's denoiser: its sub-folder, or the pipeline itself if that is flat."""
    return pipeline / DENOISER if (pipeline / DENOISER).is_dir() else pipeline


def schedule_file(pipeline: Path) -> Path:
    """The file of a pipeline's noise schedule: in scheduler/, or in the pipeline itself if that is flat."""
    has_parts = any((pipeline / part).is_dir() for part in (DENOISER, "scheduler"))
    return (pipeline / "scheduler" if has_parts else pipeline) / SCHEDULER_CONFIG


def check_pipeline(pipeline: Path, is_whole: bool = True) -> Path:
    """Check that a folder is a pipeline of known classes and settings, and return it.

    Without `is_whole` it may lack the denoiser: only its encoders are wanted.
    """
    file, index = pipeline / INDEX, read_index(pipeline)
    for part, name in index.items():
        _look_up(f"{file}: the part", part, CLASSES)
        _look_up(f"{file}: {part}", name, CLASSES[part])
    files = {"vae": pipeline / "vae" / "config.json", "scheduler": schedule_file(pipeline)}
    files[DENOISER] = denoiser_folder(pipeline) / "config.json"
    settings = {part: read_part(part, path, index.get(part)) for part, path in files.items() if path.is_file()}
    for part in (DENOISER, "scheduler") if is_whole else ():
        if part not in settings:
            raise UserError(f"not a pipeline folder: {files[part]} is missing")
    if DENOISER not in settings:
        return pipeline
    kind = denoiser_class(settings[DENOISER])
    if PIPELINES.get(index.get("_class_name"), kind) != kind:
        raise UserError(f"{file}: _class_name={index['_class_name']}: its network is a {kind}")
    present = {path.parent.name for path in pipeline.glob("*/config.json")}
    if index:  # says which folders count; but for these, which would be passed over
        present = (present | index.keys()) & {"vqvae", *ENCODERS}
    for part in sorted(present - {DENOISER, "scheduler", *NEVER_RUN, *DENOISERS[kind]}):
        raise UserError(f"{pipeline / part}: a {kind} is supported without one")
    return pipeline


def read_part(part: str, file: Path, named: str | None = None) -> dict[str, Any]:
    """The settings in the file of a part of SETTINGS, looked up; `named` is its class where the file names none."""
    settings = read_json(file)
    given = settings.get("_class_name", named or ("UNet2DModel" if part == DENOISER else None))
    _look_up(f"{file}: _class_name", given, CLASSES[part])
    with naming(file):
        check_settings(part, settings)
    return settings


def check_settings(part: str, settings: Mapping[str, Any]) -> None:
    """Look up the settings of a part of SETTINGS."""
    for key, supported in SETTINGS[part].items():
        if key in settings:
            _look_up(key, settings[key], supported)
    scale = settings.get("scaling_factor", 1)  # of latents
    if part == "vae" and not (is_finite(scale) and scale != 0):
        raise UserError(f"scaling_factor={shown(scale)}: must be a finite number other than 0")


def _look_up(what: str, given: Any, supported: Collection[Any]) -> None:
    if isinstance(given, (list, dict)) or given not in supported:
        names = [shown(value) for value in supported if not str(value).startswith(PROJECTED)]
        raise UserError(f"{what}={shown(given)}: not {'one of ' * (len(names) > 1)}{', '.join(names)}")
