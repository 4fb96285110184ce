"""diffusers pipelines as folders: where their parts lie, and what makes a folder a pipeline.

A pipeline is a folder with `unet/` and `scheduler/`, or a flat one with `config.json`, `scheduler_config.json` and the
weights side by side (google/ddpm-*); text-to-image pipelines have `vae/`, `text_encoder/` and `tokenizer/` too. Only
files are looked at here: neither torch nor diffusers is imported.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from deme.config.sections import HUB_ID
from deme.errors import UserError, one_line
from deme.job.files import REPOSITORY, read_json, sha256
from deme.models.weights import PICKLED_WEIGHTS, weights_files

SCHEDULER_CONFIG = "scheduler_config.json"
PROJECTED = "Projected"  # how the names of the UNet classes with projections begin
HUB_FILES = ["*.json", "*.txt", "*.safetensors"]
NOT_NEEDED = ["safety_checker/*", "feature_extractor/*", "*.fp16.*", "*.non_ema*"]  # of those on the Hub
ENCODERS = ("vae", "text_encoder", "tokenizer")  # parts of a text-to-image pipeline


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
        folder = Path(snapshot_download(source, allow_patterns=HUB_FILES, ignore_patterns=NOT_NEEDED))
        if not any(unet_folder(folder).glob("*.safetensors")):
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


def write_pipeline_files(folder: Path, pretrained: Path) -> None:
    """Write what makes `folder` a pipeline beside its unet/: the index, the noise schedule, all other parts.

    Other parts are linked to where that is possible (their files are never written in place), else copied. Parts that
    the index names but `pretrained` lacks, such as a safety checker that was not downloaded, are none.

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
    for name, part in index.items():
        if isinstance(part, list) and name not in ("unet", "scheduler"):
            if (pretrained / name).is_dir():
                _link_part(pretrained / name, folder / name)
            else:
                index[name] = [None, None]
                index |= {"requires_safety_checker": False} if name == "safety_checker" else {}
    if is_projected(folder / "unet"):
        index["unet"] = ["deme.projection", read_json(folder / "unet" / "config.json")["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "scheduler").mkdir()
    shutil.copy(scheduler_folder(pretrained) / SCHEDULER_CONFIG, folder / "scheduler")


def has_full_precision(part: Path) -> bool:
    """Whether a pipeline's part has other weights than those of the variant fp16, if it has any."""
    names = [path.name for path in part.glob("*.safetensors")]
    return not names or any(".fp16" not in name for name in names)


def _link_part(source: Path, target: Path) -> None:
    """Give a part's files other names, or copy them where the file system has no such names; no pickles among them.

    Where there are only weights of the variant fp16, they become the weights: the merged pipeline has one kind.
    """
    target.mkdir()
    full = has_full_precision(source)
    for path in source.iterdir():
        is_kept = path.suffix in (".json", ".txt", ".safetensors", ".model") and not (full and ".fp16" in path.name)
        if not path.is_file() or not is_kept:
            continue
        is_shard = "-of-" in path.name  # whose name stands in an index
        name = path.name if is_shard else path.name.replace(".fp16", "")
        try:
            os.link(path.resolve(), target / name)
        except OSError:
            shutil.copy(path, target / name)


def is_projected(folder: Path) -> bool:
    """Whether the UNet in a folder has channel-wise projections: its config.json names the class that has them.

    Raises:
        UserError: config.json is missing or damaged.
    """
    return str(read_json(folder / "config.json").get("_class_name")).startswith(PROJECTED)


def takes_text(pipeline: Path) -> bool:
    """Whether a pipeline's images follow a text: it has encoders for both."""
    return (pipeline / "text_encoder").is_dir()


def sample_size(folder: Path, pipeline: Path) -> int | None:
    """The resolution, in pixels, that the UNet in a folder is made for.

    Args:
        pipeline: whose encoders, if any, it works with.

    Raises:
        UserError: missing or damaged files.
    """
    weights_files(folder)
    size = read_json(folder / "config.json").get("sample_size")
    return size * latent_factor(pipeline) if isinstance(size, int) else size


def latent_factor(pipeline: Path) -> int:
    """Pixels for each entry of a latent, along each side; 1 where the network works on pixels.

    Raises:
        UserError: vae/config.json is missing or damaged.
    """
    if not takes_text(pipeline):
        return 1
    file = pipeline / "vae" / "config.json"
    blocks = read_json(file).get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 16:
        raise UserError(f"{file}: block_out_channels={blocks}")
    return 2 ** (len(blocks) - 1)


def encoder_files(pipeline: Path) -> list[Path]:
    """All files of a text-to-image pipeline's encoders; none where the network works on pixels."""
    parts = ENCODERS if takes_text(pipeline) else ()
    return [path for part in parts for path in sorted((pipeline / part).rglob("*")) if path.is_file()]


def encoders_hash(pipeline: Path) -> str:
    """What tells a pipeline's encoders from all others: a SHA-256 of those of their files."""
    hashes = [f"{path.relative_to(pipeline)} {sha256(path)}" for path in encoder_files(pipeline)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def num_train_timesteps(pipeline: Path) -> int:
    """T of a pipeline's noise schedule.

    Raises:
        UserError: missing or damaged files.
    """
    default = 1000  # diffusers' own
    return read_json(scheduler_folder(pipeline) / SCHEDULER_CONFIG).get("num_train_timesteps", default)
