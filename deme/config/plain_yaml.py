"""YAML that was written by anybody: looked at before anything is made of it."""

from typing import Any

import yaml

from deme.errors import UserError, one_line

DEEPEST = 40  # mappings and lists inside of each other
MOST_REPEATED = 100_000  # values that aliases (*name) may stand for


def checked_yaml(text: str) -> yaml.Node | None:
    """The nodes of a YAML text; None where it is empty.

    Aliases are followed by whoever reads or writes the values: a few lines of them can stand for more than any memory
    holds.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        depth, repeated, count = (0, 0, 0) if node is None else _measure(node)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not YAML: {reason(error)}") from None
    except RecursionError:
        depth, repeated, count = DEEPEST + 1, 0, 0
    if depth > DEEPEST:
        raise UserError(f"nested more than {DEEPEST} deep")
    if repeated - count > MOST_REPEATED:
        raise UserError(f"its aliases repeat more than {MOST_REPEATED:,} values")
    return node


def read_yaml_text(text: str) -> Any:
    """The plain values of a YAML text."""
    checked_yaml(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:  # dates, numbers, keys
        raise UserError(f"not YAML: {reason(error)}") from None


def reason(error: Exception) -> str:
    """What is wrong with a YAML text, and where, if not in its first line."""
    place = getattr(error, "problem_mark", None)
    where = "" if place is None or place.line == 0 else f" (line {place.line + 1}, column {place.column + 1})"
    return f"{getattr(error, 'problem', None) or one_line(error)}{where}"


def _measure(root: yaml.Node) -> tuple[int, int, int]:
    """How deep the nodes are, how many there are with each alias written out, and how many without."""
    found: dict[int, tuple[int, int]] = {}

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) not in found:
            found[id(node)] = (DEEPEST + 1, 1)  # until it is known: one that holds itself has no end
            inner = getattr(node, "value", ())
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in inner for part in pair]
            parts = [measure(part) for part in inner] if not isinstance(node, yaml.ScalarNode) else []
            depth = 1 + max((deep for deep, _ in parts), default=0)
            found[id(node)] = (depth, 1 + sum(size for _, size in parts))
        return found[id(node)]

    return *measure(root), len(found)
