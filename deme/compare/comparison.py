"""A comparison: which runs it has (configs/comparison/), and the graph of jobs that make and score their models."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from deme.compare.jobs import Job, outside, state_of, state_outside
from deme.config.experiment import Config
from deme.config.networks import (
    MERGE_STATISTICS,
    RANDOM,
    RANDOM_DIRECTIONS,
    RANGES,
    TRAJECTORY,
    WITH_STATISTICS,
    Network,
    makes_lora,
    of_word,
)
from deme.config.paths import LORA, UNET, for_shell, image_path, with_schedule
from deme.config.reading import load_config, override
from deme.config.section import Section, is_folder_name, one_of, setting
from deme.config.sections import COEFFICIENTS, SCALES
from deme.config.trainings import CONTINUED, DISTILLED, NAMED_TRAININGS, NEON, SELF, SOUP
from deme.errors import UserError, naming, shown
from deme.job.repository import found_path
from deme.models.variants import ORDER

OWN_KEYS = ("base", "seeds", "reference")  # overrides of the comparison; all others are the experiment's
PRETRAINED = "pretrained"
LAST = ("card", "report")  # stages that take seconds, and no GPU


@dataclass(frozen=True)
class Variation:
    """The base configuration with overrides; each seed makes a run of its own."""

    models: list[str] = field(default_factory=list)  # as in sample.model; a row for each
    overrides: list[str] = field(default_factory=list)  # section.key=value; none: the base itself


@dataclass(frozen=True)
class Comparison(Section):
    """A file of configs/comparison/."""

    section: ClassVar[str] = ""
    base: str = setting("", "path")  # the experiment's YAML file
    seeds: list[int] = field(default_factory=lambda: [0])  # of the trainings
    reference: str | None = setting(None, "path")  # YAML file of another experiment, whose images FID compares with
    overrides: list[str] = field(default_factory=list)  # section.key=value of all runs
    runs: dict[str, Variation] = field(default_factory=dict)  # by name

    def check_together(self) -> None:
        self.check("seeds", len(self.seeds) == len(set(self.seeds)) > 0, "must be a list of different seeds")
        self.check("runs", len(self.runs) > 0, "must be a mapping from names to `models` and `overrides`")
        for name, variation in self.runs.items():
            if not 0 < len(variation.models) == len(set(variation.models)):
                raise UserError(f"runs.{name}.models={variation.models}: must be a list of different models")
            for model in variation.models:
                with naming(f"runs.{name}.models", model):
                    if model not in ORDER:
                        raise UserError(one_of(ORDER, model))
                    is_scaled = any(text.startswith(f"sample.{SCALES}=") for text in variation.overrides)
                    if model == PRETRAINED and variation.overrides and not is_scaled:
                        rule = f"with sample.{SCALES} alone; all runs start from the base's, which has the row without"
                        raise UserError(rule)
        plain = [variation for variation in self.runs.values() if not variation.overrides]
        rule = "a run without overrides must have the model pretrained, which all rows are compared with"
        self.check("runs", len(plain) == 1 and PRETRAINED in plain[0].models, rule)


@dataclass(frozen=True)
class ComparedRun:
    """A variation with one seed."""

    name: str  # the variation's
    models: list[str]
    arguments: list[str]  # of its scripts: --config FILE section.key=value …
    config: Config
    trained_by: "ComparedRun | None" = None  # an earlier run with the same trainings, whose networks this one takes


def load_comparison(file: str | Path, overrides: list[str]) -> tuple[Comparison, list[ComparedRun]]:
    """Read a comparison and its runs. The first one is the base, from whose pretrained network the others start.

    Overrides of OWN_KEYS change the comparison, all others go to every run.
    """
    if not is_folder_name(Path(file).stem):
        raise UserError(f"--config {file}: no folder, such as its table's, can have this name")
    own = [text for text in overrides if text.partition("=")[0] in OWN_KEYS]
    comparison = load_config(found_path(file), own, Comparison)
    comparison = replace(comparison, base=str(found_path(comparison.base)))
    others = [*comparison.overrides, *(text for text in overrides if text not in own)]
    return comparison, list(_compared_runs(comparison, others))


def _compared_runs(comparison: Comparison, overrides: list[str]) -> Iterator[ComparedRun]:
    """The runs, the base first; `overrides` go to all of them.

    If a variation has another number of ranges, all ranges together take as many steps as the base's, unless it sets
    finetune.max_steps.
    """
    if comparison.reference is not None:
        statistics = load_config(comparison.reference, []).paths.reference
        overrides = [*overrides, override("evaluate.reference", str(statistics))]
    base = load_config(comparison.base, overrides)
    names, trainers = set(), []
    for name, variation in sorted(comparison.runs.items(), key=lambda item: len(item[1].overrides) > 0):
        varied, is_plain = [*overrides, *variation.overrides], not variation.overrides
        with naming(f"runs.{name}"):
            config = load_config(comparison.base, varied)
            for section, usual in zip(config.all_sections, base.all_sections, strict=True):
                for key, value in section.tagged("one_run").items():
                    section.check(key, value is None, "each run of a comparison has its own")
                for key, value in usual.tagged("all_runs").items():
                    section.check(key, getattr(section, key) == value, f"all runs have the base's, {shown(value)}")
        own: dict[str, Any] = {"model.pretrained": base.paths.pretrained}
        count, usual = len(config.timesteps.ranges), len(base.timesteps.ranges)
        if count != usual and not any(text.startswith("finetune.max_steps=") for text in variation.overrides):
            own["finetune.max_steps"] = max(1, base.finetune.max_steps * usual // count)
        full_name = base.name if is_plain else f"{base.name}-{name.replace(', ', '-').replace(' ', '_')}"
        for seed in dict.fromkeys([base.seed] * is_plain + comparison.seeds):
            is_base = is_plain and seed == base.seed
            models = [
                m for m in variation.models if (is_base if is_plain and m == PRETRAINED else seed in comparison.seeds)
            ]
            if not models:
                continue
            own |= {"name": full_name if seed == base.seed else f"{full_name}-seed{seed}", "seed": seed}
            given = overrides if is_base else [*varied, *(override(key, value) for key, value in own.items())]
            with naming(f"runs.{name}"):
                config = load_config(comparison.base, given)
                trainer = next((run for run in trainers if trains_alike(run.config, config, models)), None)
                if trainer is not None:
                    given.append(override("merge.finetuned", str(trainer.config.paths.finetuning(""))))
                    config = load_config(comparison.base, given)
                if config.name in names:
                    raise UserError(f"its run is called {config.name}, as another one; choose another name")
            names.add(config.name)
            run = ComparedRun(name, models, ["--config", for_shell(comparison.base), *given], config, trainer)
            trainers += [run] if trainer is None else []
            yield run


def trains_alike(earlier: Config, config: Config, models: Sequence[str]) -> bool:
    """True if finetune.py would train the networks of these models, but for `distilled`, as in an earlier run.

    The earlier run may keep more snapshots.
    """

    def read(one: Config) -> dict[str, Any]:
        settings = one.read_by("finetune.py") | {"name": "", "distill": None}
        settings["finetune"] = settings["finetune"] | {"snapshot_every": None}
        return settings | {"model": settings["model"] | {"pretrained": one.paths.pretrained}}  # null in the base

    every, kept = config.finetune.snapshot_every, earlier.finetune.snapshot_every
    has_snapshots = every is None or (kept is not None and every % kept == 0)
    draws = NEON in models or SELF in config.merge.experts  # own samples
    alike = has_snapshots and read(config) == read(earlier)
    return alike and (not draws or config.sample.tagged("samples") == earlier.sample.tagged("samples"))


class Stages:
    """All jobs of a comparison, each behind those that it needs. What several rows need is one job.

    `blocks` jobs draw from each model. With `has_cache` a job decodes and encodes the data before others read it.
    """

    def __init__(self, comparison: Comparison, runs: Sequence[ComparedRun], blocks: int = 1, has_cache: bool = False):
        self.base, self.blocks, self.state_outside = runs[0], blocks, cache(state_outside)
        self.by_name: dict[str, Job] = {}
        self.pretrained: list[Job] = []  # make the pretrained network
        base, paths = self.base, self.base.config.paths
        if paths.pretrained == str(paths.pretrained_here):
            parts = [paths.pretrained_here / part for part in (UNET, "scheduler", "pretrain.yaml")]
            # not the encoders, which merge.py may hard-link
            self.pretrained = [self._add(base, "pretrain", "pretrain.py", output=paths.pretrained_here, parts=parts)]
        caches = [self._add(base, "cache", "scripts/cache.py", output=None, after=self.pretrained)] if has_cache else []
        self.first = [*self.pretrained, *caches]  # before trainings
        judges = base.config.evaluate.features
        if (file := comparison.reference) is not None:
            base, caches = replace(base, arguments=["--config", for_shell(file)]), []
        # before scores: what images are compared with; the first judge's has a job of its own, for searches
        self.reference: list[Job] = []
        for some in [judges[0], *filter(None, [judges[1:]])] if isinstance(judges, list) else [None]:
            given = base.arguments + [override("evaluate.features", some)] * (some is not None)
            run = replace(base, config=load_config(given[1], given[2:]), arguments=given)
            names, paths = [judge.name for judge in run.config.evaluate.judges], run.config.paths
            made = [*map(paths.reference_in, names), *[paths.classifier] * ("classifier" in names)]
            job = {"output": made[0], "parts": made, "after": [*caches, *self.reference]}
            stage = "further-statistics" if self.reference else "statistics"
            self.reference.append(self._add(run, stage, "evaluate.py", "evaluate.samples=[]", **job))
        for run in runs:
            self._add_rows(run)
        self.jobs = list(self.by_name.values())

    def _add(self, run: ComparedRun, stage: str, script: str, *overrides: str, inputs: Any = (), **others: Any) -> Job:
        """A job of a run, which is made once; `others` are its other fields, and `inputs` more that it depends on."""
        own = others.get("own", "")
        name = f"{run.config.name} {stage} {own}".rstrip()
        if name not in self.by_name:
            if overrides or own:  # a mistake is reported before any job starts
                load_config(run.arguments[1], [*run.arguments[2:], *overrides, *filter(None, [own])])
            made = None if self.base.config.model.pretrained else str(self.base.config.paths.pretrained_here)
            states = [self.state_outside(path) for path in outside(run.config, script) if path != made]
            read = json.dumps([run.config.read_by(script), [overrides, own, inputs], states], sort_keys=True)
            key = hashlib.sha256(read.encode()).hexdigest()[:16]
            given = {"arguments": [*run.arguments, *overrides], "key": key} | others
            self.by_name[name] = Job(run.config.name, stage, script, **given)
        return self.by_name[name]

    def _add_rows(self, run: ComparedRun) -> None:
        """The jobs that draw and score a run's models, and describe them."""
        paths = run.config.paths
        drawn = {model: self._drawn(run, model) for model in run.models}

        def arguments(there: Sequence[Job]) -> list[str] | None:  # scores the complete folders, in the base's features
            complete = [model for model, jobs in drawn.items() if set(jobs) <= set(there)]
            folders = [str(folder) for model in complete for folder in sample_folders(run, model)]
            scored = [override("evaluate.samples", folders), override("evaluate.output", str(paths.results))]
            return [*self.base.arguments, *scored] if folders else None

        waits = {"after": self.reference, "after_all": list(chain(*drawn.values()))}
        inputs = [asdict(self.base.config.evaluate), run.models]
        scored = {"output": paths.results, "arguments": arguments, "inputs": inputs}
        told = {"after": [self._add(run, "evaluate", "evaluate.py", **scored, **waits)], "single_process": True}
        if "merged" in run.models and not makes_lora(run.config):  # the model card shows the scores
            self._add(run, "card", "merge.py", output=paths.merged / "README.md", **told)
        if run is self.base:
            pictures = state_of(map(for_shell, paths.plots.glob("analysis-*.png")))
            self._add(run, "report", "report.py", output=paths.report, inputs=pictures, **told)

    def _drawn(self, run: ComparedRun, model: str) -> list[Job]:
        """The jobs that draw a model's images with all schedules, one for each block of seeds."""
        folders, before = sample_folders(run, model), self._made(run, model)
        if run.config.sample.prediction_scale == "search":
            before = [*before, self._searched(run, SCALES, self.pretrained)]
        overrides = [f"sample.model={model}"] + [f"sample.blocks={self.blocks}"] * (self.blocks > 1)
        jobs = []
        for number, seeds in enumerate(replace(run.config.sample, blocks=self.blocks).chosen_blocks):
            images = [image_path(folder, seed) for folder in folders for seed in seeds]
            job = {"own": f"sample.block={number}" * (self.blocks > 1), "output": images[-1], "parts": images}
            job["inputs"] = self._given(run.config.experts) if model == "ensemble" else ()
            jobs.append(self._add(run, f"sample-{model}", "sample_ddp.py", *overrides, **job, after=before))
        return jobs

    def _made(self, run: ComparedRun, model: str) -> list[Job]:
        """The jobs that make a model."""
        if model in NAMED_TRAININGS:
            return [self._trained(run, model)]
        if model not in ("ensemble", "merged", NEON):
            return self.pretrained
        paths = run.config.paths
        if model == NEON:
            chosen = ["merge.experts=[self]", "merge.coefficients=null", override("merge.output", str(paths.neon))]
            # not as, and not where, the experts are merged
            chosen += ["merge.method=task_arithmetic", "merge.settings={}", "merge.push_to_hub=null"]
            own = self._networks(run, list(of_word(run.config, SELF)))
            return self._merged(run, "merge-neon", paths.neon, own, *chosen)
        experts = self._networks(run, run.config.experts if model == "ensemble" else run.config.merged_networks)
        if model == "ensemble":
            return experts
        if run.config.merge.method in WITH_STATISTICS:
            trainer, chosen = run.trained_by or run, override("merge.experts", run.config.merge.experts)
            measured = {"output": paths.merge_statistics, "own": chosen, "after": experts}
            measured["inputs"] = self._given(run.config.merged_networks)
            experts = [*experts, self._add(trainer, "merge-statistics", MERGE_STATISTICS, **measured)]
        before = [self._searched(run, COEFFICIENTS, experts)] if run.config.needs_search else experts
        return self._merged(run, "merge", paths.merged, before)

    def _searched(self, run: ComparedRun, over: str, before: Sequence[Job]) -> Job:
        """The search of a run, which has to be one over this."""
        search, config = run.config.search, run.config
        search.check("over", search.over == over, f"a search over {over} is needed for the models {run.models}")
        config.check_search()
        # the search's report has a row of the control if it is trained
        has_control = CONTINUED in run.models and search.report_images > 0
        controls = [self._trained(run, CONTINUED)] if has_control else []
        waits = {"after": [*before, *self.reference[:1]], "after_all": controls}
        return self._add(run, "search", "search.py", output=config.paths.best_coefficients, **waits)

    def _networks(self, run: ComparedRun, networks: Sequence[Network]) -> list[Job]:
        """The jobs that make networks; what another run trains alike is trained there."""
        trainer, jobs = run.trained_by or run, []
        for word in dict.fromkeys(network.word for network in networks):
            if word == RANGES:
                jobs += [self._trained(trainer, str(number)) for number in range(len(run.config.timesteps.ranges))]
            elif word == RANDOM:
                parts, experts = [one.folder.parent for one in of_word(trainer.config, word)], trainer.config.experts
                made = {"output": parts[-1], "parts": parts, "after": self._networks(trainer, experts)}
                made |= {"inputs": self._given(experts), "single_process": True}
                jobs.append(self._add(trainer, RANDOM, RANDOM_DIRECTIONS, **made))
            elif word is not None:
                jobs.append(self._trained(trainer, CONTINUED if word == TRAJECTORY else word))
        return jobs

    def _given(self, networks: Sequence[Network]) -> list[list[str]]:
        """What stands for the networks that are folders which no job makes."""
        return [[str(one.folder), self.state_outside(str(one.folder))] for one in networks if one.word is None]

    def _merged(self, run: ComparedRun, stage: str, folder: Path, experts: Sequence[Job], *overrides: str) -> list[Job]:
        of_lora = makes_lora(load_config(run.arguments[1], [*run.arguments[2:], *overrides]))
        parts = [folder / name for name in ([LORA] if of_lora else [UNET, "scheduler", "model_index.json"])]
        merge = {"output": folder / "merge.yaml", "after": list(experts), "single_process": True}
        return [self._add(run, stage, "merge.py", *overrides, parts=[merge["output"], *parts], **merge)]

    def _trained(self, run: ComparedRun, chosen: str) -> Job:
        """The training of a range, given its number, of a model of NAMED_TRAININGS, on own samples, or of the soup."""
        config, stage, after = run.config, "train", self.first
        if chosen == DISTILLED:  # the teachers are the ranges' experts, whatever is merged
            stage, teachers = "distill", [] if RANGES in config.merge.experts else config.experts
            after = [*self._made(run, "merged"), *self._networks(run, teachers)]
        names = {str(number): [name] for number, name in enumerate(config.timesteps.names)}
        names = (names | {SELF: config.self_trained_names, SOUP: config.soup_names}).get(chosen, [chosen])
        parts = [*(config.snapshots(CONTINUED) if chosen == CONTINUED else []), *map(config.paths.trained, names)]
        made = {"output": parts[-1], "parts": parts, "after": after, "own": f"finetune.range={chosen}"}
        made["inputs"] = config.sample.tagged("samples") if chosen == SELF else ()
        return self._add(run, stage, "finetune.py", **made)


def sample_folders(run: ComparedRun, model: str) -> list[Path]:
    """The folders of a model's images, one for each schedule."""
    return [run.config.paths.all_samples / with_schedule(model, name) for name in run.config.schedule_names]
