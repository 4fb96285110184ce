"""Prompts: read from lists, text files and tables, and written beside the images that were drawn from them."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from deme.data.files import read_lines, read_rows
from deme.errors import UserError, one_line, shown
from deme.job.files import atomic_file

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = tuple(f"a handwritten {name}" for name in DIGITS)  # of the embedded digits
TEXT_SUFFIXES = ("", ".txt")  # of files with a prompt a line
PROMPTS = "prompts.jsonl"  # in a sample folder: which image was drawn from which prompt
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can hold these, UTF-8 can't


def load_prompts(source: str | list[str], column: str) -> list[str]:
    """The prompts in a list, in a text file (one a line), or in a column of a table as `read_rows` takes it."""
    prompts = source if isinstance(source, list) else _read_file(Path(source), column)
    for row, prompt in enumerate(prompts):
        if not _is_text(prompt) or not prompt.strip():
            raise UserError(f"row {row} holds the prompt {shown(prompt)}")
    if not prompts:
        raise UserError("holds no prompts")
    return prompts


def _read_file(file: Path, column: str) -> list[Any]:
    if not os.path.isfile(file):  # Path's own raises where a prompt is too long for a name
        raise UserError("no such file")
    try:
        content = file.read_bytes()
        if file.suffix.lower() in TEXT_SUFFIXES:
            return read_lines(content)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {one_line(error)}") from None
    try:
        return [row[column] for row in read_rows(file.name, content, column)]
    except KeyError:
        raise UserError(f"has no column {column}") from None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and HALF_CHARACTER.search(value) is None


# --- beside the images


def claim_prompts(folder: Path, prompts: Mapping[str, str], overwrite: bool) -> None:
    """Write the prompts of a sample folder; images of other or unknown prompts are refused, or deleted.

    Args:
        prompts: image's file name → prompt.
    """
    try:
        before = dict(_read_pairs(folder))
    except UserError:
        if not overwrite:
            raise
        before = {}
    changed = [name for name in prompts if before.get(name) != prompts[name] and (folder / name).exists()]
    if changed and not overwrite:
        others = "other prompts" if changed[0] in before else f"prompts that {PROMPTS} does not tell"
        remedy = "choose another folder or set sample.overwrite=true"
        raise UserError(f"holds {len(changed)} images of {others}, such as {changed[0]}; {remedy}")
    for name in changed:
        (folder / name).unlink()
    lines = [json.dumps({"file": name, "prompt": prompt}) for name, prompt in prompts.items()]
    with atomic_file(folder / PROMPTS) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_prompts(folder: Path, paths: Sequence[Path]) -> list[str] | None:
    """The prompts of a folder's images, in the order of `paths`; None where it has no prompts.jsonl."""
    if not (folder / PROMPTS).exists():
        return None
    pairs = _read_pairs(folder)
    names = [name for name, _ in pairs]
    for number, (name, expected) in enumerate(zip_longest(names, [path.name for path in paths]), start=1):
        if name != expected:
            raise UserError(f"{PROMPTS}, line {number}: names {name or 'no image'} instead of {expected or 'none'}")
    return [prompt for _, prompt in pairs]


def _read_pairs(folder: Path) -> list[tuple[str, str]]:
    """The image's name and the prompt in each line of a folder's prompts.jsonl; empty where there is none."""
    try:
        lines = read_lines((folder / PROMPTS).read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{PROMPTS}: {one_line(error)}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            pair = (values["file"], values["prompt"])
        except (ValueError, RecursionError, TypeError, KeyError):
            pair = (None, None)
        if not all(map(_is_text, pair)):
            example = '{"file": "000000.png", "prompt": "…"}'
            raise UserError(f"{PROMPTS}, line {number}: not a JSON object of two texts, {example}")
        pairs.append(pair)
    return pairs
