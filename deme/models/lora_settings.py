"""What a LoRA's file says beside its factors: the scale and the base, in its header or in PEFT's configuration."""

import json
import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open

from deme.config.paths import PEFT_LORA
from deme.errors import UserError, blaming, naming
from deme.job.files import checked, read_json
from deme.models.pipelines import STEMS

PEFT = "base_model.model."  # begins the names in a PEFT adapter's file
CONFIG = "adapter_config.json"  # beside it
METADATA = "lora_adapter_metadata"  # key of a header, of diffusers: PEFT's configuration
ALPHAS = ("lora_alpha", "network_alpha", "alpha")  # keys of others' headers
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations of PEFT that also change the base


def read_names(file: Path) -> tuple[dict[str, str], list[str]]:
    """The metadata of a safetensors file, and the names of its tensors."""
    with blaming(f"{file}: cannot be read"), safe_open(file, "np") as opened:
        return opened.metadata() or {}, list(opened.keys())


def read_header(file: Path) -> dict[str, str]:
    """The metadata alone."""
    return read_names(file)[0]


def named_base(header: Mapping[str, str]) -> str | None:
    """The SHA-256 of a LoRA's base, if its header names one as `write_lora` does."""
    with suppress(ValueError, TypeError, LookupError):
        return json.loads(header["pretrained"])["sha256"]
    return None


def config_beside(file: Path, header: Mapping[str, str], keys: Collection[str]) -> Path | None:
    """PEFT's configuration that is read with a LoRA, from beside its file: that of an adapter without one inside."""
    is_read = METADATA not in header and (file.name == PEFT_LORA or any(key.startswith(PEFT) for key in keys))
    config = file.with_name(CONFIG)
    return config if is_read and config.is_file() else None


def read_configs(file: Path, header: Mapping[str, str], keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by part of the pipeline, "" for all; empty if the scale is 1 wherever no tensor says it.

    It is in the header, or in adapter_config.json beside a file with these keys. Other headers may name alpha alone.
    """
    configs: dict[str, dict[str, Any]] = {}
    if METADATA in header:
        configs = by_part(read_metadata(header))
    elif (beside := config_beside(file, header, keys)) is not None:
        configs[""] = read_json(beside)
    elif not any(key.endswith(".alpha") for key in keys):
        configs = named_alphas(header)
        if not configs and any(key.startswith(PEFT) for key in keys):
            raise UserError(f"a PEFT adapter of unknown lora_alpha: {CONFIG} is missing beside it")
    for config in configs.values():
        begun = config.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(CHANGED_BASE):
            raise UserError(f"init_lora_weights={begun}: its base is not the pretrained network")
        for key, value in config.items():
            if value is True and key.startswith(("use_", "lora_bias")) and key != "use_rslora":
                raise UserError(f"{key}=true: is not merged")
    return configs


def is_read_anew(file: Path) -> bool:
    """True if a LoRA's scale is in its header, where versions before 0.2.0 did not look for it."""
    header, keys = read_names(file)
    with naming(file):
        if METADATA in header:
            return any(map(is_config, read_metadata(header).values()))
        is_elsewhere = config_beside(file, header, keys) or any(key.endswith(".alpha") for key in keys)
        return not is_elsewhere and bool(named_alphas(header))


def read_metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration in a header, as it is written."""
    with blaming(f"{METADATA} in its header"):
        given = checked(json.loads(header[METADATA]), dict[str, Any], "it")
        if not given:
            raise UserError("is empty")
    return given


def is_config(value: Any) -> bool:
    """True if a value in METADATA is a configuration of its own."""
    return isinstance(value, dict) and "lora_alpha" in value


def by_part(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by part of the pipeline, "" for all.

    A pipeline of diffusers writes unet.r, unet.lora_alpha, …; a network r, lora_alpha, …. Others write one mapping for
    each part, or one under the adapter's name.
    """
    configs: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        if is_config(value):
            part = key if key in STEMS else ""
            if part in configs:
                raise UserError(f"{key}: a second configuration of the same layers")
            configs[part] = value
        else:
            part, _, name = key.rpartition(".")
            configs.setdefault(part, {})[name] = value
    return configs


def named_alphas(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The alpha that a header names, as PEFT's configuration by part.

    kohya's ss_network_alpha does not count: without a tensor of alpha its programs take the scale 1, too.
    """
    configs: dict[str, dict[str, Any]] = {}
    for key, value in sorted(header.items()):
        part, _, name = key.rpartition(".")
        if part in ("", *STEMS) and name in ALPHAS:
            with blaming(f"{key}={value} in its header"):
                alpha = checked(float(value), float)
            if configs.setdefault(part, {"lora_alpha": alpha})["lora_alpha"] != alpha:
                raise UserError(f"{key}={value} in its header, which also has the alpha {configs[part]['lora_alpha']}")
    return configs


def scale_of(part: str, name: str, rank: int, configs: Mapping[str, Mapping[str, Any]]) -> float:
    """s = alpha / r, or alpha / √r for rsLoRA (Kalajdzievski 2023), as PEFT takes it for a module; 1 without configs.

    Args:
        part: of the pipeline, in which the module has this name.
    """
    if not configs:
        return 1.0
    config = configs.get(part, configs.get("", {}))
    given = of_module(config, "r", "rank_pattern", name)
    if isinstance(given, int) and given != rank:
        raise UserError(f"has the rank {rank}, but r={given} in its configuration, which may be another adapter's")
    alpha = of_module(config, "lora_alpha", "alpha_pattern", name)
    return checked(alpha, float, f"lora_alpha of {part}") / (math.sqrt(rank) if config.get("use_rslora") else rank)


def of_module(config: Mapping[str, Any], key: str, patterns: str, name: str) -> Any:
    """What PEFT's configuration says of a module, by the first name pattern that fits it."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", name):
            return value
    return config.get(key)
