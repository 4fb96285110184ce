"""The weights in a network's folder, in every form that the Hub has them, read without running code.

torch is imported only to read tensors.
"""

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from deme.config.paths import DENOISER
from deme.errors import UserError, blaming
from deme.job.files import checked, read_json, sha256

STEM = "diffusion_pytorch_model"  # the files' names begin with it
WEIGHTS = f"{STEM}.safetensors"
PICKLED_WEIGHTS = f"{STEM}.bin"
FORMS = (  # in order of preference, after the stem: a file, or an index of shards and their names
    (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors"),
    (".fp16.safetensors", ".safetensors.index.fp16.json", ".fp16-*-of-*.safetensors", "-*-of-*.fp16.safetensors"),
    (".bin", ".bin.index.json", "-*-of-*.bin"),
)
STEMS = {DENOISER: STEM, "vae": STEM, "text_encoder": "model"}  # of a pipeline's parts that have weights
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
