"""Errors that end a script with one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

NOTHING = object()


class UserError(Exception):
    """Invalid input: a setting, an argument or a file. Printed as one line on stderr.

    Every function of the package raises it for bad input; docstrings list other exceptions only.
    """

    status: ClassVar[int] = 2  # that the script exits with


class RunError(Exception):
    """A run with valid input that can't go on. Printed as one line on stderr."""

    status: ClassVar[int] = 1


def one_line(error: BaseException) -> str:
    """An error's message in one line, after its type unless it is ours or the system's."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = " ".join(str(error).split())
    return message if isinstance(error, (UserError, RunError)) else f"{type(error).__name__}: {message}"


def shown(value: object) -> str:
    """A setting's value as written in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def naming(name: str | Path, value: object = NOTHING) -> Iterator[None]:
    """Put `name=value`, or the name of a file alone, before the message of a UserError in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}{'' if value is NOTHING else f'={shown(value)}'}: {error}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """True if the memory of the machine or of a GPU did not suffice, which is no fault of the input."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, without its import


@contextmanager
def blaming(name: str | Path = "") -> Iterator[None]:
    """Turn whatever a library raises in the block into a UserError, after the name of a setting or a file if given.

    Errors of a full memory pass as they are.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{name and f'{name}: '}{one_line(error)}") from None
