"""Reading diffusers pipeline folders: `unet/`, `scheduler/`, `model_index.json`.

diffusers itself is imported only where a network is built: merging needs the folders alone.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from deme.config import REPOSITORY, UserError
from deme.task_vectors import PROJECTION_SUFFIX

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROJECTED_CLASS = "ProjectedUNet2DModel"


def find_pipeline(source: str) -> Path:
    """The local folder of a pipeline given as a folder or a Hub id (downloaded once, kept in the Hub's cache).

    Args:
        source: a folder relative to the working directory or else to the repository, or owner/name on the Hub.

    Raises:
        UserError: neither, or a folder without a model_index.json.
    """
    for folder in (Path(source), REPOSITORY / source):
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise UserError(f"model.pretrained={source}: not a pipeline folder: it has no model_index.json")
            return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise UserError(f"model.pretrained={source}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # network, name and permission errors have no common class
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.pretrained={source}: neither a pipeline folder nor a reachable Hub id: {reason}"
        ) from None


def read_json(path: Path) -> dict:
    """
    Raises:
        UserError: missing, unreadable or not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def load_tensors(unet_folder: Path) -> dict[str, "torch.Tensor"]:
    """A UNet's tensors by name, mapped from the file: memory is used only for what is touched.

    Raises:
        UserError: the weights are missing or not a whole safetensors file.
    """
    from safetensors.torch import load_file

    path = unet_folder / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}") from None


def load_unet(folder: Path, resolution: int) -> "UNet2DModel":
    """The UNet of a `unet/` folder, float32, in eval mode; with projections where its configuration says so.

    Args:
        resolution: the data's, which must be the UNet's sample size.

    Raises:
        UserError: missing or damaged files, projections that the configuration does not name, or another sample size.
    """
    from deme.projection import ProjectedUNet2DModel, UNet2DModel

    settings = read_json(folder / "config.json")
    if settings.get("sample_size") != resolution:
        raise UserError(
            f"data.resolution={resolution}: the UNet in {folder} has sample_size={settings.get('sample_size')}"
        )
    projected = settings.get("_class_name") == PROJECTED_CLASS
    if not projected and any(name.endswith(PROJECTION_SUFFIX) for name in load_tensors(folder)):
        raise UserError(f"{folder}: holds projections, but its config.json does not name {PROJECTED_CLASS}")
    unet_class = ProjectedUNet2DModel if projected else UNet2DModel
    try:
        unet, report = unet_class.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None
    if report["missing_keys"] or report["unexpected_keys"]:
        names = ", ".join([*report["missing_keys"], *report["unexpected_keys"]][:3])
        raise UserError(f"{folder}: weights and config.json do not fit each other ({names} …)")
    return unet


def load_scheduler(pipeline: Path, num_train_timesteps: int) -> "DDPMScheduler":
    """The pretrained noise schedule: betas, clipping and prediction type as the pipeline folder says.

    Raises:
        UserError: missing files, or T unlike the configuration's.
    """
    from diffusers import DDPMScheduler

    folder = pipeline / "scheduler"
    read_json(folder / "scheduler_config.json")
    scheduler = DDPMScheduler.from_pretrained(folder)
    found = scheduler.config.num_train_timesteps
    if found != num_train_timesteps:
        raise UserError(f"timesteps.num_train_timesteps={num_train_timesteps}: the scheduler in {folder} has {found}")
    return scheduler
