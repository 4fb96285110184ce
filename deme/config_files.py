"""Reading a configuration: one YAML file plus `section.key=value` overrides, into the frozen dataclasses of config.py.

OmegaConf checks keys and types; every mistake is a `UserError` of one line that names the key and its value.
"""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deme.config import Config, UserError

PRECISION_KEYS = ("pretrain.mixed_precision", "finetune.mixed_precision", "sample.mixed_precision")
PRECISION_KEYS += ("evaluate.classifier_precision",)


def load_config(file: str | Path, overrides: list[str]) -> Config:
    """Read `file` and apply `overrides` (`section.key=value`, the value in YAML).

    Raises:
        UserError: unreadable file, unknown key, wrong type or a value out of bounds.
    """
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override}: overrides are written section.key=value")
        try:
            yaml.safe_load(override.split("=", 1)[1])
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{override}: not YAML: {getattr(error, 'problem', error)}") from None
    given = OmegaConf.create({})
    try:
        content = OmegaConf.load(file)
        if not OmegaConf.is_dict(content):
            raise UserError(f"--config {file}: not a YAML mapping")
        given = content
        for override in overrides:  # a list or mapping replaces the file's, it is not merged into it
            key = override.split("=", 1)[0]
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            try:
                OmegaConf.update(given, key, value, merge=False, force_add=True)
            except (ValueError, TypeError) as error:  # a key below a value that has none
                raise UserError(f"{override}: {error}") from None
        for key in PRECISION_KEYS:
            if OmegaConf.select(given, key) is False:
                OmegaConf.update(given, key, "no")  # which YAML reads as false
        return OmegaConf.to_object(OmegaConf.merge(_writable(Config()), given))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: {error}") from None
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        key = error.full_key
        value = OmegaConf.select(given, key, throw_on_resolution_failure=False) if key else None
        raise UserError(f"{key}={value}: {message}" if key else message) from None
    except TypeError as error:  # a mapping for a list, or the reverse: OmegaConf does not say where
        raise UserError(f"{_first_misfit(given)}: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"--config {file}: {' '.join(str(error).split())}") from None


def _first_misfit(given: Any) -> str:
    """`section.key=value` of the first setting whose container is of another kind than the dataclass's."""
    for section, settings in given.items():
        for key, value in settings.items() if OmegaConf.is_dict(settings) else ():
            try:
                OmegaConf.merge(_writable(Config()), {section: {key: value}})
            except TypeError:
                return f"{section}.{key}={value}"
            except OmegaConfBaseException:  # another mistake, which is named once this one is mended
                continue
    return "--config"


def _writable(defaults: Config) -> Any:
    """OmegaConf makes nodes of frozen dataclasses read-only; merging needs them writable."""
    node = OmegaConf.structured(defaults)
    for part in (node, *(node[key] for key in node if OmegaConf.is_config(node[key]))):
        OmegaConf.set_readonly(part, False)
    return node
