"""The content of JSON and YAML files, checked against types before anything uses it."""

import math
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from deme.errors import UserError

LARGEST = 1e38  # of a number: a larger one is damage, and fits neither float32 nor a plot
NAMES = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}
NAMES |= {list: "a list", dict: "a mapping"}
_hints = cache(get_type_hints)


def checked(value: Any, kind: Any, name: str = "") -> Any:
    """A value of a type, with finite numbers. A truth value is no number, and a number no text.

    Args:
        kind: str, int, float, bool, a dataclass of such, or list[T], dict[str, T], T | None of them. A dataclass is
            made of a mapping: other keys are ignored, and what may be None or has a default may be missing.
        name: of the value, for messages.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None else checked(value, parts[0], name)
    if origin is list:
        _check(isinstance(value, list), list, name)
        return [checked(part, parts[0], f"{name}[{i}]") for i, part in enumerate(value)]
    if origin is dict:
        _check(isinstance(value, dict), dict, name)
        return {checked(key, str, f"{name}: a key"): checked(value[key], parts[1], f"{name}.{key}") for key in value}
    if is_dataclass(kind):
        _check(isinstance(value, dict), dict, name)
        return _made(kind, value, name)
    if kind is float and type(value) is int and abs(value) < LARGEST:
        value = float(value)
    _check(type(value) is kind, kind, name)
    if kind in (int, float):
        _check(abs(value) < LARGEST and math.isfinite(value), kind, name)
    if kind is str:  # JSON may hold halves of a character, which no file takes
        _check(value.encode(errors="ignore").decode() == value, kind, name)
    return value


def _check(fits: bool, kind: type, name: str) -> None:
    if not fits:
        raise UserError(f"{name or 'it'} is not {NAMES[kind]}")


def _made(kind: type, given: dict, name: str) -> Any:
    prefix = f"{name}." if name else ""
    values = {}
    for field in fields(kind):
        hint = _hints(kind)[field.name]
        if field.name in given or (get_origin(hint) is UnionType and field.default is MISSING):
            values[field.name] = checked(given.get(field.name), hint, prefix + field.name)
        elif field.default is MISSING:
            raise UserError(f"{prefix}{field.name} is missing")
    return kind(**values)
