"""A run's page: HTML in one file, and the same as Markdown."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deme.report.story import Commands, Picture, Story, Table
from deme.report.tables import markdown_table

TEMPLATES = Path(__file__).parent


def html_page(story: Story) -> str:
    """A self-contained page: pictures inside of it, nothing from a network, no script."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["inlined"] = lambda file: base64.b64encode(file.read_bytes()).decode()
    environment.tests |= {kind.__name__.lower(): lambda part, kind=kind: isinstance(part, kind) for kind in KINDS}
    return environment.get_template("page.html").render(story=story)


KINDS = (Table, Picture, Commands)


def markdown_page(story: Story, folder: Path) -> str:
    """The same for GitHub; pictures are links relative to the page's folder."""
    lines = [f"# {story.name}"]
    for section in story.sections:
        lines.append(f"## {section.title}")
        for part in section.parts:
            match part:
                case Table():
                    lines.append(markdown_table(list(part.titles), [list(row) for row in part.rows]))
                    lines += [part.note] if part.note else []
                case Picture():
                    lines.append(f"![{part.caption}]({part.file.relative_to(folder).as_posix()})\n\n*{part.caption}*")
                case Commands():
                    lines.append("\n".join(["```bash", *part.lines, "```"]))
                case _:
                    lines.append(part)
    if story.missing:
        lines.append("## Not there yet")
        lines.append(markdown_table(["stage", "made by"], [[row.stage, f"`{row.command}`"] for row in story.missing]))
    return "\n\n".join(lines) + "\n"
