"""Pipelines and weights, in folders or on the Hub, in every form that the Hub has them, read without running code.

torch is imported only to read tensors.
"""

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from deme.config.paths import DENOISER
from deme.config.sections import HUB_ID
from deme.errors import UserError, blaming, one_line
from deme.job.files import REPOSITORY, checked, read_json, sha256
from deme.models.pipelines import check_pipeline

STEM = "diffusion_pytorch_model"  # the files' names begin with it
WEIGHTS = f"{STEM}.safetensors"
PICKLED_WEIGHTS = f"{STEM}.bin"
FORMS = (  # in order of preference, after the stem: a file, or an index of shards and their names
    (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors"),
    (".fp16.safetensors", ".safetensors.index.fp16.json", ".fp16-*-of-*.safetensors", "-*-of-*.fp16.safetensors"),
    (".bin", ".bin.index.json", "-*-of-*.bin"),
)
STEMS = {DENOISER: STEM, "vae": STEM, "text_encoder": "model"}  # of a pipeline's parts that have weights
SETTINGS_FILES = (  # files of a pipeline on the Hub that are read beside the weights
    *("model_index.json", "config.json", "scheduler_config.json", "scheduler/scheduler_config.json"),
    *(f"{part}/config.json" for part in STEMS),
    *("tokenizer/*.json", "tokenizer/*.txt"),
)
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # up to diffusers 0.15
OLD_ATTENTION_NAME = re.compile(rf"(?<=\.)({'|'.join(ATTENTION_NAMES)})(?=\.(weight|bias)$)")


def weights_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The files of the weights in a network's folder: one, or the shards that an index names."""
    for name, index_name, *_ in FORMS:
        file, index = folder / f"{stem}{name}", folder / f"{stem}{index_name}"
        if index.is_file():
            if file.is_file():
                raise UserError(f"{index}: stands beside {file.name}; delete the one that does not count")
            shards = checked(read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
            files = [folder / Path(shard).name for shard in sorted(set(shards.values()))]
            if missing := [file for file in files if not file.is_file()]:
                raise UserError(f"{missing[0]}: missing; {index.name} names it")
            return files
        if file.is_file():
            return [file]
    raise UserError(f"{folder / stem}.safetensors: missing")


def has_weights(folder: Path, stem: str = STEM) -> bool:
    """True if a network's folder has weights in any form, damaged or incomplete ones included."""
    return any((folder / f"{stem}{name}").is_file() for form in FORMS for name in form[:2])


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights in a network's folder: of the file, or of its shards' SHA-256."""
    hashes = [sha256(file) for file in weights_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a network's folder under today's names, memory-mapped."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in weights_files(folder):
        with blaming(f"{file}: cannot be read"):
            if file.suffix == ".safetensors":
                content = load_file(file)
            else:
                content = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
            tensors |= {todays_name(name): tensor for name, tensor in content.items()}
    return tensors


def todays_name(name: str) -> str:
    """A tensor's name in today's diffusers; up to 0.15 attention layers had other names."""
    return OLD_ATTENTION_NAME.sub(lambda match: ATTENTION_NAMES[match[1]], name)


def write_denoiser(folder: Path, tensors: dict[str, Any], config: dict) -> None:
    """Write a denoiser's folder: weights and config.json."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def find_folder(source: str) -> Path | None:
    """A folder relative to the working directory, or else to the repository; None if there is none."""
    return next((folder for folder in (Path(source), REPOSITORY / source) if folder.is_dir()), None)


def hub_name(source: str) -> str | None:
    """owner/name of a pipeline, model or data set on the Hub, without its @revision; None for a folder."""
    name, at, revision = source.partition("@")
    fits = re.fullmatch(HUB_ID, name) is not None and (revision != "" or at == "")
    return name if fits and find_folder(source) is None else None


def find_pipeline(source: str) -> Path:
    """The folder of a pipeline: a local one, or owner/name[@revision] in the Hub's cache.

    Only files that are read are downloaded, none without a connection.
    """
    if (folder := find_folder(source)) is not None:
        return check_pipeline(folder)
    if (name := hub_name(source)) is None:
        raise UserError("no such folder")
    from huggingface_hub import snapshot_download

    reasons = []  # why the Hub could not be reached

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        offline = bool(reasons)
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
        except Exception as error:  # network, name and permission errors have no common class
            reasons.append(one_line(error))
            if not offline:
                return fetch(revision, patterns)  # from the cache
            if not hasattr(error, "snapshot_path"):  # the cache has nothing of it
                raise UserError(f"neither a pipeline folder nor a reachable Hub id: {reasons[0]}") from None
            return Path(error.snapshot_path)

    folder = fetch(source.removeprefix(name).removeprefix("@") or None, list(SETTINGS_FILES))
    try:
        check_pipeline(folder)
        parts = [part for part in STEMS if (folder / part).is_dir()]
        for part in parts if DENOISER in parts else [""]:
            stem = STEMS.get(part, STEM)
            for form in FORMS if part in (DENOISER, "") else FORMS[:-1]:
                # config.json is asked for too: the Hub's client warns where no file fits
                fetch(folder.name, [str(Path(part, file)) for file in ("config.json", *(stem + end for end in form))])
                if has_weights(folder / part, stem):
                    break
            weights_files(folder / part, stem)
    except UserError as error:
        why = f"; the Hub's cache does not hold all of it, and the rest cannot be had: {reasons[0]}" if reasons else ""
        raise UserError(f"{error}{why}") from None
    return folder
