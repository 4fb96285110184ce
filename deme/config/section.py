"""What the sections of a configuration share: checks whose errors name the key and its value."""

import math
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from deme.errors import UserError, shown

LARGEST_COUNT = 10**9
LONGEST_NAME = 180  # bytes of a folder's name: a file system takes 255, and jobs, locks and logs are called after it
AnySection = TypeVar("AnySection", bound="Section")


class Section:
    """Base of the sections below: `check` names the section, the key and the value in its error."""

    section: ClassVar[str] = ""
    path_keys: ClassVar[tuple[str, ...]] = ()  # settings that are files or folders, or may be

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


def at_home(section: AnySection) -> AnySection:
    """A section, or the whole configuration, with the ~ and ~user of its paths replaced by the home folder."""
    changed = {}
    for setting in fields(section):
        key, value = setting.name, getattr(section, setting.name)
        if is_dataclass(value):
            changed[key] = at_home(value)
        elif key in section.path_keys and isinstance(value, str):
            if not is_one_line(value):
                name = f"{section.section}.{key}".removeprefix(".")
                raise UserError(f"{name}={value!a}: holds a line break, a tab or another control character")
            changed[key] = os.path.expanduser(value)
            rule = f"no such user; a folder of that name is written ./{value}"
            section.check(key, not changed[key].startswith("~"), rule)
        elif key in section.path_keys and isinstance(value, list) and setting.type is not Any:  # else texts
            changed[key] = list(map(os.path.expanduser, value))
    return replace(section, **changed)


def is_one_line(text: str) -> bool:
    """Whether a text holds no control character and no line break of any alphabet."""
    return not any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)


def is_folder_name(text: str) -> bool:
    """Whether a run can be called that: everything that belongs to it has names that begin with it."""
    plain = text not in ("", ".", "..") and "/" not in text and is_one_line(text)
    return plain and len(text.encode(errors="replace")) <= LONGEST_NAME


def without_password(url: str | None) -> str | None:
    """An URL as it may be written down: where it names who connects, or how, nothing but the kind of database."""
    if url is None or not {"@", "?"} & set(url):
        return url
    kind, found, _ = url.partition("://")
    return f"{kind}://…" if found else "…"
