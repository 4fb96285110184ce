"""A comparison as a graph of jobs: which script makes what, and from what."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from deme.config.comparison import ComparedRun, Comparison
from deme.config.paths import image_path
from deme.config.reading import load_config
from deme.config.sections import CONTINUED, DISTILLED, NAMED_TRAININGS
from deme.job.graph import Job

LAST = ("card", "report")  # stages that take seconds, and no GPU
AFTERWARDS = ("merge", "search", "sample", "evaluate", "analyze")
# sections that a script does not read: where these change, its jobs are not started again
UNREAD = {
    "pretrain.py": ("finetune", "distill", *AFTERWARDS),
    "scripts/cache.py": ("distill", *AFTERWARDS),
    "finetune.py": AFTERWARDS,
    "sample_ddp.py": ("pretrain", "finetune", "distill", "merge", "search", "evaluate", "analyze"),
}


def stages_of(
    comparison: Comparison, runs: Sequence[ComparedRun], blocks: int = 1, has_cache: bool = False
) -> list[Job]:
    """All jobs of a comparison, none before one that it needs; what several rows need is one job.

    Args:
        runs: the base first.
        blocks: jobs that draw from each model.
        has_cache: a job decodes and encodes the data before others read it.

    Raises:
        UserError: of any job's configuration, before anything starts.
    """
    stages = Stages(runs[0], blocks)
    stages.add_what_all_need(comparison.reference, has_cache)
    for run in runs:
        stages.add_rows(run)
    return list(stages.by_name.values())


class Stages:
    """The graph while it is made."""

    def __init__(self, base: ComparedRun, blocks: int):
        self.base = base
        self.blocks = blocks
        self.by_name: dict[str, Job] = {}
        self.first: list[Job] = []  # before all trainings, and images of the pretrained network
        self.reference: list[Job] = []  # before scores

    def add(
        self,
        run: ComparedRun,
        stage: str,
        script: str,
        *overrides: str,
        own: str = "",
        output: Path | None,
        after: Sequence[Job] = (),
        after_all: Sequence[Job] = (),
    ) -> Job:
        """A job of a run; the same one where it is there already."""
        arguments = [*run.arguments, *overrides]
        if overrides or own:
            load_config(arguments[1], [*arguments[2:], *([own] if own else [])])
        read = {name: part for name, part in asdict(run.config).items() if name not in UNREAD.get(script, ())}
        settings = json.dumps([read, overrides, own], sort_keys=True)
        job = Job(run.config.name, stage, script, arguments, output, settings, list(after), list(after_all), own)
        return self.by_name.setdefault(job.name, job)

    def add_what_all_need(self, reference: str | None, has_cache: bool) -> None:
        """The pretrained network, the data, and the statistics that images are compared with."""
        base, paths = self.base, self.base.config.paths
        made: list[Job] = []
        if paths.pretrained == str(paths.pretrained_here):
            made = [self.add(base, "pretrain", "pretrain.py", output=paths.pretrained_here)]
        read = [self.add(base, "cache", "scripts/cache.py", output=None, after=made)] if has_cache else []
        self.pretrained = made
        self.first = [*made, *read]
        if reference is not None:
            config = load_config(reference, [])
            run = replace(base, config=config, arguments=["--config", reference])
            base, paths, read = run, config.paths, []
        none = "evaluate.samples=[]"
        self.reference = [self.add(base, "statistics", "evaluate.py", none, output=paths.reference, after=read)]

    def add_rows(self, run: ComparedRun) -> None:
        """The images and scores of a run's models, and what is told of them."""
        paths = run.config.paths
        drawn = {model: self.drawn(run, model) for model in run.models}

        def arguments(there: Sequence[Job]) -> list[str] | None:
            """In the base's features; of the folders whose images are all there."""
            folders = [str(paths.all_samples / model) for model, jobs in drawn.items() if set(jobs) <= set(there)]
            scored = [f"evaluate.samples={json.dumps(folders)}", f"evaluate.output={paths.results}"]
            return [*self.base.arguments, *scored] if folders else None

        waited = [job for jobs in drawn.values() for job in jobs]
        settings = json.dumps([asdict(run.config), asdict(self.base.config.evaluate), run.models], sort_keys=True)
        named = (run.config.name, "evaluate", "evaluate.py")
        scores = Job(*named, arguments, paths.results, settings, self.reference, waited)
        self.by_name[scores.name] = scores
        if "merged" in run.models:  # once more, for its model card
            self.add(run, "card", "merge.py", output=paths.merged / "README.md", after=[scores])
        if run is self.base:
            self.add(run, "report", "report.py", output=paths.report, after=[scores])

    def drawn(self, run: ComparedRun, model: str) -> list[Job]:
        """The jobs that draw a model's images, one for each block of seeds."""
        after = self.made(run, model)
        stage, folder, override = f"sample-{model}", run.config.paths.all_samples / model, f"sample.model={model}"
        if self.blocks == 1:
            return [self.add(run, stage, "sample_ddp.py", override, output=folder, after=after)]
        jobs = []
        parts = replace(run.config.sample, blocks=self.blocks).chosen_blocks
        for number, seeds in enumerate(parts):
            block = {"own": f"sample.block={number}", "output": image_path(folder, seeds[-1])}
            overrides = (override, f"sample.blocks={self.blocks}")
            jobs.append(self.add(run, stage, "sample_ddp.py", *overrides, after=after, **block))
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
        if paths.searched:
            # whose report has the control where that is trained
            controls = [self.trained(run, "train", name, self.first) for name in run.models if name == CONTINUED]
            before = [*experts, *self.reference]
            search = ("search", "search.py")
            experts = [self.add(run, *search, output=paths.best_coefficients, after=before, after_all=controls)]
        return [self.add(run, "merge", "merge.py", output=paths.merged / "merge.yaml", after=experts)]

    def trained(self, run: ComparedRun, stage: str, chosen: str, after: Sequence[Job]) -> Job:
        """The training of a range, by its number, or one that has a name."""
        paths = run.config.paths
        output = paths.finetuning(chosen) / "unet" if chosen in NAMED_TRAININGS else paths.finetuned[int(chosen)]
        return self.add(run, stage, "finetune.py", own=f"finetune.range={chosen}", output=output, after=after)
