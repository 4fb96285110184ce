"""Merging coefficients: which of them hold for a tensor."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from deme.errors import UserError


def coefficients_of(name: str, groups: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """The coefficients, one per finetuned model, of the first name pattern that fits a tensor's name.

    Args:
        groups: name pattern → coefficients.

    Raises:
        UserError: none fits.
    """
    for pattern, coefficients in groups.items():
        if fnmatchcase(name, pattern):
            return coefficients
    raise UserError(f"no pattern fits the tensor {name}; add one for '*'")
