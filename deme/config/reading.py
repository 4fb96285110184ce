"""Reading a configuration: one YAML file plus `section.key=value` overrides, into frozen dataclasses.

OmegaConf checks keys and types; every mistake is a `UserError` of one line that names the key and its value.
"""

import re
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deme.config.experiment import Config
from deme.errors import UserError, one_line, shown

for resolver in ("oc.env", "oc.decode", "oc.deprecated"):  # a secret in the environment must not get into a record
    OmegaConf.clear_resolver(resolver)

PRECISION_KEYS = ("pretrain.mixed_precision", "finetune.mixed_precision", "sample.mixed_precision")
PRECISION_KEYS += ("evaluate.classifier_precision",)


def load_config(file: str | Path, overrides: list[str]) -> Config:
    """Read `file` and apply `overrides` (`section.key=value`, the value in YAML).

    Raises:
        UserError: unreadable file, unknown key, wrong type or a value out of bounds.
    """
    values = {override: _value(override) for override in overrides}
    given = OmegaConf.create({})
    try:
        content = OmegaConf.load(file)
        if not OmegaConf.is_dict(content):
            raise UserError(f"--config {file}: not a YAML mapping")
        given = content
        for override, value in values.items():  # a list or mapping replaces the file's, it is not merged into it
            try:
                OmegaConf.update(given, override.split("=", 1)[0], value, merge=False, force_add=True)
            except (ValueError, TypeError, IndexError, OmegaConfBaseException):  # below a value without such keys
                parent = override.split("=", 1)[0].rpartition(".")[0]
                raise UserError(f"{override}: can't be set in {parent}={_raw(given, parent)}") from None
        for field in fields(Config):
            if is_dataclass(field.default_factory) and field.name in given and not OmegaConf.is_dict(given[field.name]):
                raise UserError(f"{field.name}={shown(given[field.name])}: not a mapping")
        for key in PRECISION_KEYS:
            if OmegaConf.select(given, key) is False:
                OmegaConf.update(given, key, "no")  # which YAML reads as false
        config = OmegaConf.to_object(OmegaConf.merge(_defaults(), given))
        _check_texts("", asdict(config))
        return config
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: {one_line(error)}") from None
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        key = error.full_key
        value = _raw(given, key)
        raise UserError(f"{key}={shown(value)}: {message}" if key else message) from None
    except TypeError as error:  # a mapping for a list, or the reverse: OmegaConf does not say where
        raise UserError(f"{_first_misfit(given)}: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, AssertionError) as error:
        raise UserError(f"--config {file}: {one_line(error)}") from None


def _check_texts(key: str, value: Any) -> None:
    """Look through all values.

    Raises:
        UserError: a text that no file can be named by; names its key.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            _check_texts(f"{key}.{name}" if key else str(name), part)
    elif isinstance(value, list):
        for part in value:
            _check_texts(key, part)
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{key}={value!a}: holds a character that no file can be named by")


def _value(override: str) -> Any:
    """The value of an override as YAML gives it.

    Raises:
        UserError: not an override.
    """
    key, _, text = override.partition("=")
    if not key or "=" not in override:
        raise UserError(f"{override}: overrides are written section.key=value")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{override}: not YAML: {getattr(error, 'problem', None) or one_line(error)}") from None


def _raw(given: Any, key: str | None) -> Any:
    """The value of a key as it was written, interpolations left as they are; None where there is none."""
    value = OmegaConf.to_container(given)
    for part in re.findall(r"[^.\[\]]+", key or ""):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _first_misfit(given: Any) -> str:
    """`section.key=value` of the first setting whose container is of another kind than the dataclass's."""
    for section, settings in given.items():
        for key, value in settings.items() if OmegaConf.is_dict(settings) else ():
            try:
                OmegaConf.merge(_defaults(), {section: {key: value}})
            except TypeError:
                return f"{section}.{key}={value}"
            except OmegaConfBaseException:  # another mistake, which is named once this one is mended
                continue
    return "--config"


@cache
def _defaults() -> Any:
    """All of them, to merge with: OmegaConf makes nodes of frozen dataclasses read-only, and merging needs others."""
    node = OmegaConf.structured(Config())
    for part in (node, *(node[key] for key in node if OmegaConf.is_config(node[key]))):
        OmegaConf.set_readonly(part, False)
    return node
