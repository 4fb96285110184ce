"""Reading diffusers pipelines in every form that the Hub has them.

A pipeline is a folder with `unet/` and `scheduler/`, or a flat one with `config.json`, `scheduler_config.json` and the
weights side by side (google/ddpm-*). Weights are safetensors or `.bin`, which is read without unpickling code, under
today's names or those of diffusers up to 0.15. Only its files are looked at here: torch is imported where tensors are
read, diffusers not at all.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.sections import HUB_ID
from deme.errors import UserError, one_line
from deme.job.files import REPOSITORY, read_json

if TYPE_CHECKING:
    import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
SCHEDULER_CONFIG = "scheduler_config.json"
PROJECTED_CLASS = "ProjectedUNet2DModel"
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # up to diffusers 0.15
OLD_ATTENTION_NAME = re.compile(rf"(?<=\.)({'|'.join(ATTENTION_NAMES)})(?=\.(weight|bias)$)")


def find_pipeline(source: str) -> Path:
    """The local folder of a pipeline given as a folder or a Hub id (downloaded once, kept in the Hub's cache).

    Args:
        source: a folder relative to the working directory or else to the repository, or owner/name on the Hub.

    Raises:
        UserError: neither, or a folder that holds no UNet and scheduler.
    """
    for folder in (Path(source), REPOSITORY / source):
        if folder.is_dir():
            for part in (unet_folder(folder) / "config.json", scheduler_folder(folder) / SCHEDULER_CONFIG):
                if not part.is_file():
                    raise UserError(f"not a pipeline folder: {part} is missing")
            return folder
    if not is_hub_id(source):
        raise UserError("no such folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        if not (unet_folder(folder) / WEIGHTS).is_file():
            folder = Path(snapshot_download(source, allow_patterns=["*.json", f"*{PICKLED_WEIGHTS}"]))
        return folder
    except Exception as error:  # network, name and permission errors have no common class
        raise UserError(f"neither a pipeline folder nor a reachable Hub id: {one_line(error)}") from None


def unet_folder(pipeline: Path) -> Path:
    """Where a pipeline's network lies: in unet/, or flat beside all else."""
    return pipeline / "unet" if (pipeline / "unet").is_dir() else pipeline


def scheduler_folder(pipeline: Path) -> Path:
    """Where a pipeline's noise schedule lies: in scheduler/, or flat beside all else."""
    has_parts = any((pipeline / part).is_dir() for part in ("unet", "scheduler"))
    return pipeline / "scheduler" if has_parts else pipeline


def is_hub_id(source: str) -> bool:
    """Whether a pipeline or data set is one of the Hub's, and not a folder."""
    is_folder = any(folder.is_dir() for folder in (Path(source), REPOSITORY / source))
    return not is_folder and re.fullmatch(HUB_ID, source) is not None


def write_unet(folder: Path, tensors: dict[str, "torch.Tensor"], config: dict) -> None:
    """Write a UNet's folder.

    Args:
        config: the content of its config.json.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_pipeline_files(folder: Path, pretrained: Path) -> None:
    """Write what makes `folder` a pipeline beside its unet/: the pretrained scheduler's configuration and the index.

    Args:
        pretrained: pipeline folder; where it has no index of its own, DDPMPipeline's is written.
    """
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    if (pretrained / "model_index.json").is_file():
        index = read_json(pretrained / "model_index.json")
    if is_projected(folder / "unet"):
        index["unet"] = ["deme.projection", PROJECTED_CLASS]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "scheduler").mkdir()
    shutil.copy(scheduler_folder(pretrained) / SCHEDULER_CONFIG, folder / "scheduler")


def weights_file(folder: Path) -> Path:
    """The weights in a UNet's folder, safetensors where there are both.

    Raises:
        UserError: there are none, or they are spread over several files.
    """
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        if (folder / f"{name}.index.json").exists():  # which diffusers would load instead of the single file
            raise UserError(f"{folder / name}.index.json: weights in several files are not read; save them as one")
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder / WEIGHTS}: missing")


def load_tensors(folder: Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a UNet's folder under today's names, mapped from the file: memory is used for what is touched.

    Raises:
        UserError: the weights are missing or damaged.
    """
    import torch
    from safetensors.torch import load_file

    path = weights_file(folder)
    try:
        if path.name == WEIGHTS:
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        return {todays_name(name): tensor for name, tensor in tensors.items()}
    except Exception as error:  # a damaged file leads to errors of zip, pickle, safetensors and torch
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def todays_name(name: str) -> str:
    """A tensor's name in a UNet of today's diffusers, from that or from the name up to 0.15 (attention layers)."""
    return OLD_ATTENTION_NAME.sub(lambda found: ATTENTION_NAMES[found[1]], name)


def is_projected(folder: Path) -> bool:
    """Whether the UNet in a folder has channel-wise projections: its config.json names the class that has them.

    Raises:
        UserError: config.json is missing or damaged.
    """
    return read_json(folder / "config.json").get("_class_name") == PROJECTED_CLASS


def sample_size(folder: Path) -> int | None:
    """The resolution, in pixels, that the UNet in a folder is made for.

    Raises:
        UserError: missing or damaged files.
    """
    weights_file(folder)
    return read_json(folder / "config.json").get("sample_size")


def num_train_timesteps(pipeline: Path) -> int:
    """T of a pipeline's noise schedule.

    Raises:
        UserError: missing or damaged files.
    """
    default = 1000  # diffusers' own
    return read_json(scheduler_folder(pipeline) / SCHEDULER_CONFIG).get("num_train_timesteps", default)
