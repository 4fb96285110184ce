"""The classes and settings of diffusers that are supported, in tables; what they do not list is refused by name.

To support another denoiser, add its class to DENOISERS, and its pipelines to PIPELINES.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deme.config.paths import SECOND, SUBFOLDERS, TRANSFORMER, UNET
from deme.config.section import is_finite
from deme.errors import UserError, naming, shown
from deme.job.files import checked, read_json
from deme.models.schedules import FLOW, FLOW_SCHEDULERS, SCHEDULERS, prediction_type

PROJECTED = "Projected"  # prefix of the classes with projections
XL = "StableDiffusionXLPipeline"
DIT, SD3, SANA = "DiTTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel"
WAN = "WanTransformer3DModel"
POOLED = "CLIPTextModelWithProjection"  # which also gives a text as one vector
ENCODERS = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
XL_ENCODERS = ENCODERS | {"text_encoder_2": POOLED, "tokenizer_2": "CLIPTokenizer"}
T5_PARTS = {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5Tokenizer"}  # a pipeline may lack both
SD3_ENCODERS = XL_ENCODERS | {"text_encoder": POOLED} | T5_PARTS
SANA_ENCODERS = {"vae": "AutoencoderDC", "text_encoder": "Gemma2Model", "tokenizer": "GemmaTokenizer"}
WAN_ENCODERS = {"vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel", "tokenizer": "T5Tokenizer"}
PIPELINES = {  # the pipeline's denoiser; a denoiser's first pipeline is written where a folder names none
    "DDPMPipeline": "UNet2DModel",
    "DDIMPipeline": "UNet2DModel",
    "PNDMPipeline": "UNet2DModel",
    "StableDiffusionPipeline": "UNet2DConditionModel",
    XL: "UNet2DConditionModel",
    "StableDiffusion3Pipeline": SD3,
    "SanaPipeline": SANA,
    "WanPipeline": WAN,
    "DiTPipeline": DIT,
}
OF_NOISE = ("DDIMPipeline", "PNDMPipeline")  # they replace the scheduler by one that takes velocities for noise
RENAMED = {"Transformer2DModel": DIT}  # in files of diffusers before 0.28
OF_UNETS = {  # supported settings; diffusers' default, where a file leaves one out, is among the values
    **dict.fromkeys(("class_embed_type", "num_class_embeds"), (None,)),  # labels
    "time_cond_proj_dim": (None,),  # guidance, as in latent consistency models
    "addition_embed_type": (None, "text_time"),  # sizes and a second text, as in Stable Diffusion XL
    **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type"), (None,)),
    "attention_type": ("default",),  # boxes
    "time_embedding_type": ("positional", "learned"),  # else a noise level in place of the timestep
    "center_input_sample": (False,),
}


class Denoiser(NamedTuple):
    """What there is to know of a class of denoisers without loading one."""

    subfolder: str  # of SUBFOLDERS
    encoders: Mapping[str, str]  # the parts between images and the network, with their classes
    settings: Mapping[str, tuple]  # supported values
    text_width: str | None = None  # the setting that has the entries of an embedding
    classes: str | None = None  # the setting that has the number of labels; the network may work on pixels, too


OF_SANA = {"guidance_embeds": (False,), "timestep_scale": (1.0,)}  # else it is distilled, as SANA-Sprint
OF_WAN = dict.fromkeys(("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"), (None,))  # of a first frame
OF_DIT = {"norm_type": ("ada_norm_zero",)}
DENOISERS = {
    "UNet2DModel": Denoiser(UNET, {}, OF_UNETS),
    "UNet2DConditionModel": Denoiser(UNET, ENCODERS, OF_UNETS, "cross_attention_dim"),
    DIT: Denoiser(TRANSFORMER, {"vae": "AutoencoderKL"}, OF_DIT, classes="num_embeds_ada_norm"),
    SD3: Denoiser(TRANSFORMER, SD3_ENCODERS, {}, "joint_attention_dim"),
    SANA: Denoiser(TRANSFORMER, SANA_ENCODERS, OF_SANA, "caption_channels"),
    WAN: Denoiser(TRANSFORMER, WAN_ENCODERS, OF_WAN, "text_dim"),
}
ALL_ENCODERS = (XL_ENCODERS, SD3_ENCODERS, SANA_ENCODERS, WAN_ENCODERS)
ENCODER_CLASSES = {
    part: tuple(dict.fromkeys(known[part] for known in ALL_ENCODERS if part in known)) for part in SD3_ENCODERS
}
CLASSES = {  # that a model_index.json may name
    "_class_name": PIPELINES,
    **dict.fromkeys((*SUBFOLDERS, SECOND), (*DENOISERS, *(f"{PROJECTED}{name}" for name in DENOISERS), *RENAMED)),
    "scheduler": (*SCHEDULERS, *FLOW_SCHEDULERS),
    **ENCODER_CLASSES,
}
NEVER_RUN = ("safety_checker", "feature_extractor", "image_encoder")  # no image depends on them
SETTINGS = {  # supported values, as of a denoiser's
    "scheduler": {
        "prediction_type": ("epsilon", "sample", "v_prediction", FLOW),
        "use_dynamic_shifting": (False, None),  # by the number of pixels
        "invert_sigmas": (False,),
        "timestep_type": ("discrete",),
        "timestep_spacing": ("leading", "trailing", "linspace"),
    },
    "vae": {"latents_mean": (None,), "latents_std": (None,)},  # the pipelines ignore both
}
OF_BLOCKS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")  # settings of VAEs with an entry for each
WAN_PATCH = [1, 2, 2]  # frames, height and width of a patch by default
OF_WAN_VAE = {"patch_size": (None,)}  # else it is that of Wan 2.2's 5 B parameters


def denoiser_class(settings: Mapping[str, Any]) -> str:
    """The denoiser's class by its config.json, without projections; old files name none, or an older one."""
    name = str(settings.get("_class_name", "UNet2DModel")).removeprefix(PROJECTED)
    return RENAMED.get(name, name)


def subfolder_of(settings: Mapping[str, Any]) -> str:
    """The name of a denoiser's sub-folder, by the class in its config.json."""
    return DENOISERS[denoiser_class(settings)].subfolder


def num_classes(settings: Mapping[str, Any]) -> int:
    """How many labels a denoiser takes, by its config.json; 0 if it takes none. One more stands for no label."""
    key = DENOISERS[denoiser_class(settings)].classes
    return 0 if key is None else settings.get(key, 1000)  # diffusers' default


def sample_size(settings: Mapping[str, Any]) -> int | None:
    """Entries along a side that a denoiser works on, by its config.json; None for any multiple of `least_size`."""
    given = settings.get("sample_size")
    is_pair = isinstance(given, (list, tuple)) and len(given) == 2 and given[0] == given[1]
    size = given[0] if is_pair else given
    is_unet = subfolder_of(settings) == UNET and not is_xl(settings)  # the latter is told the size
    if denoiser_class(settings) == WAN or (is_unet and size is None):
        return None
    if type(size) is not int or size < 1:
        raise UserError(f"sample_size={shown(given)}: must be a whole number above 0, as images are squares")
    return size


def least_size(settings: Mapping[str, Any]) -> int:
    """The least entries along a side, by the config.json of a denoiser that takes any multiple of them."""
    if denoiser_class(settings) == WAN:
        return settings.get("patch_size", WAN_PATCH)[1]
    return shrinking("block_out_channels", settings.get("block_out_channels", [0] * 4))  # diffusers' default is of 4


def is_xl(settings: Mapping[str, Any]) -> bool:
    """True if a denoiser is of Stable Diffusion XL, by its config.json."""
    return settings.get("addition_embed_type") == "text_time"


def text_width(settings: Mapping[str, Any]) -> Any:
    """The entries of a text's embedding, by the denoiser's config.json; None if it takes no text."""
    return settings.get(DENOISERS[denoiser_class(settings)].text_width)


def parts_between(settings: Mapping[str, Any]) -> Mapping[str, str]:
    """The parts between images and a denoiser, by its config.json, with their classes."""
    return XL_ENCODERS if is_xl(settings) else DENOISERS[denoiser_class(settings)].encoders


def read_part(part: str, file: Path, named: str | None = None) -> dict[str, Any]:
    """The settings in the file of a denoiser or of a part of SETTINGS, looked up.

    `named` is its class where the file names none.
    """
    default = named or ("UNet2DModel" if part in SUBFOLDERS else None)
    settings = {"_class_name": default} | read_json(file)
    look_up(f"{file}: _class_name", settings["_class_name"], CLASSES[part])
    with naming(file):
        check_settings(part, settings)
        if part == "scheduler":
            prediction_type(settings)
    return settings


def check_settings(part: str, settings: Mapping[str, Any]) -> None:
    """Look up the settings of a denoiser or of a part of SETTINGS."""
    known = DENOISERS[denoiser_class(settings)].settings if part in SUBFOLDERS else SETTINGS[part]
    if settings.get("_class_name") == WAN_ENCODERS["vae"]:
        known = OF_WAN_VAE
        check_statistics(settings)
    for key, supported in known.items():
        if key in settings:
            look_up(key, settings[key], supported)
    if part in SUBFOLDERS:
        sample_size(settings)
    if part in SUBFOLDERS and denoiser_class(settings) == WAN:
        patch = settings.get("patch_size", WAN_PATCH)
        if not (checked(patch, list[int], "patch_size")[:1] == [1] and len(patch) == 3 and patch[1] == patch[2] > 0):
            raise UserError(f"patch_size={shown(patch)}: must be [1, n, n], as images are videos of one frame")
    betas, total = settings.get("trained_betas"), settings.get("num_train_timesteps", 1000)
    if part == "scheduler" and betas is not None and not (isinstance(betas, list) and len(betas) == total):
        raise UserError(f"trained_betas: must be a list of num_train_timesteps={total} numbers")
    for key in ("shift", "flow_shift") if part == "scheduler" else ():
        if not (is_finite(settings.get(key, 1)) and settings.get(key, 1) > 0):
            raise UserError(f"{key}={shown(settings[key])}: must be a finite number above 0")
    scale, shift = settings.get("scaling_factor", 1), settings.get("shift_factor")  # of latents
    if part == "vae" and not (is_finite(scale) and scale != 0):
        raise UserError(f"scaling_factor={shown(scale)}: must be a finite number other than 0")
    if part == "vae" and shift is not None and not is_finite(shift):
        raise UserError(f"shift_factor={shown(shift)}: must be a finite number")


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per entry of a latent, along each side, by the VAE's settings: it halves the size after each block."""
    key = next((key for key in OF_BLOCKS if key in vae), OF_BLOCKS[0])
    return shrinking(key, vae.get(key))


def shrinking(key: str, blocks: Any) -> int:
    """The factor between the sides of a network's first and last block, of which each but the last halves the size."""
    if not isinstance(blocks, (list, tuple)) or not 1 <= len(blocks) <= 16:
        raise UserError(f"{key}={blocks}")
    return 2 ** (len(blocks) - 1)


def check_statistics(vae: Mapping[str, Any]) -> None:
    """Check the mean and the standard deviation of each channel of Wan's latents, by the VAE's config.json."""
    for key, least in (("latents_mean", -math.inf), ("latents_std", 0)):
        values = vae.get(key)
        rows = values if isinstance(values, list) and len(values) == vae.get("z_dim") else [None]
        if not all(is_finite(value) and value > least for value in rows):
            above = "" if least < 0 else " above 0"
            raise UserError(f"{key}={shown(values)}: must be z_dim={vae.get('z_dim')} finite numbers{above}")


def check_shift(denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse a shift of latents, by both config.json, where the denoiser's pipeline would ignore it."""
    if denoiser_class(denoiser) != SD3:
        look_up("shift_factor", vae.get("shift_factor"), (None, 0))


def look_up(what: str, given: Any, supported: Collection[Any]) -> None:
    """Raise an error that lists the supported values unless the given one is among them."""
    if isinstance(given, (list, dict)) or given not in supported:
        names = [shown(value) for value in supported if not str(value).startswith(PROJECTED)]
        raise UserError(f"{what}={shown(given)}: not {'one of ' * (len(names) > 1)}{', '.join(names)}")
