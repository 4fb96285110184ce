"""LoRA files: read under the key names of diffusers, PEFT and kohya; written for diffusers, or for ComfyUI and A1111.

Layers are named as in a pipeline's folder: unet.down_blocks.0.attentions.0…, transformer.transformer_blocks.0… or
text_encoder.text_model.encoder…
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from deme.config.paths import SUBFOLDERS, UNET
from deme.errors import UserError, blaming, naming
from deme.method.lora import Changed, Factors, Lora
from deme.method.task_vectors import FLOATS, Tensors
from deme.models.lora_settings import PEFT, named_base, read_configs, read_header, scale_of
from deme.models.original_names import unet_names
from deme.models.pipelines import STEMS, denoiser_folder, read_schedule
from deme.models.schedules import check_header
from deme.models.weights import load_tensors, save_tensors, weights_hash

FACTORS = {  # how the names of a layer's tensors end
    ".lora_A.weight": "down",  # PEFT, and diffusers since
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",  # diffusers before PEFT
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
OTHERS = {  # what no sum of products of two factors is
    r"dora_scale$|lora_magnitude_vector": "DoRA, which also scales the columns of the merged weight",
    r"lora_mid": "a product of three factors",
    r"hada_w|lokr_w": "LoHa or LoKr",
    r"\.bias$|\.diff_b$|lora_B\.bias": "a trained bias",
    r"\.diff$|modules_to_save": "a layer that was trained as a whole",
    r"lora_embedding": "a LoRA of an embedding",
}
KOHYA = {
    UNET: ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}  # prefixes
TEXT_MODEL = "text_model."  # begins the names in a CLIP text encoder, but for transformers 5 and later
T = TypeVar("T")
ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.default(_\d+)?(?=\.weight$)")  # in the names of PEFT's own modules
OLD_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)$")  # of diffusers before PEFT


def weights_of(pipeline: Path) -> dict[str, torch.Tensor]:
    """The weights that a LoRA can change, of a pipeline's denoiser and text encoders, by layer, memory-mapped."""
    found = {}
    for part, stem in STEMS.items():
        if part != "vae" and (pipeline / part).is_dir():
            tensors = load_tensors(pipeline / part, stem)
            for name, tensor in tensors.items():
                if name.endswith(".weight") and tensor.dim() > 1:
                    is_bare = part not in SUBFOLDERS and not name.startswith((TEXT_MODEL, "text_projection."))
                    found[f"{part}.{TEXT_MODEL * is_bare}{name.removesuffix('.weight')}"] = tensor
    return found


def layers_of(pipeline: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of these weights."""
    return {layer: tuple(tensor.shape) for layer, tensor in weights_of(pipeline).items()}


def in_denoiser(layer: str) -> str | None:
    """A layer's name in the denoiser; None if it is of another part."""
    part, _, name = layer.partition(".")
    return name if part in SUBFOLDERS else None


def tensor_of(layer: str) -> str:
    """The name of a layer's weight, as name patterns fit it: without the denoiser's folder."""
    return f"{in_denoiser(layer) or layer}.weight"


def by_tensor(layers: Mapping[str, T]) -> dict[str, T]:
    """The same by the names of the layers' weights."""
    return {tensor_of(layer): value for layer, value in layers.items()}


def folded(pretrained: Tensors, lora: Lora) -> Changed:
    """The denoiser's tensors with a LoRA's changes added."""
    changes = by_tensor(lora)
    if others := changes.keys() - pretrained.keys():
        raise UserError(f"changes {min(others)}, which is not of the denoiser: merge.into=lora keeps it")
    return Changed(pretrained, changes)


def read_loras(pipeline: Path, files: Sequence[Path]) -> dict[str, dict[str, Factors]]:
    """The LoRAs in files, by path; one whose header names another base or prediction than the pipeline's is refused."""
    layers, base, loras = layers_of(pipeline), functools.cache(weights_hash), {}
    schedule = read_schedule(pipeline)
    for file in files:
        header = read_header(file)
        with naming(file):
            named = named_base(header)
            if named is not None and named != base(denoiser_folder(pipeline)):
                raise UserError(f"its header names another base than model.pretrained, of the SHA-256 {named}")
            check_header(header, schedule, "model.pretrained", is_lora=True)
        loras[str(file)] = read_lora(file, layers)
    return loras


def read_lora(file: Path, layers: Mapping[str, tuple[int, ...]]) -> dict[str, Factors]:
    """The LoRA in a file, in float32, on a network whose layers have these shapes of weights.

    A key that is no factor of a LoRA, or that no layer of the network answers to, is refused by name.
    """
    with blaming(f"{file}: cannot be read"):
        tensors = load_file(file)
    header, answers = read_header(file), names_in_files(layers)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with naming(file):
        if tensors and not any(re.search("lora|hada_w|lokr_w", key) for key in tensors):
            raise UserError("holds no LoRA; a network is named by its folder")
        for key, tensor in tensors.items():
            stem, kind = split_key(key)
            layer = answers.get(stem)
            if layer is None:
                raise UserError(f"{key}: the network has no layer {stem}")
            if kind in parts.setdefault(layer, {}):
                raise UserError(f"{key}: a second factor of {layer}")
            if kind == "alpha" and tensor.numel() != 1:
                raise UserError(f"{key}: holds {tensor.numel()} numbers, not one")
            if tensor.dtype not in FLOATS and (kind != "alpha" or tensor.is_complex()):  # an alpha may be an integer
                raise UserError(f"{key}: of the type {str(tensor.dtype).removeprefix('torch.')}")
            parts[layer][kind] = tensor.float()
        if not parts:
            raise UserError("holds no tensor")
        configs = read_configs(file, header, tensors)
        return {layer: factors_of(layer, given, layers[layer], configs) for layer, given in sorted(parts.items())}


def split_key(key: str) -> tuple[str, str]:
    """The layer's name as the file writes it, and which tensor of it a key names: down, up or alpha."""
    plain = ADAPTER_NAME.sub("", key)
    for suffix, kind in FACTORS.items():
        if plain.endswith(suffix):
            stem = plain.removesuffix(suffix).removeprefix(PEFT)
            return OLD_PROCESSOR.sub(lambda match: f".{match[1]}{'.0' * (match[1] == 'to_out')}", stem), kind
    for pattern, what in OTHERS.items():
        if re.search(pattern, key):
            raise UserError(f"{key}: {what}, which is not merged")
    raise UserError(f"{key}: not a factor of a LoRA")


def factors_of(
    layer: str, given: Mapping[str, torch.Tensor], shape: tuple[int, ...], configs: Mapping[str, dict[str, Any]]
) -> Factors:
    """A layer's factors with the scale in `up`, which fit the shape of its weight."""
    if not {"down", "up"} <= given.keys():
        raise UserError(f"{layer}: has one of its two factors, or only an alpha")
    down, up = given["down"], given["up"].flatten(1)
    if down.shape[1:2] == shape[1:2] and {*down.shape[2:], *shape[2:]} <= {1}:  # a 1×1 convolution is a linear layer
        down = down.reshape(len(down), *shape[1:])
    if len(down) == 0 or (len(given["up"]), *down.shape[1:]) != shape or given["up"].numel() != shape[0] * len(down):
        shapes = f"{tuple(given['up'].shape)} and {tuple(down.shape)}"
        raise UserError(f"{layer}: factors of the shapes {shapes} for a weight of the shape {shape}")
    if "alpha" in given:
        scale = given["alpha"].item() / len(down)
    else:
        part, _, name = layer.partition(".")
        with naming(layer):
            scale = scale_of(part, name, len(down), configs)
    if not math.isfinite(scale):
        raise UserError(f"{layer}: alpha is not finite")
    return Factors(down, scale * up)


def names_in_files(layers: Iterable[str]) -> dict[str, str]:
    """The layers of a network by all names that files have for them: those of diffusers, PEFT and kohya."""
    layers, answers = list(layers), {}
    original = original_names(layers)
    for layer in layers:
        part, _, rest = layer.partition(".")
        names = [f"{part}.{rest.removeprefix(TEXT_MODEL)}", layer]
        names += [begin + rest.replace(".", "_") for begin in KOHYA.get(part, ())]
        names += [rest] if part in SUBFOLDERS else []
        names += [KOHYA[part][0] + original[layer].replace(".", "_")] if part == UNET else []
        answers |= dict.fromkeys(names, layer)
    return answers


def kohya_names(layers: Iterable[str]) -> dict[str, str]:
    """What kohya's programs and ComfyUI call a network's layers: Stable Diffusion XL's UNet has its original names."""
    layers = list(layers)
    is_xl = any(layer.startswith("text_encoder_2.") for layer in layers)
    original = original_names(layers) if is_xl else {}
    found = {}
    for layer in layers:
        part, _, rest = layer.partition(".")
        if part not in KOHYA:
            raise UserError(f"has no known name for {layer}, which is of no UNet")
        found[layer] = KOHYA[part][-1 if is_xl else 0] + original.get(layer, rest).replace(".", "_")
    return found


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """The original names of a UNet's layers."""
    rests = {layer: layer.removeprefix(f"{UNET}.") for layer in layers if layer.startswith(f"{UNET}.")}
    names = unet_names(rests.values())
    return {layer: names[rest] for layer, rest in rests.items()}


def write_lora(file: Path, lora: Lora, made_from: Mapping[str, Any], kohya: Mapping[str, str] | None = None) -> None:
    """Write a LoRA in float32, under diffusers' names or those of `kohya_names`; the header says what it is made from.

    All layers get the same rank: diffusers takes one alpha for all layers, of kohya's files (0.42) and, in older
    versions, of its own.
    """
    header = {"format": "pt", **{key: json.dumps(value, ensure_ascii=False) for key, value in made_from.items()}}
    tensors, rank = {}, max(factors.rank for factors in lora.values())
    for layer, factors in lora.items():
        factors = factors.padded(rank)
        up = factors.up.reshape(*factors.up.shape, *[1] * (factors.down.dim() - 2))  # a convolution's is one of 1×1
        if kohya is not None:
            name = kohya[layer]
            tensors |= {f"{name}.lora_down.weight": factors.down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
        else:
            tensors |= {f"{layer}.lora_A.weight": factors.down, f"{layer}.lora_B.weight": up}
    save_tensors(tensors, file, header)
