"""Tables as Markdown, and documents from the templates beside this file."""

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from deme.measure.scores import BASELINES, SCALARS, Difference, Score

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["inlined"] = lambda file: base64.b64encode(file.read_bytes()).decode()


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose others are numbers; `str` gives it as Markdown."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in self.rows]
        lines = [self.titles, ["---"] + ["---:"] * (len(self.titles) - 1), *cells]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same without a note."""
    return str(Table(titles, rows))


def headed_table(heading: str, note: str, titles: list[str], rows: list[list[str]]) -> str:
    """A table under a heading and a sentence about what was measured."""
    return f"### {heading}\n\n{note[0].upper()}{note[1:]}.\n\n{markdown_table(titles, rows)}"


def number(value: float | None, error: float | None = None, form: str = ".4f", scale: float = 1) -> str:
    """A number with its error, both times the scale; "-" for None and NaN."""
    if value is None or math.isnan(value):
        return "-"
    known = error is not None and not math.isnan(error)
    return f"{scale * value:{form}}" + (f" ± {scale * error:{form.lstrip('+')}}" if known else "")


def signed(difference: Difference | None) -> str:
    """A paired difference with its standard error."""
    return "-" if difference is None else number(difference.mean, difference.standard_error, "+.4f")


def mean_of(values: np.ndarray) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def distances(space: str) -> tuple[str, str]:
    """What the Fréchet and the kernel distance in a feature space are called: FID only if they are."""
    return ("FID", "KID") if space == "inception" else (f"{space} FD", f"{space} KID")


def score_table(scores: Sequence[Score], features_name: str) -> Table:
    """The scores, a row each.

    A note replaces the KID if it differs from 0 in no row. The CLIP score is left out if no row has one.
    """
    distance, kernel = distances(features_name)
    columns = {
        "model": lambda row: Path(row.samples).name,
        "images": lambda row: f"{row.images:,}",
        f"{distance}, all images": lambda row: number(row.pooled),
        f"mean ± s.d. of {len(scores[0].blocks)} blocks": lambda row: number(row.mean, row.standard_deviation),
        "paired difference to pretrained ± s.e.": lambda row: signed(row.to_pretrained),
    }
    note = ""
    if any(row.has_telling_kid for row in scores):
        columns[f"{kernel} × 10³ ± s.e."] = lambda row: number(row.kid, row.kid_standard_error, ".3f", scale=1e3)
    elif any(row.kid is not None for row in scores):
        note = f"{kernel} is left out: in every row its 95 % confidence interval holds 0."
    columns |= {name: lambda row, name=name: number(getattr(row, name), form=".3f") for name in SCALARS}
    if any(row.clip is not None for row in scores):
        columns["CLIP score ± s.d."] = lambda row: number(row.clip, row.clip_standard_deviation, ".3f")
        columns["its paired difference ± s.e."] = lambda row: number(
            row.clip_difference, row.clip_difference_standard_error, "+.3f"
        )
    return Table(list(columns), [[cell(row) for cell in columns.values()] for row in scores], note)


def difference_table(scores: Sequence[Score], features_name: str) -> Table | None:
    """The rows' paired differences to each of BASELINES; None if fewer than two of these are there."""
    baselines = [name for name in BASELINES if any(name in (row.differences or {}) for row in scores)]
    if len(baselines) < 2:
        return None
    titles = [f"paired difference of the {distances(features_name)[0]} ± s.e.", *(f"to {name}" for name in baselines)]
    rows = []
    for row in scores:
        differences = row.differences or {}
        rows.append([Path(row.samples).name, *(signed(differences.get(name)) for name in baselines)])
    return Table(titles, rows)


# --- documents


@dataclass(frozen=True)
class Picture:
    """A PNG file and its caption."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: Sequence[str]


Part = str | Table | Picture | Commands  # of a page; a string is a paragraph


def render(template: str, **content: Any) -> str:
    """A document for others to read, without the names and passwords in URLs.

    page.html has its pictures inside and takes nothing from a network, page.md links to them, model_card.md has none.
    """
    text = TEMPLATES.get_template(template).render(content)
    return re.sub(r"://[^\s/@<>\"']+@", "://***@", text)
