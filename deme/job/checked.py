"""What JSON and YAML files hold, checked against types before anything uses it."""

import math
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from deme.errors import UserError

LARGEST = 1e38  # of a number: what is larger is damage, and neither float32 nor a plot holds it
NAMES = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}


def checked(value: Any, kind: Any, name: str = "") -> Any:
    """A value as a type has it, whose numbers are finite: a truth value is no number, and a number no text.

    Args:
        kind: str, int, float, bool, a dataclass of such, which is made of a mapping whose other keys are passed over,
            or list[T], dict[str, T], T | None of them; the mapping may lack what may be None or has a default.
        name: of the value, for messages.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None else checked(value, parts[0], name)
    if origin is list:
        return [checked(part, parts[0], f"{name}[{i}]") for i, part in enumerate(_only(value, list, "a list", name))]
    if origin is dict:
        found = _only(value, dict, "a mapping", name)
        return {checked(key, str, f"{name}: a key"): checked(found[key], parts[1], f"{name}.{key}") for key in found}
    if is_dataclass(kind):
        return _made(kind, _only(value, dict, "a mapping", name), name)
    if kind is float and type(value) is int and abs(value) < LARGEST:
        return float(value)
    fits = type(value) is kind
    if fits and kind in (int, float):
        fits = abs(value) < LARGEST and math.isfinite(value)
    if not fits or (kind is str and not _is_encodable(value)):
        raise UserError(f"{name or 'it'} is not {NAMES[kind]}")
    return value


def _only(value: Any, kind: type, called: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{name or 'it'} is not {called}")
    return value


def _made(kind: type, found: dict, name: str) -> Any:
    prefix = f"{name}." if name else ""
    values = {}
    for field in fields(kind):
        hint = _hints(kind)[field.name]
        if field.name in found or (get_origin(hint) is UnionType and field.default is MISSING):
            values[field.name] = checked(found.get(field.name), hint, prefix + field.name)
        elif field.default is MISSING:
            raise UserError(f"{prefix}{field.name} is missing")
    return kind(**values)


_hints = cache(get_type_hints)


def _is_encodable(text: str) -> bool:
    """Whether it is Unicode: JSON may hold halves of a character, which no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
