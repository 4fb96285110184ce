"""Tables of texts, in the formats that people keep prompts and captions in."""

import csv
import io
import json
from pathlib import PurePath
from typing import Any

from deme.errors import UserError, naming, one_line

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")  # that `read_rows` reads


def read_rows(name: str, content: bytes, column: str = "") -> list[dict[str, Any]]:
    """The rows of a table, each a dictionary by column.

    Every value of a csv or tsv file is a text, also NA, null and None; an empty one is None. A json file holds a list.

    Args:
        name: of the file; its suffix, in any case, tells the format.
        column: that a text stands in which is no row, but an item of a json list.
    """
    try:
        match PurePath(name).suffix.lower():
            case ".csv":
                return _read_csv(content, ",")
            case ".tsv":
                return _read_csv(content, "\t")
            case ".jsonl" | ".ndjson":
                rows = _read_json_lines(content)
            case ".json":
                rows = json.loads(content.decode("utf-8-sig"))
            case ".parquet":
                import pyarrow.parquet

                return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
            case suffix:
                raise UserError(f"the suffix {suffix or '(none)'} is of no table; {', '.join(TABLES)} are read")
    except UserError:
        raise
    except Exception as error:  # csv, json and pyarrow raise whatever a damaged file leads to
        raise UserError(f"cannot be read: {one_line(error)}") from None
    rows = rows if isinstance(rows, list) else [rows]
    rows = [{column: row} if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"row {number} is not an object")
    return rows


def _read_json_lines(content: bytes) -> list[Any]:
    """"""
    rows = []
    for number, line in enumerate(read_lines(content), start=1):
        with naming(f"line {number}"):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise UserError(one_line(error)) from None
    return rows


def _read_csv(content: bytes, delimiter: str) -> list[dict[str, Any]]:
    """"""
    csv.field_size_limit(len(content) + 1)  # not Python's 131,072 characters
    lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    rows = []
    for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter, strict=True)):
        if None in row:
            raise UserError(f"row {number} has more values than the first line has columns; texts may need quotes")
        rows.append({key: value or None for key, value in row.items()})
    return rows


def read_lines(content: bytes) -> list[str]:
    """A text file's lines: str.splitlines would also split at what a prompt may hold, such as U+2028."""
    text = content.decode("utf-8-sig").removesuffix("\n")  # with or without a byte-order mark
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []
