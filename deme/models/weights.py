"""The weights of a network's folder, in every form that the Hub has them, read without running code.

Only reading tensors imports torch.
"""

import functools
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme.config.paths import STEM
from deme.errors import UserError, blaming
from deme.job.files import checked, read_json, sha256

WEIGHTS = f"{STEM}.safetensors"
VARIANTS = ("fp16", "bf16")  # of half precision, in files' names
FORMS = (  # in order of preference, after the stem: a file, or an index of shards and their names
    (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors"),
    *(
        (
            f".{half}.safetensors",
            f".safetensors.index.{half}.json",
            f".{half}-*-of-*.safetensors",
            f"-*-of-*.{half}.safetensors",
        )
        for half in VARIANTS
    ),
    (".bin", ".bin.index.json", "-*-of-*.bin"),
)
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # up to diffusers 0.15
OLD_ATTENTION_NAME = re.compile(rf"(?<=\.)({'|'.join(ATTENTION_NAMES)})(?=\.(weight|bias)$)")
todays_name = functools.partial(OLD_ATTENTION_NAME.sub, lambda match: ATTENTION_NAMES[match[1]])


def weights_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The files of the weights in a network's folder: one, or the shards that an index names; or a file itself."""
    if folder.is_file():
        return [folder]
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
    """True if a network's folder has weights in any form, also damaged or incomplete ones, or if a file is there."""
    return folder.is_file() or any((folder / f"{stem}{name}").is_file() for form in FORMS for name in form[:2])


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights in a network's folder: of the file, or of its shards' SHA-256."""
    hashes = [sha256(file) for file in weights_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_tensors(folder: Path, stem: str = STEM) -> dict[str, Any]:
    """The tensors of a network's folder under today's names, memory-mapped."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in weights_files(folder, stem):
        with blaming(f"{file}: cannot be read"):
            if file.suffix == ".safetensors":
                content = load_file(file)
            else:
                content = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
                content = detached(content)
            tensors |= {todays_name(name): tensor for name, tensor in content.items()}
    return tensors


def detached(content: Any) -> dict[str, Any]:
    """The tensors of a pickle, which may be parameters; anything but a mapping of names to tensors is refused."""
    import torch

    if not isinstance(content, dict):
        raise UserError(f"of the type {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name}: of the type {type(value).__name__}, not a tensor")
    return {name: tensor.detach() for name, tensor in content.items()}


def save_tensors(tensors: Mapping[str, Any], file: Path, header: dict[str, str]) -> None:
    """Write a safetensors file; the same tensors and header give the same bytes.

    safetensors orders a header's entries at random, so that files of the same content would have different hashes.
    """
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, header)
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        content = json.loads(opened.read(size))
        content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
        ordered = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= size:  # else safetensors has written it in another form: the file stays as it is
            opened.seek(8)
            opened.write(ordered.ljust(size))
