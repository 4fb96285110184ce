"""What the sections of a configuration share: checks whose errors name the key and its value."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar

from deme.errors import UserError, shown

LARGEST_COUNT = 10**9


class Section:
    """Base of the sections below: `check` names the section, the key and the value in its error."""

    section: ClassVar[str] = ""

    def check(self, key: str, holds: bool, rule: str) -> None:
        """Name the section, the key and its value where a rule does not hold."""
        if not holds:
            name = f"{self.section}.{key}" if self.section else key
            raise UserError(f"{name}={shown(getattr(self, key))}: {rule}")

    def check_positive(self, *keys: str) -> None:
        """Each key is None or a finite number above 0."""
        for key in keys:
            value = getattr(self, key)
            self.check(key, value is None or 0 < value < math.inf, "must be a finite number above 0")
            self.check_count(key)

    def check_not_negative(self, *keys: str) -> None:
        """Each key is None or a finite number of at least 0."""
        for key in keys:
            value = getattr(self, key)
            self.check(key, value is None or 0 <= value < math.inf, "must be a finite number, 0 or above")
            self.check_count(key)

    def check_count(self, key: str) -> None:
        """A whole number is one that something can be counted to."""
        value = getattr(self, key)
        self.check(key, not isinstance(value, int) or value <= LARGEST_COUNT, f"must be at most {LARGEST_COUNT:,}")

    def check_seed(self, key: str) -> None:
        """The key is a seed that numpy and torch take."""
        self.check(key, 0 <= getattr(self, key) < 2**63, "must lie in [0, 2**63)")

    def check_fraction(self, *keys: str) -> None:
        """Each key lies in [0, 1]."""
        for key in keys:
            self.check(key, 0 <= getattr(self, key) <= 1, "must lie in [0, 1]")

    def check_choice(self, key: str, choices: tuple[str, ...]) -> None:
        """The key is one of a few words."""
        self.check(key, getattr(self, key) in choices, one_of(choices, getattr(self, key)))


def one_of(choices: Iterable[str], given: object) -> str:
    """The rule that something is one of these words, with the one that was probably meant."""
    near = get_close_matches(given, choices, 1) if isinstance(given, str) else []
    return f"must be one of {', '.join(choices)}" + "".join(f"; did you mean {word}?" for word in near)
