"""What search.py found, as its best.yaml holds it: coefficients, or scales of the predicted noise."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.section import is_finite
from deme.config.sections import COEFFICIENTS, SCALES
from deme.errors import UserError, naming
from deme.job.files import checked, read_yaml

MERGED_BY = "merged_by"
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
    over: str | None = None  # null: coefficients
    timesteps: list[list[int]] | None = None  # the ranges, where scales were searched
    ema_width: float | None = None  # of the networks, where it was searched
    merged_by: dict[str, Any] | None = None  # the method and its settings; null: the sum

    def width(self, config: Config) -> float | None:
        """The EMA width of the networks that are merged; None: their training's EMA."""
        given = config.merge.ema_width
        config.merge.check("ema_width", None in (given, self.ema_width), f"{self.file} was found with its own")
        return given if self.ema_width is None else self.ema_width

    def groups(self, config: Config) -> dict[str, list[float]]:
        """Name pattern → coefficients, one per range."""
        with naming(self.file):
            merge = replace(config.merge, coefficients=self.coefficients)
            return replace(config, merge=merge).coefficient_groups


def read_searched(file: Path, over: str | None = COEFFICIENTS) -> Searched:
    """Read a best.yaml, which must hold coefficients or what else is asked for; None takes both."""
    if not file.is_file():
        raise UserError(f"{file} is missing; search.py makes it")
    content = read_yaml(file)
    with naming(file), naming("not the coefficients of search.py"):
        found = checked(content | {"file": str(file), "value_of_pretrained": content.get(OF_PRETRAINED)}, Searched)
    if over is not None and (found.over or COEFFICIENTS) != over:
        raise UserError(f"{file}: found with search.over={found.over or COEFFICIENTS}, not {over}")
    return found


def prediction_scales(config: Config) -> list[tuple[int, int, float]]:
    """The scales of sample.prediction_scale, each with its range [low, high) of timesteps; none where it is null."""
    given, ranges = config.sample.prediction_scale, config.timesteps.ranges
    if isinstance(given, str):
        with naming("sample.prediction_scale", given):
            found = read_searched(config.paths.best_coefficients if given == "search" else Path(given), SCALES)
            values = [1 + c for row in found.coefficients.values() for c in row]
            positive = all(is_finite(value) and value > 0 for value in values)
            if found.timesteps != list(map(list, ranges)) or len(values) != len(ranges) or not positive:
                raise UserError(f"{found.file}: its scales are not positive numbers of the configured timestep ranges")
            given = values
    if isinstance(given, list):
        return [(*edges, float(scale)) for edges, scale in zip(ranges, given, strict=True)]
    return [] if given is None else [(0, config.timesteps.num_train_timesteps, float(given))]
