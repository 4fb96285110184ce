"""A comparison as a graph of jobs: which script makes what, and from what."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from glob import glob
from pathlib import Path
from typing import Any

from deme.compare.comparison import ComparedRun, Comparison
from deme.compare.graph import Job, state_of
from deme.config.experiment import Config
from deme.config.paths import DENOISER, for_shell, image_path
from deme.config.reading import load_config, override
from deme.config.sections import CONTINUED, DISTILLED, NAMED_TRAININGS
from deme.job.files import REPOSITORY, sha256

LAST = ("card", "report")  # stages that take seconds, and no GPU
LINKED = ("vae", "text_encoder")  # parts of a pipeline whose weights merge.py gives another name


def stages_of(
    comparison: Comparison, runs: Sequence[ComparedRun], blocks: int = 1, has_cache: bool = False
) -> list[Job]:
    """All jobs of a comparison, each behind those that it needs. What several rows need is one job.

    Args:
        runs: the base first.
        blocks: number of jobs that draw from each model.
        has_cache: whether a job decodes and encodes the data before others read it.
    """
    stages = Stages(runs[0], blocks)
    stages.add_what_all_need(comparison.reference, has_cache)
    for run in runs:
        stages.add_rows(run)
    return list(stages.by_name.values())


class Stages:
    """The graph under construction."""

    def __init__(self, base: ComparedRun, blocks: int):
        self.base = base
        self.blocks = blocks
        self.by_name: dict[str, Job] = {}
        self.states: dict[str, str] = {}  # of files that no job makes, by path
        self.pretrained: list[Job] = []  # make the pretrained network
        self.first: list[Job] = []  # the jobs before trainings
        self.reference: list[Job] = []  # the jobs before scores

    def add(
        self, run: ComparedRun, stage: str, script: str, *overrides: str, own: str = "", output: Path | None, **others
    ) -> Job:
        """A job of a run, which is made once; `others` are its other fields, or `inputs`: more that it depends on."""
        name = f"{run.config.name} {stage} {own}".rstrip()
        if name not in self.by_name:
            arguments = [*run.arguments, *overrides]
            if overrides or own:  # a mistake is reported before any job starts
                load_config(arguments[1], [*arguments[2:], *([own] if own else [])])
            settings = self.settings(run.config, script, overrides, own, others.pop("inputs", ()))
            self.by_name[name] = Job(run.config.name, stage, script, arguments, output, settings, own=own, **others)
        return self.by_name[name]

    def settings(self, config: Config, script: str, *others: Any) -> str:
        """All that a job's output depends on except what other jobs make, as text."""
        read = config.read_by(script)
        made = None if self.base.config.model.pretrained else str(self.base.config.paths.pretrained_here)
        given = [path for path in outside(config, script) if path != made]
        for path in given:
            self.states[path] = self.states.get(path) or state_outside(path)
        return json.dumps([read, others, [self.states[path] for path in given]], sort_keys=True)

    def add_what_all_need(self, reference: str | None, has_cache: bool) -> None:
        """The pretrained network, the data, and the statistics that images are compared with."""
        base, paths = self.base, self.base.config.paths
        if paths.pretrained == str(paths.pretrained_here):
            parts = [paths.pretrained_here / part for part in (DENOISER, "scheduler", "pretrain.yaml")]
            # not the encoders, which merge.py may hard-link
            self.pretrained = [self.add(base, "pretrain", "pretrain.py", output=paths.pretrained_here, parts=parts)]
        cache: list[Job] = []
        if has_cache:
            cache = [self.add(base, "cache", "scripts/cache.py", output=None, after=self.pretrained)]
        self.first = [*self.pretrained, *cache]
        if reference is not None:
            base = replace(base, config=load_config(reference, []), arguments=["--config", for_shell(reference)])
            cache = []
        output = base.config.paths.reference
        made = {"output": output, "parts": [output, base.config.paths.classifier]}
        self.reference = [self.add(base, "statistics", "evaluate.py", "evaluate.samples=[]", after=cache, **made)]

    def add_rows(self, run: ComparedRun) -> None:
        """The jobs that draw and score a run's models, and describe them."""
        paths = run.config.paths
        drawn = {model: self.drawn(run, model) for model in run.models}

        def arguments(there: Sequence[Job]) -> list[str] | None:
            """Score the complete folders, in the base's features."""
            folders = [str(paths.all_samples / model) for model, jobs in drawn.items() if set(jobs) <= set(there)]
            scored = [override("evaluate.samples", folders), override("evaluate.output", str(paths.results))]
            return [*self.base.arguments, *scored] if folders else None

        images = [job for jobs in drawn.values() for job in jobs]
        settings = self.settings(run.config, "evaluate.py", asdict(self.base.config.evaluate), run.models)
        made_from = {"settings": settings, "after": self.reference, "after_all": images}
        scores = Job(run.config.name, "evaluate", "evaluate.py", arguments, paths.results, **made_from)
        self.by_name[scores.name] = scores
        if "merged" in run.models:  # the model card shows the scores
            self.add(run, "card", "merge.py", output=paths.merged / "README.md", after=[scores], single_process=True)
        if run is self.base:
            pictures = state_of(map(for_shell, paths.plots.glob("analysis-*.png")))
            told = {"after": [scores], "inputs": pictures, "single_process": True}
            self.add(run, "report", "report.py", output=paths.report, **told)

    def drawn(self, run: ComparedRun, model: str) -> list[Job]:
        """The jobs that draw a model's images, one for each block of seeds."""
        folder, before = run.config.paths.all_samples / model, self.made(run, model)
        overrides = [f"sample.model={model}"] + [f"sample.blocks={self.blocks}"] * (self.blocks > 1)
        jobs = []
        for number, seeds in enumerate(replace(run.config.sample, blocks=self.blocks).chosen_blocks):
            images = [image_path(folder, seed) for seed in seeds]
            job = {"own": f"sample.block={number}" if self.blocks > 1 else "", "output": images[-1], "parts": images}
            jobs.append(self.add(run, f"sample-{model}", "sample_ddp.py", *overrides, **job, after=before))
        return jobs

    def made(self, run: ComparedRun, model: str) -> list[Job]:
        """The jobs that make a model."""
        if model == DISTILLED:
            return [self.trained(run, "distill", DISTILLED, self.made(run, "merged"))]
        if model in NAMED_TRAININGS:
            return [self.trained(run, "train", model, self.first)]
        if model not in ("ensemble", "merged"):
            return self.pretrained
        numbers = range(len(run.config.timesteps.ranges))
        experts = [self.trained(run, "train", str(number), self.first) for number in numbers]
        if model == "ensemble":
            return experts
        paths = run.config.paths
        if run.config.needs_search:
            # the search's report has a row of the control if it is trained
            has_control = CONTINUED in run.models and run.config.search.report_images > 0
            controls = [self.trained(run, "train", CONTINUED, self.first)] if has_control else []
            before = {"after": [*experts, *self.reference], "after_all": controls}
            experts = [self.add(run, "search", "search.py", output=paths.best_coefficients, **before)]
        parts = [paths.merged / part for part in ("merge.yaml", DENOISER, "scheduler", "model_index.json")]
        return [self.add(run, "merge", "merge.py", output=parts[0], parts=parts, after=experts, single_process=True)]

    def trained(self, run: ComparedRun, stage: str, chosen: str, after: Sequence[Job]) -> Job:
        """The training of a range, given its number, or of a model of NAMED_TRAININGS."""
        paths = run.config.paths
        output = paths.trained(chosen) if chosen in NAMED_TRAININGS else paths.finetuned[int(chosen)]
        return self.add(run, stage, "finetune.py", own=f"finetune.range={chosen}", output=output, after=list(after))


def outside(config: Config, script: str) -> list[str]:
    """Files and folders that a script reads and no job makes; the script runs again when they change."""
    given: list[Any] = [] if script in ("merge.py", "sample_ddp.py") else [config.data.name]
    pipelines = [config.model.pretrained, config.pretrain.encoders if script == "pretrain.py" else None]
    for source in pipelines:  # as find_pipeline looks for them
        given += [folder for folder in (source, REPOSITORY / source) if os.path.isdir(folder)][:1] if source else []
    if script in ("merge.py", "search.py") and config.merge.coefficients != "search":
        given.append(config.merge.coefficients)
    if script in ("sample_ddp.py", "search.py"):
        given.append(config.sample.prompts)
    if script in ("evaluate.py", "search.py"):
        given.append(config.evaluate.clip_model)
    return [str(path) for path in given if isinstance(path, str | Path) and os.path.exists(path)]


def state_outside(path: str) -> str:
    """The state of a file or folder that no job makes.

    merge.py may hard-link a pipeline's encoders, which sets their ctime: their weights are hashed instead.
    """
    linked = [file for part in LINKED for file in sorted(Path(path, part).glob("*.safetensors"))]
    if not linked:
        return state_of([for_shell(path)])
    others = {Path(path, name) for name in glob("**", root_dir=path, recursive=True, include_hidden=True)} - set(linked)
    return " ".join([state_of(for_shell(file) for file in others if file.is_file()), *map(sha256, linked)])
