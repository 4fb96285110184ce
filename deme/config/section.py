"""What the sections of a configuration share: fields that carry their bounds and tags, and checks that name the key."""

import math
import operator
import os
import unicodedata
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import Field, asdict, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Self

from deme.errors import UserError, shown

ANALYSES = ("gradient_conflict", "loss_by_timestep", "task_vectors", "landscape", "activation_change")  # modules
TAGS = {  # what a setting influences: records, caches, comparisons and jobs read these; there is no other list
    "weights": "the weights that a training ends with, so it is fixed for a run",
    "merged": "the merged weights; merge.yaml names the coefficients that were read and the settings of the method",
    "samples": "each sampled image, besides the model and the prompts",
    "examples": "what a network is given of the data, beyond what the data's hash covers",
    "latents": "the cache of encoded images",
    "statistics": "the data's statistics, and the classifier",
    "search": "the coefficients that a search finds",
    **dict.fromkeys(ANALYSES, "this analysis of analyze.py"),
    "free": "no result, so it may change while a training or a search is under way",
    "place": "where a result lies, not what it is",
    "all_runs": "the rows of a comparison, so all of its runs have the same",
    "one_run": "a place or a share of the work that each run of a comparison has for itself",
    "path": "it may name a file or folder: ~ is expanded",
    "text": "nothing, unless images have captions, or labels that the network takes",
    "omit_default": "left out of records where it has its default",
}
LARGEST_COUNT = 10**9
LONGEST_NAME = 180  # bytes of a folder's name: file systems take 255, and jobs, locks and logs are named after it
BOUNDS = {"above": operator.gt, "least": operator.ge, "below": operator.lt, "most": operator.le}
IN_WORDS = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def setting(default: Any, tags: str, choices: Iterable[str] = (), only: tuple[str, ...] = (), **bounds: float) -> Any:
    """A field of a section with these tags of TAGS; with `choices` it is one of these words or a list of them.

    With `only`=(key, word, ...) it counts where that key of the section is one of the words. The bounds are above or
    least, below or most; without an upper bound a float must be finite, an int countable.
    """
    unknown = (set(tags.split()) - TAGS.keys()) | (bounds.keys() - BOUNDS.keys())
    if unknown:
        raise TypeError(f"no tag or bound: {', '.join(sorted(unknown))}")
    metadata = {"tags": tuple(tags.split()), "choices": tuple(choices), "only": only, "bounds": bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of the sections below; errors name the section, the key and the value."""

    @property
    def section(self) -> str:
        """Its name in the YAML file, that of its class."""
        return type(self).__name__.lower()

    def __post_init__(self):
        for part in fields(self):
            key, value = part.name, getattr(self, part.name)
            if value is None:
                continue
            if bounds := part.metadata.get("bounds"):
                self._check_bounds(key, value, bounds)
            choices = part.metadata.get("choices")
            if choices and isinstance(value, list):
                self.check(key, set(value) <= set(choices), f"must be a list of {', '.join(choices)}")
            elif choices:
                self.check(key, value in choices, one_of(choices, value))
            is_named = value != "" or not ("path" in tags_of(part) or part.default is None)
            self.check(key, is_named, "must not be empty")
        self.check_together()

    def check_together(self) -> None:
        """Check what must hold between settings, and what bounds and choices do not express."""

    def check(self, key: str, holds: bool, rule: str) -> None:
        """Raise an error that names section, key and value in one line unless the rule holds."""
        if not holds:
            name, value = f"{self.section}.{key}".removeprefix("."), getattr(self, key)
            written = shown(value) if is_one_line(shown(value)) else ascii(value)
            raise UserError(f"{name}={written}: {rule}")

    def _check_bounds(self, key: str, value: float, bounds: dict[str, float]) -> None:
        if not {"below", "most"} & bounds.keys():
            bounds = bounds | ({"most": LARGEST_COUNT} if isinstance(value, int) else {"below": math.inf})
        words = [f"{IN_WORDS[name]} {bound:,}" for name, bound in bounds.items() if bound < math.inf]
        words += ["finite"] * (math.inf in bounds.values())
        holds = all(BOUNDS[name](value, bound) for name, bound in bounds.items())
        self.check(key, holds, f"must be {' and '.join(words)}")

    def at_home(self) -> Self:
        """The same with ~ and ~user in paths replaced by the home folder, also in the sections that it holds."""
        changed = {}
        for part in fields(self):
            key, value = part.name, getattr(self, part.name)
            if is_dataclass(value):
                changed[key] = value.at_home()
            elif "path" in tags_of(part) and isinstance(value, str):
                self.check(key, is_one_line(value), "holds a line break, a tab or another control character")
                changed[key] = self._expanded(key, value)
            elif "path" in tags_of(part) and isinstance(value, list) and part.type is not Any:  # else a list of prompts
                changed[key] = [self._expanded(key, part) if isinstance(part, str) else part for part in value]
        return replace(self, **changed)

    def _expanded(self, key: str, path: str) -> str:
        found = os.path.expanduser(path)
        self.check(key, not found.startswith("~"), f"no such user; a folder of that name is written ./{path}")
        return found

    def tagged(self, tag: str) -> dict[str, Any]:
        """The settings with a tag, in their order, but for those that do not count beside the others: key → value."""
        values = asdict(self)
        return {part.name: values[part.name] for part in fields(self) if tag in tags_of(part) and self._counts(part)}

    def _counts(self, part: Field) -> bool:
        key, *words = part.metadata["only"] or (part.name,)
        omitted = "omit_default" in tags_of(part) and getattr(self, part.name) == getattr(type(self)(), part.name)
        return not omitted and (not words or getattr(self, key) in words)


def tags_of(part: Field) -> tuple[str, ...]:
    """The tags of a section's field."""
    return part.metadata.get("tags", ())


def one_of(choices: Iterable[str], given: object) -> str:
    """The rule that something is one of these words, with the one that was probably meant."""
    near = get_close_matches(given, choices, 1) if isinstance(given, str) else []
    return f"must be one of {', '.join(choices)}" + "".join(f"; did you mean {word}?" for word in near)


def is_one_line(text: str) -> bool:
    """True if a text holds no control character, no line break of any alphabet, and no half of a surrogate pair."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def is_folder_name(text: str) -> bool:
    """True if a run can have this name; the names of its files begin with it."""
    plain = text not in ("", ".", "..") and "/" not in text and is_one_line(text)
    return plain and len(text.encode(errors="replace")) <= LONGEST_NAME


def without_password(url: str | None) -> str | None:
    """A URL that may be written down: only the kind of database if it has credentials or parameters."""
    if url is None or not {"@", "?"} & set(url):
        return url
    kind, separator, _ = url.partition("://")
    return f"{kind}://…" if separator else "…"


def is_finite(value: object) -> bool:
    """True if a value is a number and finite in float32, the type that weights are summed in."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
