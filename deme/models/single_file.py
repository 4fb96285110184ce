"""A pipeline of Stable Diffusion 1 or XL in one file, under the names of its original code."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from deme.errors import UserError, blaming, naming, one_line, shown
from deme.job.files import atomic_file, read_json, sha256
from deme.job.records import digest_of, made_once
from deme.models import kinds, pipelines
from deme.models.original_names import open_clip_name, unet_names, vae_names
from deme.models.schedules import check_header, prediction_type
from deme.models.weights import load_tensors, save_tensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."  # how the names of a part's tensors begin
V1_TEXT = "cond_stage_model.transformer."
XL_TEXT, XL_TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PREFIXES = (UNET, VAE, V1_TEXT, XL_TEXT, XL_TEXT_2)
HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
NOT_TRAINED = re.compile(r"position_ids$|logit_scale$")  # diffusers leaves them out
EDM = ("edm_mean", "edm_std", "edm_vpred.")  # how the names of marks begin
BLOCKS = {
    "down_block_types": {"DownBlock2D", "CrossAttnDownBlock2D"},
    "up_block_types": {"UpBlock2D", "CrossAttnUpBlock2D"},
}
PROJECTION = re.compile(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)")  # of a text encoder's attention


def check_original(pipeline: Path, denoiser: Path) -> None:
    """Check that a pipeline with this denoiser can be one file, and that programs would take it for what it is."""
    settings = read_json(denoiser / "config.json")
    kind = kinds.denoiser_class(settings)
    if kind != "UNet2DConditionModel":
        raise UserError(f"the format is known for Stable Diffusion 1 and XL, not for a {kind}")
    if pipelines.is_projected(denoiser):
        raise UserError("the format has no projections: finetune with model.projection=false")
    for key, known in BLOCKS.items():
        if odd := sorted(set(settings.get(key, [])) - known):
            raise UserError(f"the format has no {key} {odd[0]}")
    if not isinstance(settings.get("layers_per_block", 2), int):
        raise UserError(f"the format has one layers_per_block, not {shown(settings['layers_per_block'])}")
    if settings.get("use_linear_projection", False) != kinds.is_xl(settings):
        raise UserError("the format is known for Stable Diffusion 1 and XL, not for 2")
    schedule = pipelines.schedule_file(pipeline)
    predicts = prediction_type(pipelines.read_schedule(pipeline))
    if predicts != "epsilon":
        raise UserError(f"programs take the network for one that predicts noise, but {schedule} has {predicts}")


def original_tensors(pipeline: Path) -> dict[str, torch.Tensor]:
    """All tensors of a pipeline's folder under their original names, memory-mapped but for a few."""
    xl = kinds.is_xl(read_json(pipelines.denoiser_folder(pipeline) / "config.json"))
    tensors = load_tensors(pipelines.denoiser_folder(pipeline))
    found = {UNET + name: tensors[ours] for ours, name in unet_names(tensors).items()}
    tensors = load_tensors(pipeline / "vae")
    for ours, name in vae_names(tensors).items():
        is_matrix = "mid.attn_1" in name and tensors[ours].dim() == 2  # a 1×1 convolution there
        found[VAE + name] = tensors[ours][..., None, None] if is_matrix else tensors[ours]
    for name, tensor in load_tensors(pipeline / "text_encoder", pipelines.STEMS["text_encoder"]).items():
        found[f"{XL_TEXT if xl else V1_TEXT}text_model.{name.removeprefix('text_model.')}"] = tensor
    if xl:
        found |= open_clip(load_tensors(pipeline / "text_encoder_2", pipelines.STEMS["text_encoder_2"]))
    return found


def open_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second text encoder's tensors under OpenCLIP's names, which has one matrix for queries, keys and values."""
    found = {}
    for name, tensor in tensors.items():
        match = PROJECTION.fullmatch(name)
        if match is None:
            is_transposed = name == "text_projection.weight"
            found[XL_TEXT_2 + open_clip_name(name)] = tensor.T.contiguous() if is_transposed else tensor
        elif match[2] == "q":
            parts = [tensors[f"{match[1]}.self_attn.{letter}_proj.{match[3]}"] for letter in "qkv"]
            found[f"{XL_TEXT_2}{open_clip_name(match[1])}.attn.in_proj_{match[3]}"] = torch.cat(parts)
    return found


def write_single_file(file: Path, pipeline: Path, made_from: Mapping[str, Any]) -> None:
    """Write a pipeline's folder as one file; what it is made from goes into the file's header."""
    header = {"format": "pt", **{key: json.dumps(value, ensure_ascii=False) for key, value in made_from.items()}}
    with atomic_file(file) as temporary:
        save_tensors(original_tensors(pipeline), temporary, header)


def open_single_file(file: Path, config: Path | None, folders: Path) -> Path:
    """The folder of the pipeline in a file, which is made in `folders` unless it is there.

    Args:
        config: a pipeline's folder, of which the settings and the tokenizers are read; None: diffusers tells the
            published pipeline by the file's tensors, and takes these from the Hub or its cache.
    """
    if not file.is_file():
        raise UserError("no such file")
    made_from = {"file": sha256(file)}
    if config is not None:
        with naming("model.config", config):
            pipelines.check_pipeline(config)
        files = sorted(path for pattern in pipelines.SETTINGS_FILES for path in config.glob(pattern))
        made_from |= {str(path.relative_to(config)): sha256(path) for path in files}
    folder = folders / f"{file.stem}-{digest_of(made_from)}"

    def build(temporary: Path) -> None:
        convert(file, config, temporary)
        print(f"{file}: its pipeline is in {folder}")

    return pipelines.check_pipeline(made_once(folder, "model.pretrained", build))


def convert(file: Path, config: Path | None, folder: Path) -> None:
    """Write the pipeline in a file into a folder, by diffusers; no tensor of the four networks is left out."""
    import diffusers
    from transformers.utils import logging

    with blaming("cannot be read"), safe_open(file, "pt") as opened:
        types = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  no mapping
        header = opened.metadata() or {}
    names = {name for name in types if name.startswith(PREFIXES) and not NOT_TRAINED.search(name)}
    if f"{UNET}input_blocks.0.0.weight" not in names:
        raise UserError("holds no network of Stable Diffusion under its original names")
    is_xl = any(name.startswith(XL_TEXT_2) for name in names)
    kind = kinds.XL if is_xl else "StableDiffusionPipeline"
    unused = [part for part in kinds.NEVER_RUN if not (is_xl and part == "safety_checker")]
    options = {} if is_xl else {"requires_safety_checker": False}
    given = {types[name] for name in names}  # a mixture is read in float32, which holds all of them
    dtype = HALF.get(given.pop(), torch.float32) if len(given) == 1 else torch.float32
    diffusers.utils.logging.set_verbosity_error()  # errors are told below, in one line
    diffusers.utils.logging.disable_progress_bar()
    logging.disable_progress_bar()
    remedy = "model.config=FOLDER may name a pipeline of the same kind" if config is None else f"model.config={config}"
    options |= {"torch_dtype": dtype, "local_files_only": True, **dict.fromkeys(unused)}
    options |= {"config": None if config is None else str(config)}
    try:
        getattr(diffusers, kind).from_single_file(str(file), **options).save_pretrained(folder)
    except Exception as error:  # network, name and shape errors have no common class
        lacks = "meta tensor" in str(error)  # of a network that was made without content
        reason = "lacks tensors of the networks that its configuration describes" if lacks else one_line(error)
        raise UserError(f"{remedy}: {reason}") from None
    odd = {name for name in original_tensors(folder) if not NOT_TRAINED.search(name)} ^ names
    if odd:
        raise UserError(f"{min(odd)}: is in the file or in the network that its configuration describes, not in both")
    check_marks(types, header, pipelines.read_schedule(folder))


def check_marks(names: Collection[str], header: Mapping[str, str], schedule: Mapping[str, Any]) -> None:
    """Refuse a file whose tensors, by ComfyUI's marks, or whose header say other than the noise schedule."""
    if edm := sorted(name for name in names if name.startswith(EDM)):
        raise UserError(f"{edm[0]}: says that the network is one of EDM, which is not supported")
    predicts = prediction_type(schedule)
    if "v_pred" in names and predicts != "v_prediction":
        raise UserError(
            f"v_pred: says that the network predicts v, but its configuration has prediction_type={predicts}"
        )
    if "ztsnr" in names and not schedule.get("rescale_betas_zero_snr"):
        raise UserError(
            "ztsnr: says that the last timestep is pure noise, but its configuration has rescale_betas_zero_snr=false"
        )
    check_header(header, schedule, "its configuration")
