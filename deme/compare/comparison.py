"""A table of many runs: which models of which variations of one experiment are compared (configs/comparison/)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, Optional

from omegaconf import MISSING, OmegaConf

from deme.config.experiment import Config
from deme.config.paths import for_shell
from deme.config.reading import READING_ERRORS, load_config, override, read_mapping, read_override
from deme.config.section import Section, at_home, is_folder_name, one_of
from deme.config.sections import Evaluate
from deme.errors import UserError, naming, one_line

OWN_KEYS = ("base", "seeds", "reference")  # that overrides set here; all others are the experiment's
PRETRAINED = "pretrained"
OF_ONE_RUN = (
    "merge.finetuned",
    "merge.output",
    "search.output",
    "sample.output",
    "sample.block",
    "evaluate.samples",
    "evaluate.output",
)

# rows would not compare, or what a variation says of it would have no effect
OF_ALL_RUNS = (
    "name",
    "seed",
    "model.pretrained",
    "finetune.range",
    "sample.model",
    "sample.num_images",
    "sample.seed_offset",
    *(key for setting in fields(Evaluate) if (key := f"evaluate.{setting.name}") not in OF_ONE_RUN),
)


@dataclass(frozen=True)
class Variation:
    """The base configuration with overrides; a run of its own for each seed."""

    models: list[str] = field(default_factory=list)  # as sample.model names them, a row each
    overrides: list[str] = field(default_factory=list)  # section.key=value; none: the base as it stands


@dataclass(frozen=True)
class Comparison(Section):
    """What is compared."""

    path_keys: ClassVar[tuple[str, ...]] = ("base", "reference")
    base: str = MISSING  # the experiment's YAML file
    seeds: list[int] = field(default_factory=lambda: [0])  # of the trainings, whose spread is measured
    reference: Optional[str] = None  # another experiment's YAML file: that of the images FID compares with
    runs: dict[str, Variation] = field(default_factory=dict)  # by name

    def check_models(self, known: tuple[str, ...]) -> None:
        """Make sure that there are rows, and one that the others are compared with."""
        self.check("seeds", len(self.seeds) == len(set(self.seeds)) > 0, "must be a list of different seeds")
        self.check("runs", len(self.runs) > 0, "must be a mapping from names to `models` and `overrides`")
        for name, variation in self.runs.items():
            key = f"runs.{name}.models"
            if not variation.models:
                raise UserError(f"{key}={variation.models}: must be a list of models")
            for model in variation.models:
                if model not in known:
                    raise UserError(f"{key}={model}: {one_of(known, model)}")
                if model == PRETRAINED and variation.overrides:
                    raise UserError(f"{key}={model}: all runs start from the base's, which has the only such row")
        plain = [variation for variation in self.runs.values() if not variation.overrides]
        there = any(PRETRAINED in variation.models for variation in plain)
        rule = "a run without overrides must have the model pretrained, which all rows are compared with"
        self.check("runs", len(plain) == 1 and there, rule)


@dataclass(frozen=True)
class ComparedRun:
    """One variation with one seed: a run."""

    name: str  # of the variation
    seed: int
    models: list[str]
    arguments: list[str]  # of its scripts: --config FILE section.key=value …
    config: Config


def is_comparison(file: str | Path) -> bool:
    """Whether a YAML file lists runs; others are experiments, which load_config reads."""
    try:
        return "runs" in read_mapping(file)
    except UserError:
        return False  # what is wrong with it is told where it is read


def load_comparison(file: str | Path, overrides: list[str], known: tuple[str, ...]) -> tuple[Comparison, list[str]]:
    """Read a comparison.

    Args:
        overrides: `base=FILE`, `seeds=[…]` and `reference=FILE` are its own; the others are the experiment's.
        known: the models that there are.

    Returns:
        it, and the experiment's overrides.
    """
    own = [text for text in overrides if text.partition("=")[0] in OWN_KEYS]
    given = read_mapping(file, Comparison)
    with naming(f"--config {file}"):
        if not is_folder_name(Path(file).stem):
            raise UserError("its table's folder can't be called so")
        try:
            mine = {text.partition("=")[0]: read_override(text, Comparison) for text in own}
            comparison = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Comparison), given, mine))
        except READING_ERRORS as error:
            raise UserError(one_line(error)) from None
        comparison = at_home(comparison)
        comparison.check_models(known)
    return comparison, [text for text in overrides if text not in own]


def compared_runs(comparison: Comparison, overrides: list[str]) -> Iterator[ComparedRun]:
    """The runs, the base first, from whose pretrained network all others start."""
    if comparison.reference is not None:
        statistics = load_config(comparison.reference, []).paths.reference
        overrides = [*overrides, override("evaluate.reference", str(statistics))]
    base = load_config(comparison.base, overrides)
    names = set()
    variations = sorted(comparison.runs.items(), key=lambda item: len(item[1].overrides) > 0)
    for name, variation in variations:
        is_plain = not variation.overrides
        for seed in dict.fromkeys([base.seed] * is_plain + comparison.seeds):
            is_base = is_plain and seed == base.seed
            models = [m for m in variation.models if (is_base if m == PRETRAINED else seed in comparison.seeds)]
            if not models:
                continue
            given, config = overrides, base
            if not is_base:
                with naming(f"runs.{name}"):
                    given, config = varied(comparison.base, base, overrides, name, variation, seed)
            check_no_shared_output(config)
            if config.name in names:
                raise UserError(f"runs.{name}: its run is called {config.name}, as another one; choose another name")
            names.add(config.name)
            yield ComparedRun(name, seed, models, ["--config", for_shell(comparison.base), *given], config)


def check_no_shared_output(config: Config) -> None:
    """Make sure that nothing is written to, or read from, one place by all runs."""
    for name in OF_ONE_RUN:
        section, key = name.split(".")
        settings = getattr(config, section)
        settings.check(key, getattr(settings, key) is None, "each run of a comparison has its own")


def check_what_all_share(base: Config, config: Config) -> None:
    """Make sure that a variation has the base's settings where all runs must."""
    for key in OF_ALL_RUNS:
        value, usual = (attrgetter(key)(one) for one in (config, base))
        if value != usual:
            raise UserError(f"{key}={value}: all runs have the base's, {usual}")


def varied(
    file: str, base: Config, overrides: list[str], name: str, variation: Variation, seed: int
) -> tuple[list[str], Config]:
    """The overrides of a variation's run, and its configuration.

    Where it has another number of ranges, and no finetune.max_steps of its own, its ranges together take as many steps
    as the base's.

    Args:
        overrides: of all runs.
        name: of the variation.
    """
    check_what_all_share(base, load_config(file, [*overrides, *variation.overrides]))
    parts = [base.name]
    if variation.overrides:
        parts.append(name.replace(", ", "-").replace(" ", "_"))
    if seed != base.seed:
        parts.append(f"seed{seed}")
    given = [*overrides, *variation.overrides, override("name", "-".join(parts)), override("seed", seed)]
    given.append(override("model.pretrained", base.paths.pretrained))
    config = load_config(file, given)
    count, usual = len(config.timesteps.ranges), len(base.timesteps.ranges)
    if count != usual and not any(text.startswith("finetune.max_steps=") for text in variation.overrides):
        given.append(override("finetune.max_steps", max(1, base.finetune.max_steps * usual // count)))
        config = load_config(file, given)
    return given, config
