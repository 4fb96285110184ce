"""Name patterns of tensors, the first of which that fits counts, and the merging coefficients of their groups."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from deme.errors import UserError

PUBLISHED = (0.1, 0.1, 0.2, 0.5)  # the paper's for LSUN-Church, of four equal ranges, lowest first
BLOCK = re.compile(r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.")  # how the names of a block's tensors begin


def coefficients_of(name: str, groups: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """The coefficients, one per finetuned model, of the first pattern that fits a tensor's name."""
    return groups[pattern_of(name, groups)]


def pattern_of(name: str, patterns: Iterable[str]) -> str:
    """The first name pattern that fits a tensor's name."""
    for pattern in patterns:
        if fnmatchcase(name, pattern):
            return pattern
    raise UserError(f"no pattern fits the tensor {name}; add one for '*'")


def patterns_of(groups: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """The name patterns of groups of tensors.

    Args:
        groups: range (one group of all), block (and one group of the tensors outside), tensor, or the patterns.
        names: of all tensors.
    """
    match groups:
        case "range":
            patterns = ["*"]
        case "block":
            blocks = [match[0] for match in map(BLOCK.match, names) if match]
            patterns = [*(f"{block}*" for block in dict.fromkeys(blocks)), "*"]
        case "tensor":
            patterns = list(names)
        case _:
            patterns = list(groups)
    used = {pattern_of(name, patterns) for name in names}
    for pattern in patterns:
        if pattern not in used or patterns.count(pattern) > 1:
            raise UserError(f"no tensor is left for the pattern {pattern}")
    return patterns
