"""The weights in a network's folder, in every form that the Hub has them: read once, by name, without unpickling code.

safetensors in one file or in several with an index, in full or half precision, or a `.bin`; under today's names or
those of diffusers up to 0.15. Only files are looked at: torch is imported where tensors are read, diffusers not at all.
"""

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from deme.errors import UserError, one_line
from deme.job.files import read_json, sha256

if TYPE_CHECKING:
    import torch

STEM = "diffusion_pytorch_model"  # how the names of the files begin
WEIGHTS = f"{STEM}.safetensors"
PICKLED_WEIGHTS = f"{STEM}.bin"
FORMS = (  # in the order in which they are looked for, behind the stem: a file, or an index that names several
    (".safetensors", ".safetensors.index.json"),
    (".fp16.safetensors", ".safetensors.index.fp16.json"),
    (".bin", None),
)
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # up to diffusers 0.15
OLD_ATTENTION_NAME = re.compile(rf"(?<=\.)({'|'.join(ATTENTION_NAMES)})(?=\.(weight|bias)$)")


def weights_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The files that hold the weights of a network's folder: one, or those that an index names.

    Args:
        stem: how their names begin.
    """
    for name, index_name in FORMS:
        file = folder / f"{stem}{name}"
        index = None if index_name is None else folder / f"{stem}{index_name}"
        if index is not None and index.is_file():
            if file.is_file():
                raise UserError(f"{index}: stands beside {file.name}; delete the one that does not count")
            return _indexed(index)
        if file.is_file():
            return [file]
    raise UserError(f"{folder / stem}.safetensors: missing")


def has_weights(folder: Path) -> bool:
    """Whether a network's folder has weights, in any form; what is damaged or cut short shows when they are read."""
    return any((folder / f"{STEM}{name}").is_file() for form in FORMS for name in form if name is not None)


def is_whole(folder: Path, stem: str = STEM) -> bool:
    """Whether `weights_files` finds them."""
    try:
        return bool(weights_files(folder, stem))
    except UserError:
        return False


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, in their order."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: names no files of weights")
    files = [index.with_name(Path(name).name) for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing; {index.name} names it")
    return files


def weights_hash(folder: Path) -> str:
    """What tells a folder's weights from all others: the SHA-256 of their file, or that of those of several."""
    hashes = [sha256(file) for file in weights_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_tensors(folder: Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a network's folder under today's names, memory-mapped from the files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weights_files(folder):
        try:
            tensors |= {todays_name(name): tensor for name, tensor in _read(file).items()}
        except Exception as error:  # a damaged file leads to errors of zip, pickle, safetensors and torch
            raise UserError(f"{file}: cannot be read: {one_line(error)}") from None
    return tensors


def _read(file: Path) -> dict[str, "torch.Tensor"]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    return torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)


def todays_name(name: str) -> str:
    """A tensor's name in a UNet of today's diffusers, from that or from the name up to 0.15 (attention layers)."""
    return OLD_ATTENTION_NAME.sub(lambda found: ATTENTION_NAMES[found[1]], name)


def write_unet(folder: Path, tensors: dict[str, "torch.Tensor"], config: dict) -> None:
    """Write a UNet's folder.

    Args:
        config: the content of its config.json.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
