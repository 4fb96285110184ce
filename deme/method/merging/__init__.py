"""Merge methods, one file each: NAME.py holds the class of that name in CamelCase, whose fields are its settings."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deme.errors import UserError
from deme.method.task_vectors import MergeMethod


def merge_method(name: str, settings: Mapping[str, Any]) -> MergeMethod:
    """The merge method in the file of this name, with the settings in merge.settings."""
    kind = getattr(import_module(f"{__name__}.{name}"), name.title().replace("_", ""))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(settings)))
    except OmegaConfBaseException as error:
        key, rule = error.full_key, str(error).splitlines()[0]
        raise UserError(f"merge.settings.{key}={settings.get(key)}: {rule}") from None
    except UserError as error:  # of the class itself
        raise UserError(f"merge.settings.{error}") from None
