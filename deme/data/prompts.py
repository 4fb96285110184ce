"""Prompts: read from the formats that people keep them in, and written beside the images that were drawn from them."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deme.data.tables import read_lines, read_rows
from deme.errors import UserError, naming, one_line, shown
from deme.job.files import atomic_file

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = tuple(f"a handwritten {name}" for name in DIGITS)  # of the embedded digits
TEXTS = ("", ".txt")  # suffixes of files with a prompt a line
PROMPTS = "prompts.jsonl"  # in a sample folder: which image was drawn from which prompt


def load_prompts(source: str | list[str], column: str) -> list[str]:
    """The prompts in a list, in a text file (one a line), or in a column of a table as `read_rows` takes it."""
    prompts = source if isinstance(source, list) else _read(Path(source), column)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip() or not is_encodable(prompt):
            raise UserError(f"row {row} holds the prompt {shown(prompt)}")
    if not prompts:
        raise UserError("holds no prompts")
    return prompts


def _read(file: Path, column: str) -> list[Any]:
    """The rows of a file, unchecked."""
    if not os.path.isfile(file):  # Path's own raises where a prompt is too long for a name
        raise UserError("no such file")
    try:
        content = file.read_bytes()
        if file.suffix.lower() in TEXTS:
            return read_lines(content)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {one_line(error)}") from None
    try:
        return [row[column] for row in read_rows(file.name, content, column)]
    except KeyError:
        raise UserError(f"has no column {column}") from None


def is_encodable(text: str) -> bool:
    """Whether a text is one: JSON can escape what is no character."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def claim_prompts(folder: Path, images: Sequence[Path], prompts: Iterable[str], overwrite: bool) -> None:
    """Write which image of a sample folder belongs to which prompt; those of other prompts go, or are refused.

    So are those of which prompts.jsonl, lost or cut short, does not say which they belong to.
    """
    named = dict(zip((image.name for image in images), prompts, strict=True))
    before = dict(_read_pairs(folder, overwrite))
    changed = [image for image in images if before.get(image.name) != named[image.name] and image.exists()]
    if changed and not overwrite:
        whose = "other prompts" if changed[0].name in before else f"prompts that {PROMPTS} does not tell"
        remedy = "choose another folder or set sample.overwrite=true"
        raise UserError(f"holds {len(changed)} images of {whose}, such as {changed[0].name}; {remedy}")
    for image in changed:
        image.unlink()
    write_prompts(folder, named)


def write_prompts(folder: Path, prompts: Mapping[str, str]) -> None:
    """Write prompts.jsonl, a JSON object a line.

    Args:
        prompts: image's file name → prompt.
    """
    lines = [json.dumps({"file": name, "prompt": prompt}) for name, prompt in prompts.items()]
    with atomic_file(folder / PROMPTS) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_prompts(folder: Path, paths: Sequence[Path]) -> list[str] | None:
    """The prompts of a folder's images, in their order, or None where it has no prompts.jsonl.

    Args:
        paths: the images, as `list_images` gives them.
    """
    if not (folder / PROMPTS).exists():
        return None
    prompts = []
    for number, (name, prompt) in enumerate(_read_pairs(folder), start=1):
        with naming(f"{PROMPTS}, line {number}"):
            if number > len(paths):
                raise UserError(f"there are only {len(paths)} images")
            if name != paths[number - 1].name:
                raise UserError(f"is of {name} instead of {paths[number - 1].name}")
        prompts.append(prompt)
    if len(prompts) < len(paths):
        raise UserError(f"{PROMPTS}, line {len(prompts) + 1}: missing, the one of {paths[len(prompts)].name}")
    return prompts


def _read_pairs(folder: Path, passing_over: bool = False) -> Iterator[tuple[str, str]]:
    """The image's name and the prompt of each line of a sample folder's prompts.jsonl; of none where there is none.

    Args:
        passing_over: lines that can't be read, instead of an error.
    """
    try:
        lines = read_lines((folder / PROMPTS).read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        if passing_over:
            return
        raise UserError(f"{PROMPTS}: {one_line(error)}") from None
    for number, line in enumerate(lines, start=1):
        try:
            with naming(f"{PROMPTS}, line {number}"):
                pair = _parse_prompt(line)
        except UserError:
            if passing_over:
                continue
            raise
        yield pair


def _parse_prompt(line: str) -> tuple[str, str]:
    """The image's name and the prompt in a line of prompts.jsonl."""
    try:
        values = json.loads(line)
        pair = values["file"], values["prompt"]
        if all(map(is_encodable, pair)):
            return pair
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        pass
    raise UserError('not a JSON object of two texts, {"file": "000000.png", "prompt": "…"}')
