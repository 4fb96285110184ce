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


def number(value: float | None, error: float | None = None, form: str = ".4f", scale: float = 1) -> str:
    """A number with its error, both times the scale; "-" for None and NaN."""
    if value is None or math.isnan(value):
        return "-"
    known = error is not None and not math.isnan(error)
    return f"{scale * value:{form}}" + (f" ± {scale * error:{form.lstrip('+')}}" if known else "")


def mean_of(values: np.ndarray) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def score_table(scores: Sequence[Score], features_name: str) -> Table:
    """The scores, a row each.

    A note replaces the KID if it differs from 0 in no row. The CLIP score is left out if no row has one.
    """
    distance, kernel = NAMES[features_name]
    columns = {
        "model": lambda row: Path(row.samples).name,
        "images": lambda row: f"{row.images:,}",
        f"{distance}, all images": lambda row: number(row.pooled),
        f"mean ± s.d. of {len(scores[0].blocks)} blocks": lambda row: number(row.mean, row.standard_deviation),
        "paired difference to pretrained ± s.e.": lambda row: _difference(row.to_pretrained),
    }
    with_kid = any(row.has_telling_kid for row in scores)
    if with_kid:
        columns[f"{kernel} × 10³ ± s.e."] = lambda row: number(row.kid, row.kid_standard_error, ".3f", scale=1e3)
    columns |= {name: lambda row, name=name: number(getattr(row, name), form=".3f") for name in SCALARS}
    if any(row.clip is not None for row in scores):
        columns["CLIP score ± s.d."] = lambda row: number(row.clip, row.clip_standard_deviation, ".3f")
        columns["its paired difference ± s.e."] = lambda row: number(
            row.clip_difference, row.clip_difference_standard_error, "+.3f"
        )
    told = with_kid or all(row.kid is None for row in scores)
    left_out = f"{kernel} is left out: in every row it differs from 0 by less than two standard errors."
    rows = [[cell(row) for cell in columns.values()] for row in scores]
    return Table(list(columns), rows, "" if told else left_out)


def difference_table(scores: Sequence[Score], features_name: str) -> Table | None:
    """The rows' paired differences to each of BASELINES; None if fewer than two of these are there."""
    differences = [row.differences or {} for row in scores]
    baselines = [name for name in BASELINES if any(name in found for found in differences)]
    if len(baselines) < 2:
        return None
    titles = [f"paired difference of the {NAMES[features_name][0]} ± s.e.", *(f"to {name}" for name in baselines)]
    cells = [[_difference(found.get(name)) for name in baselines] for found in differences]
    return Table(titles, [[Path(row.samples).name, *others] for row, others in zip(scores, cells, strict=True)])


def _difference(difference: Difference | None) -> str:
    return "-" if difference is None else number(difference.mean, difference.standard_error, "+.4f")


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
