"""Reading diffusers pipelines in every form that the Hub has them.

A pipeline is a folder with `unet/` and `scheduler/`, or a flat one with `config.json`, `scheduler_config.json` and the
weights side by side (google/ddpm-*). Weights are safetensors or `.bin`, which is read without unpickling code, under
today's names or those of diffusers up to 0.15. torch and diffusers are imported only where tensors are read or
a network is built.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from deme.config import HUB_ID, REPOSITORY, Config, UserError

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
SCHEDULER_CONFIG = "scheduler_config.json"
PROJECTED_CLASS = "ProjectedUNet2DModel"
PROJECTION_SUFFIX = ".projection.weight"  # how the channel-wise projections' tensors end in a state dict
OLD_ATTENTION_NAME = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")


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
                    raise UserError(f"model.pretrained={source}: not a pipeline folder: {part} is missing")
            return folder
    if not re.fullmatch(HUB_ID, source):
        raise UserError(f"model.pretrained={source}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        if not (unet_folder(folder) / WEIGHTS).is_file():
            folder = Path(snapshot_download(source, allow_patterns=["*.json", f"*{PICKLED_WEIGHTS}"]))
        return folder
    except Exception as error:  # network, name and permission errors have no common class
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.pretrained={source}: neither a pipeline folder nor a reachable Hub id: {reason}"
        ) from None


def unet_folder(pipeline: Path) -> Path:
    return pipeline / "unet" if (pipeline / "unet").is_dir() else pipeline


def scheduler_folder(pipeline: Path) -> Path:
    return pipeline / "scheduler" if (pipeline / "scheduler").is_dir() else pipeline


def write_pipeline_files(folder: Path, pretrained: Path, projected: bool) -> None:
    """Write what makes `folder` a pipeline beside its unet/: the pretrained scheduler's configuration and the index.

    Args:
        pretrained: pipeline folder; where it has no index of its own, DDPMPipeline's is written.
        projected: the UNet has channel-wise projections.
    """
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    if (pretrained / "model_index.json").is_file():
        index = read_json(pretrained / "model_index.json")
    if projected:
        index["unet"] = ["deme.projection", PROJECTED_CLASS]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "scheduler").mkdir()
    shutil.copy(scheduler_folder(pretrained) / SCHEDULER_CONFIG, folder / "scheduler")


def weights_file(folder: Path) -> Path:
    """The weights in a UNet's folder, safetensors where there are both.

    Raises:
        UserError: there are none.
    """
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder / WEIGHTS}: missing")


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


def load_tensors(folder: Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a UNet's folder under today's names.

    Mapped from the file where it is safetensors of today's diffusers: memory is used only for what is touched.

    Raises:
        UserError: the weights are missing or damaged.
    """
    from safetensors.torch import load_file

    path = weights_file(folder)
    if path.name == WEIGHTS:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
        if not any(OLD_ATTENTION_NAME.search(name) for name in tensors):
            return tensors
    return load_unet(folder).state_dict()  # diffusers knows the old names


def check_fits(config: Config, unets: Sequence[Path], pipeline: Path) -> None:
    """Compare networks and a noise schedule with the configuration by their JSON files, before torch is imported.

    Args:
        unets: folders.
        pipeline: the folder whose scheduler is used.

    Raises:
        UserError: missing or damaged files, a sample size unlike the data's resolution, another number of timesteps.
    """
    for folder in unets:
        weights_file(folder)
        size, resolution = read_json(folder / "config.json").get("sample_size"), config.data.resolution
        if size != resolution:
            raise UserError(f"data.resolution={resolution}: the UNet in {folder} has sample_size={size}")
    folder, steps = scheduler_folder(pipeline), config.timesteps.num_train_timesteps
    found = read_json(folder / SCHEDULER_CONFIG).get("num_train_timesteps", 1000)  # diffusers' own default
    if found != steps:
        raise UserError(f"timesteps.num_train_timesteps={steps}: the scheduler in {folder} has {found}")


def load_unet(folder: Path) -> "UNet2DModel":
    """The UNet in a folder, float32, in eval mode; with projections where its configuration says so.

    Raises:
        UserError: missing or damaged files, projections that the configuration does not name, NaN or infinite weights.
    """
    from deme.projection import ProjectedUNet2DModel, UNet2DModel

    settings, weights = read_json(folder / "config.json"), weights_file(folder)
    unet_class = ProjectedUNet2DModel if settings.get("_class_name") == PROJECTED_CLASS else UNet2DModel
    try:
        unet, report = unet_class.from_pretrained(
            folder, use_safetensors=weights.name == WEIGHTS, output_loading_info=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers and torch raise whatever a wrong value or a damaged file leads to
        raise UserError(f"{folder}: {error_line(error)}") from None
    unknown = report["unexpected_keys"]
    if any(name.endswith(PROJECTION_SUFFIX) for name in unknown):
        raise UserError(f"{folder}: holds projections, but its config.json does not name {PROJECTED_CLASS}")
    if report["missing_keys"] or unknown:
        names = ", ".join([*report["missing_keys"], *unknown][:3])
        raise UserError(f"{folder}: weights and config.json do not fit each other ({names} …)")
    for name, tensor in unet.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{weights}: tensor {name} holds NaN or infinite values")
    return unet


def load_scheduler(pipeline: Path) -> "DDPMScheduler":
    """The pretrained noise schedule: betas, clipping, prediction and variance type as the pipeline folder says.

    Raises:
        UserError: values that diffusers can't use.
    """
    from diffusers import DDPMScheduler

    folder = scheduler_folder(pipeline)
    try:
        return DDPMScheduler.from_pretrained(folder)
    except Exception as error:  # diffusers raises whatever a wrong value leads to
        raise UserError(f"{folder / SCHEDULER_CONFIG}: {error_line(error)}") from None


def check_usable(unet: "UNet2DModel", scheduler: "DDPMScheduler", name: str) -> None:
    """`check_network` for a network and a noise schedule that were loaded.

    Raises:
        UserError: they do not work together; names `name`, where they come from.
    """
    try:
        check_network(unet, scheduler)
    except Exception as error:  # torch and diffusers raise whatever does not fit
        raise UserError(f"{name}: {error_line(error)}") from None


def check_network(unet: "UNet2DModel", scheduler: "DDPMScheduler") -> None:
    """Predict and take one step, so that what does not fit shows before anything is written.

    Raises:
        Exception: whatever goes wrong.
    """
    import torch

    from deme.data import MODES
    from deme.losses import prediction_target

    channels, size = unet.config.in_channels, unet.config.sample_size
    if channels not in MODES:
        raise ValueError(f"in_channels={channels}: images have {' or '.join(map(str, MODES))} channels")
    images, last = torch.zeros(1, channels, size, size), torch.tensor([scheduler.config.num_train_timesteps - 1])
    with torch.no_grad():
        prediction = unet(images, last).sample
    target = prediction_target(scheduler, images, images, last)
    if prediction.shape != target.shape:
        raise ValueError(f"the network maps {tuple(target.shape)} to {tuple(prediction.shape)}")
    scheduler.step(prediction, int(last), images)


def error_line(error: Exception) -> str:
    """An error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
