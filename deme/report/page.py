"""A run's page: HTML in one file, and the same as Markdown."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deme.report.tables import Table, markdown_table

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A PNG file and its caption."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: Sequence[str]


Part = str | Table | Picture | Commands  # a string is a paragraph
KINDS = (Table, Picture, Commands)


@dataclass(frozen=True)
class Page:
    """What a page tells."""

    title: str
    sections: Mapping[str, Sequence[Part]]  # by title
    missing: Sequence[tuple[str, str]]  # stages that have not run, and the commands that run them


def html_page(page: Page) -> str:
    """A self-contained page: with pictures inside, without scripts or anything from a network."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["inlined"] = lambda file: base64.b64encode(file.read_bytes()).decode()
    environment.tests |= {kind.__name__.lower(): lambda part, kind=kind: isinstance(part, kind) for kind in KINDS}
    return environment.get_template("page.html").render(page=page)


def markdown_page(page: Page, folder: Path) -> str:
    """The same for GitHub; pictures are links relative to the page's folder."""
    blocks = [f"# {page.title}"]
    for title, parts in page.sections.items():
        blocks.append(f"## {title}")
        for part in parts:
            match part:
                case Picture():
                    blocks.append(f"![{part.caption}]({part.file.relative_to(folder).as_posix()})\n\n*{part.caption}*")
                case Commands():
                    blocks.append("\n".join(["```bash", *part.lines, "```"]))
                case _:
                    blocks.append(str(part))
    if page.missing:
        rows = [[stage, f"`{command}`"] for stage, command in page.missing]
        blocks += ["## Not there yet", markdown_table(["stage", "made by"], rows)]
    return "\n\n".join(blocks) + "\n"
