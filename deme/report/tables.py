"""Tables as Markdown, and pages in HTML and Markdown."""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deme.measure.scores import BASELINES, SCALARS, Difference, Score

NAMES = {"inception": ("FID", "KID"), "classifier": ("classifier FD", "classifier KID")}  # of the two distances


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose others are numbers; `str` gives it as Markdown."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        return markdown_table(self.titles, self.rows) + (f"\n\n{self.note}" if self.note else "")


def public(text: str) -> str:
    """A text for others to read, without the names and passwords in URLs."""
    return re.sub(r"://[^\s/@<>\"']+@", "://***@", text)


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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


def score_table(scores: Sequence[Score], features_name: str) -> Table:
    """The scores, a row each.

    A note replaces the KID if it differs from 0 in no row. The CLIP score is left out if no row has one.
    """
    distance, kernel = NAMES[features_name]
    with_kid = any(row.has_telling_kid for row in scores)
    with_clip = any(row.clip is not None for row in scores)
    titles = ["model", "images", f"{distance}, all images", f"mean ± s.d. of {len(scores[0].blocks)} blocks"]
    titles += ["paired difference to pretrained ± s.e."]
    titles += [f"{kernel} × 10³ ± s.e."] if with_kid else []
    titles += SCALARS
    titles += ["CLIP score ± s.d.", "its paired difference ± s.e."] if with_clip else []
    rows = []
    for row in scores:
        cells = [Path(row.samples).name, f"{row.images:,}", number(row.pooled)]
        cells += [number(row.mean, row.standard_deviation)]
        cells += [_difference(row.to_pretrained)]
        if with_kid:
            kid, error = (None if value is None else 1e3 * value for value in (row.kid, row.kid_standard_error))
            cells += [number(kid, error, ".3f")]
        cells += [number(getattr(row, name), form=".3f") for name in SCALARS]
        if with_clip:
            cells += [number(row.clip, row.clip_standard_deviation, ".3f")]
            cells += [number(row.clip_difference, row.clip_difference_standard_error, "+.3f")]
        rows.append(cells)
    told = with_kid or all(row.kid is None for row in scores)
    left_out = f"{kernel} is left out: in every row it differs from 0 by less than two standard errors."
    return Table(titles, rows, "" if told else left_out)


def _difference(difference: Difference | None) -> str:
    return "-" if difference is None else number(difference.mean, difference.standard_error, "+.4f")


def difference_table(scores: Sequence[Score], features_name: str) -> Table | None:
    """The rows' paired differences to each of BASELINES; None if fewer than two of these are there."""
    baselines = [name for name in BASELINES if any(name in (row.differences or {}) for row in scores)]
    if len(baselines) < 2:
        return None
    rows = []
    for row in scores:
        rows.append([Path(row.samples).name, *(_difference((row.differences or {}).get(name)) for name in baselines)])
    titles = [f"paired difference of the {NAMES[features_name][0]} ± s.e.", *(f"to {name}" for name in baselines)]
    return Table(titles, rows)


# --- a page


@dataclass(frozen=True)
class Picture:
    """A PNG file and its caption."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell; `str` gives them as Markdown."""

    lines: Sequence[str]

    def __str__(self) -> str:
        return "\n".join(["```bash", *self.lines, "```"])


Part = str | Table | Picture | Commands  # a string is a paragraph


@dataclass(frozen=True)
class Page:
    """What a page tells."""

    title: str
    sections: Mapping[str, Sequence[Part]]  # by title
    missing: Sequence[tuple[str, str]]  # stages that have not run, and the commands that run them

    def html(self) -> str:
        """A self-contained page: with pictures inside, without scripts or anything from a network."""
        loader = FileSystemLoader(Path(__file__).parent)
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        environment.filters["inlined"] = lambda file: base64.b64encode(file.read_bytes()).decode()
        return environment.get_template("page.html").render(page=self)

    def markdown(self, folder: Path) -> str:
        """The same for GitHub; pictures are links relative to the page's folder."""
        blocks = [f"# {self.title}"]
        for title, parts in self.sections.items():
            blocks.append(f"## {title}")
            for part in parts:
                if isinstance(part, Picture):
                    part = f"![{part.caption}]({part.file.relative_to(folder).as_posix()})\n\n*{part.caption}*"
                blocks.append(str(part))
        if self.missing:
            rows = [[stage, f"`{command}`"] for stage, command in self.missing]
            blocks += ["## Not there yet", markdown_table(["stage", "made by"], rows)]
        return "\n\n".join(blocks) + "\n"
