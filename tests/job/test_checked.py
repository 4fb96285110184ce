import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deme.errors import UserError
from deme.job.files import checked


@dataclass(frozen=True)
class Part:
    name: str
    share: float | None


@dataclass(frozen=True)
class Whole:
    count: int
    parts: list[Part]
    by_name: dict[str, list[float]] | None
    is_there: bool = True


WHOLE = {"count": 2, "parts": [{"name": "a", "share": 0.5}], "by_name": {"a": [1, 2.5]}, "is_there": False}
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


def is_whole(found: Whole) -> bool:
    """Whether every part has its type, and every number is finite."""
    numbers = [part.share for part in found.parts if part.share is not None]
    numbers += [number for row in (found.by_name or {}).values() for number in row]
    texts = [part.name for part in found.parts] + list(found.by_name or {})
    exact = (type(found.count), type(found.is_there)) == (int, bool)
    return exact and all(type(n) is float and math.isfinite(n) for n in numbers) and all(type(t) is str for t in texts)


def test_what_fits_is_taken():
    found = checked(WHOLE | {"other": 1}, Whole)
    assert found == Whole(2, [Part("a", 0.5)], {"a": [1.0, 2.5]}, False)
    assert checked({"count": 0, "parts": [{"name": ""}]}, Whole) == Whole(0, [Part("", None)], None)


@given(st.sampled_from([*WHOLE, "other"]), values)
def test_what_is_taken_has_its_type(key, value):
    """Whatever stands in a place: it is taken as it is, or refused by its name."""
    try:
        found = checked(WHOLE | {key: value}, Whole)
    except UserError as error:
        found = str(error)
    assert found.startswith(key) if isinstance(found, str) else is_whole(found)


@given(values)
def test_anything_else_is_refused(value):
    with pytest.raises(UserError):
        checked(value, Whole)


@pytest.mark.parametrize("text", ['"\\ud800"', "NaN", "-Infinity", "1e400", "1e39", "true", '"1"'])
def test_numbers_are_finite_and_texts_are_unicode(text):
    for kind in (float, int) if text[1:3] != "\\u" else (str,):
        with pytest.raises(UserError, match=r"^a is not "):
            checked(json.loads(text), kind, "a")
