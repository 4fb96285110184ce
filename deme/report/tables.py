"""Tables as Markdown."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deme.measure.scores import BASELINES, Score

NAMES = {"inception": ("FID", "KID"), "classifier": ("classifier FD", "classifier KID")}  # of the two distances


def public(text: str) -> str:
    """A text that others will read, without the names and passwords that stand in URLs."""
    return re.sub(r"://[^\s/@<>\"']+@", "://***@", text)


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headed_table(heading: str, note: str, titles: list[str], rows: list[list[str]]) -> str:
    """A table under a heading and a sentence about what was measured."""
    return f"### {heading}\n\n{note[0].upper()}{note[1:]}.\n\n{markdown_table(titles, rows)}"


def number(value: float | None, error: float | None = None, form: str = ".4f") -> str:
    """A number with its error; "-" for None and NaN."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:{form}}" + ("" if error is None or math.isnan(error) else f" ± {error:{form.lstrip('+')}}")


def mean_of(values: np.ndarray) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def score_table(scores: Sequence[Score], features_name: str) -> str:
    """The scores as Markdown, as `score_lines` gives them."""
    titles, lines, note = score_lines(scores, features_name)
    return f"{markdown_table(titles, lines)}{note and chr(10) * 2 + note}"


def score_lines(scores: Sequence[Score], features_name: str) -> tuple[list[str], list[list[str]], str]:
    """The scores, a row each; the KID only where it tells at least one row from 0, else a note that says so.

    The CLIP score is there where at least one row has one.

    Returns:
        titles, rows, and the note or nothing.
    """
    distance, kernel = NAMES[features_name]
    with_kid = any(row.has_telling_kid for row in scores)
    with_clip = any(row.clip is not None for row in scores)
    titles = ["model", "images", f"{distance}, all images", f"mean ± s.d. of {len(scores[0].blocks)} blocks"]
    titles += ["paired difference to pretrained ± s.e."]
    titles += [f"{kernel} × 10³ ± s.e."] if with_kid else []
    titles += ["precision", "recall"]
    titles += ["CLIP score ± s.d.", "its paired difference ± s.e."] if with_clip else []
    lines = []
    for row in scores:
        line = [Path(row.samples).name, f"{row.images:,}", number(row.pooled)]
        line += [number(row.mean, row.standard_deviation)]
        line += [number(row.difference, row.difference_standard_error, "+.4f")]
        if with_kid:
            kid, error = (None if value is None else 1e3 * value for value in (row.kid, row.kid_standard_error))
            line += [number(kid, error, ".3f")]
        line += [number(row.precision, form=".3f"), number(row.recall, form=".3f")]
        if with_clip:
            line += [number(row.clip, row.clip_standard_deviation, ".3f")]
            line += [number(row.clip_difference, row.clip_difference_standard_error, "+.3f")]
        lines.append(line)
    if with_kid or all(row.kid is None for row in scores):
        return titles, lines, ""
    return titles, lines, f"{kernel} is left out: in every row it differs from 0 by less than two standard errors."


def difference_table(scores: Sequence[Score], features_name: str) -> str:
    """The rows' paired differences as Markdown, as `difference_lines` gives them."""
    titles, rows = difference_lines(scores, features_name)
    return markdown_table(titles, rows) if rows else ""


def difference_lines(scores: Sequence[Score], features_name: str) -> tuple[list[str], list[list[str]]]:
    """Titles, and the rows' paired differences to each of BASELINES; none where only one of these is there."""
    there = [name for name in BASELINES if any(name in (row.differences or {}) for row in scores)]
    if len(there) < 2:
        return [], []
    titles = [f"paired difference of the {NAMES[features_name][0]} ± s.e.", *(f"to {name}" for name in there)]
    rows = []
    for row in scores:
        found = [(row.differences or {}).get(name) for name in there]
        cells = ["-" if one is None else number(one.mean, one.standard_error, "+.4f") for one in found]
        rows.append([Path(row.samples).name, *cells])
    return titles, rows
