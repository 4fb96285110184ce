"""Reading a configuration: one YAML file plus `section.key=value` overrides, into frozen dataclasses.

OmegaConf checks keys and types; every mistake is a `UserError` of one line that names the key and its value.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deme.config.experiment import Config
from deme.config.section import Section
from deme.errors import UserError, blaming, naming, one_line, shown

for resolver in ("oc.env", "oc.decode", "oc.deprecated"):  # a secret in the environment must not get into a record
    OmegaConf.clear_resolver(resolver)

Kind = TypeVar("Kind", bound=Section)
DEEPEST = 40  # mappings and lists inside of each other
MOST_VALUES = 1_000_000
TEXTS = (str, str | None, list[str], list[str] | None)
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
READING_ERRORS = (yaml.YAMLError, ValueError, TypeError, OverflowError, AssertionError, AttributeError)
READING_ERRORS += (OmegaConfBaseException,)


def load_config(file: str | Path, overrides: list[str], kind: type[Kind] = Config) -> Kind:
    """Read a configuration of this kind from `file` and apply `overrides` (`section.key=value`, the value in YAML)."""
    values = {override: read_override(override, kind) for override in overrides}
    given = read_mapping(file, kind)
    try:
        for override, value in values.items():  # a list or mapping replaces the file's, it is not merged into it
            key = override.partition("=")[0]
            try:
                OmegaConf.update(given, key, value, merge=False, force_add=True)
            except (ValueError, TypeError, IndexError, OmegaConfBaseException):  # below a value without such keys
                parent = key.rpartition(".")[0]
                raise UserError(f"{override}: can't be set in {parent}={_raw(given, parent)}") from None
        for key in OmegaConf.missing_keys(given):
            raise UserError(f"{key}=???: has no value")
        for field in fields(kind):
            is_mapping = is_dataclass(field.default_factory) or field.default_factory is dict
            if is_mapping and field.name in given and not OmegaConf.is_dict(given[field.name]):
                raise UserError(f"{field.name}={shown(given[field.name])}: not a mapping")
        return OmegaConf.to_object(OmegaConf.merge(_defaults(kind), given)).at_home()
    except OmegaConfBaseException as error:
        message, key = str(error).splitlines()[0], error.full_key
        raise UserError(f"{key}={shown(_raw(given, key))}: {message}" if key else message) from None
    except TypeError as error:  # a mapping for a list, or the reverse: OmegaConf does not say where
        raise UserError(f"{_first_misfit(given, kind)}: {error}") from None
    except (ValueError, OverflowError, RecursionError, AssertionError) as error:
        raise UserError(f"--config {file}: {one_line(error)}") from None


def read_mapping(file: str | Path, kind: type[Section] = Config) -> Any:
    """The mapping in a YAML file that holds a configuration of this kind, as an OmegaConf node."""
    with blaming(f"--config {file}"):  # not there, not UTF-8, no such user
        text = Path(file).expanduser().read_text(encoding="utf-8")
    with naming(f"--config {file}"):
        return OmegaConf.create(_values(text, kind))


@cache
def _values(text: str, kind: type[Section]) -> dict:
    """The plain values of a configuration's text, as OmegaConf reads it: ${…} as it stands."""
    node = checked_yaml(text)
    with _naming_the_place():
        content = OmegaConf.to_container(OmegaConf.create(text))
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode | None):
        raise UserError("not a YAML mapping")
    return _as_written(content, node, kind)


def _as_written(value: Any, node: yaml.Node | None, kind: Any) -> Any:
    """A value of this type; what YAML takes for numbers or truth values in its texts stands there as it is written."""
    if is_dataclass(kind) and isinstance(node, yaml.MappingNode):
        types = {part.name: part.type for part in fields(kind)}
        written = {key.value: part for key, part in node.value if key.value in types}
        return value | {name: _as_written(value[name], part, types[name]) for name, part in written.items()}
    if kind not in TEXTS:
        check_numbers(node)
        return value
    if isinstance(value, list) and isinstance(node, yaml.SequenceNode):
        return [_as_written(part, written, str) for part, written in zip(value, node.value, strict=True)]
    return node.value if isinstance(value, bool | int | float) and isinstance(node, yaml.ScalarNode) else value


def override(key: str, value: Any) -> str:
    """`key=value`, written so that `load_config` reads this very value: the only place that writes one.

    Texts stand in quotes where YAML would read something else.
    """
    plain = f"{key}={value}"
    if isinstance(value, str) and "${" not in value and value.isprintable():
        with suppress(UserError):
            if read_override(plain) == value:
                return plain
    return f"{key}={_in_flow_style(value)}"


def _in_flow_style(value: Any) -> str:
    """A value as YAML in one line: texts in double quotes, and none of them names another setting by ${…}."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_quoted(key)}: {_in_flow_style(part)}' for key, part in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_in_flow_style, value))}]"
    if isinstance(value, str):
        return _quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))
    return yaml.safe_dump(value).split("\n")[0]


def _quoted(text: str) -> str:
    escaped = json.dumps(text, ensure_ascii=False)
    return re.sub("[^ -~]", lambda match: f"\\U{ord(match[0]):08x}", escaped)


def read_override(override: str, kind: type[Section] = Config) -> Any:
    """The value of an override of a configuration of this kind."""
    key, _, text = override.partition("=")
    if not key or "=" not in override:
        raise UserError(f"{override}: overrides are written section.key=value")
    if len(_names(key)) > DEEPEST:
        raise UserError(f"{key[:60]}…: nested more than {DEEPEST} deep")
    with naming(override if key != "search.storage" else key):  # which may hold a password
        node = checked_yaml(text)
        with _naming_the_place():
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        if isinstance(value, str) and isinstance(node, yaml.ScalarNode) and node.style is None:
            return text.strip()  # also what follows a #, as no comments are written there
        for name in _names(key):
            kind = {part.name: part.type for part in fields(kind)}.get(name) if is_dataclass(kind) else None
        return _as_written(value, node, kind)


def _names(key: str) -> list[str]:
    """The parts of a key, which OmegaConf takes as a.b or a[b]."""
    return re.findall(r"[^.\[\]]+", key)


def _raw(given: Any, key: str | None) -> Any:
    """The value of a key as it was written, interpolations left as they are; None where there is none."""
    value = OmegaConf.to_container(given)
    for part in _names(key or ""):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _first_misfit(given: Any, kind: type[Section]) -> str:
    """`section.key=value` of the first setting whose container is of another kind than the dataclass's."""
    for section, settings in given.items():
        for key, value in settings.items() if OmegaConf.is_dict(settings) else ():
            try:
                OmegaConf.merge(_defaults(kind), {section: {key: value}})
            except TypeError:
                return f"{section}.{key}={value}"
            except OmegaConfBaseException:  # another mistake, which is named once this one is mended
                continue
    return "--config"


@cache
def _defaults(kind: type[Section]) -> Any:
    """All of them, to merge with: OmegaConf makes nodes of frozen dataclasses read-only, and merging needs others."""
    node = OmegaConf.structured(kind)
    for part in (node, *(node[key] for key in node if OmegaConf.is_config(node[key]))):
        OmegaConf.set_readonly(part, False)
    return node


def checked_yaml(text: str) -> yaml.Node | None:
    """The nodes of a YAML text; None where it is empty.

    Aliases are followed by whoever reads or writes the values: a few lines of them can stand for more than any memory
    holds.
    """
    try:
        with _naming_the_place():
            node = yaml.compose(text, yaml.SafeLoader)
            if node is not None and next(islice(_nodes(node), MOST_VALUES, None), None) is not None:
                raise UserError(f"more than {MOST_VALUES:,} values, with its aliases written out")
    except RecursionError:
        raise UserError(f"nested more than {DEEPEST} deep") from None
    return node


def _nodes(node: yaml.Node, depth: int = 1) -> Iterator[yaml.Node]:
    """A node and all nodes in it, those behind aliases each time that they are named."""
    if depth > DEEPEST:
        raise RecursionError
    yield node
    if not isinstance(node, yaml.ScalarNode):
        for part in chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value:
            yield from _nodes(part, depth + 1)


def check_numbers(node: yaml.Node | None) -> None:
    """Refuse what YAML reads in base 8 or 60, where nobody means that: 0250 would be 168, and 1:30 would be 90."""
    for part in _nodes(node) if node is not None else ():
        if isinstance(part, yaml.ScalarNode) and part.style is None and part.tag in NUMBERS:
            digits = part.value.lstrip("+-").replace("_", "")
            is_octal = digits.isdecimal() and digits.startswith("0") and int(digits) != int(digits, 8)
            if is_octal or ":" in digits:
                raise UserError(f"{part.value}: a number in base {8 if is_octal else 60}; write it in base 10")


def read_yaml_text(text: str) -> Any:
    """The plain values of a YAML text."""
    check_numbers(checked_yaml(text))
    with _naming_the_place():  # of a wrong date, number or key
        return yaml.safe_load(text)


@contextmanager
def _naming_the_place() -> Iterator[None]:
    """Say what is wrong with the YAML text that is read in the block, and where, if not in its first line."""
    try:
        yield
    except READING_ERRORS as error:
        place = getattr(error, "problem_mark", None)
        where = "" if place is None or place.line == 0 else f" (line {place.line + 1}, column {place.column + 1})"
        raise UserError(f"not YAML: {getattr(error, 'problem', None) or one_line(error)}{where}") from None
