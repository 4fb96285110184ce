"""Merging coefficients that search.py wrote, the networks that it found them for, and the time that it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.errors import UserError, naming
from deme.job.files import read_yaml

SECONDS = "seconds.txt"  # in the search's folder: a line for each command; none where the first ones noted nothing


@dataclass(frozen=True)
class Searched:
    """What a best.yaml holds."""

    file: Path
    content: dict[str, Any]

    def groups(self, config: Config) -> dict[str, list[float]]:
        """Name pattern → coefficients, one per range.

        Raises:
            UserError: no such lists, or of another number of ranges; names the file.
        """
        with naming(self.file):
            merge = replace(config.merge, coefficients=self.content["coefficients"])
            return replace(config, merge=merge).coefficient_groups

    def is_of(self, pretrained: str, finetuned: list[str]) -> bool:
        """Whether they were found for networks of these hashes."""
        return (self.content.get("pretrained"), self.content.get("finetuned")) == (pretrained, finetuned)


def read_searched(file: Path) -> Searched:
    """Read such a file.

    Raises:
        UserError: there is none, or search.py did not write it.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing; search.py makes it")
    content = read_yaml(file)
    if not isinstance(content.get("coefficients"), dict):
        raise UserError(f"{file}: not the coefficients of search.py")
    return Searched(file, content)


@contextmanager
def timed(folder: Path) -> Iterator[None]:
    """Note how long the block took, however it ends, in a search's folder where all commands have done so."""
    begin = time.monotonic()
    try:
        yield
    finally:
        if (folder / SECONDS).exists():
            with (folder / SECONDS).open("a", encoding="utf-8") as file:
                file.write(f"{time.monotonic() - begin:.1f}\n")


def seconds_of(folder: Path) -> float | None:
    """What all commands of a search took together; None where it is not known."""
    try:
        return sum(map(float, (folder / SECONDS).read_text(encoding="utf-8").split()))
    except (OSError, ValueError):
        return None
