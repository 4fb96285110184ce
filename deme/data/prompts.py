"""Prompts: read from the formats that people keep them in, and written beside the images that were drawn from them."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deme.errors import UserError, naming, one_line, shown
from deme.job.files import atomic_file

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = tuple(f"a handwritten {name}" for name in DIGITS)  # of the embedded digits
PROMPTS = "prompts.jsonl"  # in a sample folder: which image was drawn from which prompt


def load_prompts(source: str | list[str], column: str) -> list[str]:
    """The prompts in a list, in a text file (one a line), or in a column of a csv, jsonl or parquet file.

    Raises:
        UserError: a file that can't be read, no such column, no prompts, or an empty one; names the row.
    """
    prompts = source if isinstance(source, list) else _read(Path(source), column)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip() or not is_encodable(prompt):
            raise UserError(f"row {row} holds the prompt {shown(prompt)}")
    if not prompts:
        raise UserError("holds no prompts")
    return prompts


def _read(file: Path, column: str) -> list[Any]:
    """The rows of a file, unchecked."""
    if not file.is_file():
        raise UserError("no such file")
    try:
        match file.suffix:
            case ".csv":
                with file.open(encoding="utf-8-sig", newline="") as lines:
                    return [row[column] for row in csv.DictReader(lines)]
            case ".jsonl":
                return [json.loads(line)[column] for line in _lines(file)]
            case ".parquet":
                import pyarrow.parquet

                return pyarrow.parquet.read_table(file, columns=[column]).column(column).to_pylist()
            case _:
                return _lines(file)
    except KeyError:
        raise UserError(f"has no column {column}") from None
    except Exception as error:  # csv, json and pyarrow raise whatever a damaged file leads to
        raise UserError(f"cannot be read: {one_line(error)}") from None


def _lines(file: Path) -> list[str]:
    """A text file's lines: str.splitlines would also split at what a prompt may hold, such as U+2028."""
    text = file.read_text(encoding="utf-8-sig").removesuffix("\n")  # with or without a byte-order mark
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def is_encodable(text: str) -> bool:
    """Whether a text is one: JSON can escape what is no character."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def claim_prompts(folder: Path, images: Sequence[Path], prompts: Iterable[str], overwrite: bool) -> None:
    """Write which image of a sample folder belongs to which prompt; those of other prompts go, or are refused.

    Raises:
        UserError: the folder holds images of other prompts.
    """
    named = dict(zip((image.name for image in images), prompts, strict=True))
    before = {}
    if (folder / PROMPTS).exists():
        before = dict(_parse_prompt(line) for line in _lines(folder / PROMPTS))
    changed = [image for image in images if before.get(image.name, named[image.name]) != named[image.name]]
    changed = [image for image in changed if image.exists()]
    if changed and not overwrite:
        remedy = "choose another folder or set sample.overwrite=true"
        raise UserError(f"holds {len(changed)} images of other prompts, such as {changed[0].name}; {remedy}")
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

    Raises:
        UserError: unreadable, or not one line per image in their order; names the line.
    """
    file = folder / PROMPTS
    if not file.exists():
        return None
    try:
        lines = _lines(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{PROMPTS}: {one_line(error)}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        with naming(f"{PROMPTS}, line {number}"):
            name, prompt = _parse_prompt(line)
            if number > len(paths):
                raise UserError(f"there are only {len(paths)} images")
            if name != paths[number - 1].name:
                raise UserError(f"is of {name} instead of {paths[number - 1].name}")
            prompts.append(prompt)
    if len(prompts) < len(paths):
        raise UserError(f"{PROMPTS}, line {len(prompts) + 1}: missing, the one of {paths[len(prompts)].name}")
    return prompts


def _parse_prompt(line: str) -> tuple[str, str]:
    """The image's name and the prompt in a line of prompts.jsonl.

    Raises:
        UserError: not a JSON object with these two texts.
    """
    try:
        values = json.loads(line)
        pair = values["file"], values["prompt"]
        if all(map(is_encodable, pair)):
            return pair
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        pass
    raise UserError('not a JSON object of two texts, {"file": "000000.png", "prompt": "…"}')
