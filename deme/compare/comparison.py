"""Which runs are compared: variations of one experiment, each with its models (configs/comparison/)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from omegaconf import MISSING, OmegaConf

from deme.config.experiment import Config
from deme.config.paths import for_shell
from deme.config.reading import READING_ERRORS, load_config, override, read_mapping, read_override
from deme.config.section import Section, is_folder_name, one_of, setting
from deme.errors import UserError, naming, one_line, shown
from deme.models.variants import ORDER

OWN_KEYS = ("base", "seeds", "reference")  # overrides of the comparison; all others are the experiment's
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Variation:
    """The base configuration with overrides; each seed makes a run of its own."""

    models: list[str] = field(default_factory=list)  # as in sample.model; a row for each
    overrides: list[str] = field(default_factory=list)  # section.key=value; none: the base itself


@dataclass(frozen=True)
class Comparison(Section):
    """A file of configs/comparison/."""

    section: ClassVar[str] = ""
    base: str = setting(MISSING, "path")  # the experiment's YAML file
    seeds: list[int] = field(default_factory=lambda: [0])  # of the trainings
    reference: str | None = setting(None, "path")  # YAML file of another experiment, whose images FID compares with
    runs: dict[str, Variation] = field(default_factory=dict)  # by name

    def check_together(self) -> None:
        self.check("seeds", len(self.seeds) == len(set(self.seeds)) > 0, "must be a list of different seeds")
        self.check("runs", len(self.runs) > 0, "must be a mapping from names to `models` and `overrides`")
        for name, variation in self.runs.items():
            if not variation.models:
                raise UserError(f"runs.{name}.models={variation.models}: must be a list of models")
            for model in variation.models:
                with naming(f"runs.{name}.models", model):
                    if model not in ORDER:
                        raise UserError(one_of(ORDER, model))
                    if model == PRETRAINED and variation.overrides:
                        raise UserError("all runs start from the base's, which has the only such row")
        plain = [variation for variation in self.runs.values() if not variation.overrides]
        rule = "a run without overrides must have the model pretrained, which all rows are compared with"
        self.check("runs", len(plain) == 1 and PRETRAINED in plain[0].models, rule)


@dataclass(frozen=True)
class ComparedRun:
    """A variation with one seed."""

    name: str  # the variation's
    seed: int
    models: list[str]
    arguments: list[str]  # of its scripts: --config FILE section.key=value …
    config: Config


def load_comparison(file: str | Path, overrides: list[str]) -> tuple[Comparison, list[ComparedRun]]:
    """Read a comparison and its runs. The first one is the base, from whose pretrained network the others start.

    Overrides of OWN_KEYS change the comparison, all others go to every run.
    """
    own = [text for text in overrides if text.partition("=")[0] in OWN_KEYS]
    given = read_mapping(file, Comparison)
    with naming(f"--config {file}"):
        if not is_folder_name(Path(file).stem):
            raise UserError("no folder, such as its table's, can have this name")
        try:
            mine = {text.partition("=")[0]: read_override(text, Comparison) for text in own}
            comparison = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Comparison), given, mine)).at_home()
        except READING_ERRORS as error:
            raise UserError(one_line(error)) from None
    return comparison, list(_compared_runs(comparison, [text for text in overrides if text not in own]))


def _compared_runs(comparison: Comparison, overrides: list[str]) -> Iterator[ComparedRun]:
    """The runs, the base first; `overrides` go to all of them."""
    if comparison.reference is not None:
        statistics = load_config(comparison.reference, []).paths.reference
        overrides = [*overrides, override("evaluate.reference", str(statistics))]
    base = load_config(comparison.base, overrides)
    names = set()
    for name, variation in sorted(comparison.runs.items(), key=lambda item: len(item[1].overrides) > 0):
        is_plain = not variation.overrides
        for seed in dict.fromkeys([base.seed] * is_plain + comparison.seeds):
            is_base = is_plain and seed == base.seed
            models = [m for m in variation.models if (is_base if m == PRETRAINED else seed in comparison.seeds)]
            if not models:
                continue
            given, config = overrides, base
            if not is_base:
                with naming(f"runs.{name}"):
                    given = [*overrides, *variation.overrides, *_own_overrides(comparison, base, overrides, name, seed)]
                    config = load_config(comparison.base, given)
            for section in config.all_sections:
                for key, value in section.tagged("one_run").items():
                    section.check(key, value is None, "each run of a comparison has its own")
            if config.name in names:
                raise UserError(f"runs.{name}: its run is called {config.name}, as another one; choose another name")
            names.add(config.name)
            yield ComparedRun(name, seed, models, ["--config", for_shell(comparison.base), *given], config)


def _own_overrides(comparison: Comparison, base: Config, overrides: list[str], name: str, seed: int) -> list[str]:
    """What a variation's run has for itself.

    If it has another number of ranges, all ranges together take as many steps as the base's, unless the variation sets
    finetune.max_steps.
    """
    varied = comparison.runs[name].overrides
    config = load_config(comparison.base, [*overrides, *varied])
    for section, usual in zip(config.all_sections, base.all_sections, strict=True):
        for key, value in usual.tagged("all_runs").items():
            section.check(key, getattr(section, key) == value, f"all runs have the base's, {shown(value)}")
    full_name = base.name
    full_name += f"-{name}".replace(", ", "-").replace(" ", "_") if varied else ""
    full_name += f"-seed{seed}" if seed != base.seed else ""
    own = {"name": full_name, "seed": seed, "model.pretrained": base.paths.pretrained}
    count, usual = len(config.timesteps.ranges), len(base.timesteps.ranges)
    if count != usual and not any(text.startswith("finetune.max_steps=") for text in varied):
        own["finetune.max_steps"] = max(1, base.finetune.max_steps * usual // count)
    return [override(key, value) for key, value in own.items()]
