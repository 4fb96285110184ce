"""Merging coefficients that search.py wrote, the networks that it found them for, and the time that it took."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from deme.config.experiment import Config
from deme.errors import UserError, naming
from deme.job.files import checked, read_yaml

SECONDS = "seconds.txt"  # in the search's folder: a line for each command
OF_PRETRAINED = "value of the pretrained network"


@dataclass(frozen=True)
class Searched:
    """What a best.yaml holds; a hand-written one may hold the coefficients alone."""

    file: str
    coefficients: dict[str, list[float]]  # by name pattern
    pretrained: str | None  # SHA-256 of the networks' weights
    finetuned: list[str] | None
    objective: str | None
    value: float | None  # of the objective
    value_of_pretrained: float | None
    passes: int | None  # through the UNet

    def groups(self, config: Config) -> dict[str, list[float]]:
        """Name pattern → coefficients, one per range."""
        with naming(self.file):
            merge = replace(config.merge, coefficients=self.coefficients)
            return replace(config, merge=merge).coefficient_groups

    def is_of(self, pretrained: str, finetuned: list[str]) -> bool:
        """True if the coefficients were found for networks of these hashes."""
        return (self.pretrained, self.finetuned) == (pretrained, finetuned)


def read_searched(file: Path) -> Searched:
    """Read a best.yaml."""
    if not file.is_file():
        raise UserError(f"{file} is missing; search.py makes it")
    content = read_yaml(file)
    with naming(file), naming("not the coefficients of search.py"):
        return checked(content | {"file": str(file), "value_of_pretrained": content.get(OF_PRETRAINED)}, Searched)


@contextmanager
def timed(folder: Path) -> Iterator[None]:
    """Add the block's seconds to a search's SECONDS, if there is one, however the block ends."""
    begin = time.monotonic()
    try:
        yield
    finally:
        if (folder / SECONDS).exists():
            with (folder / SECONDS).open("a", encoding="utf-8") as file:
                file.write(f"{time.monotonic() - begin:.1f}\n")


def seconds_of(folder: Path) -> float | None:
    """The seconds of all commands of a search; None if they are not known."""
    try:
        taken = [float(line) for line in (folder / SECONDS).read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        return None
    return sum(taken) if all(0 <= seconds < math.inf for seconds in taken) else None
