"""Compare models: train what is missing, draw, score, and print one table of all rows.

    python compare.py                                             # configs/comparison/models.yaml on the digits
    python compare.py --config configs/comparison/baselines.yaml "seeds=[0, 1, 2]"
    python compare.py --config configs/comparison/ablations.yaml base=configs/cifar10_16.yaml data.name=FOLDER

A comparison lists runs, as overrides of one base configuration, and their models. `base=FILE` and `seeds=[…]` replace
the comparison's own; all other overrides go to every run. What does not depend on each other runs side by side: one job
per GPU, or per core of the CPU (NUM_PROCESSES: GPUs or cores of each job). The same command again goes on where it was
stopped. Writes runs/<name>/comparison/<comparison>/: table.md, rows.json, logs/.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import argparse
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from deme.config.comparison import Comparison, ComparedRun, load_comparison, compared_runs
from deme.config.reading import load_config
from deme.config.sections import CONTINUED, DISTILLED, NAMED_TRAININGS
from deme.errors import RunError, UserError
from deme.job.command import ended_in_one_line
from deme.job.files import REPOSITORY, atomic_file
from deme.job.locks import locked
from deme.job.side_by_side import Job, Jobs, places
from deme.models.variants import ORDER


class Graph:
    """The jobs of a comparison: what several rows need is one job."""

    def __init__(self, processes: int):
        self.processes = processes  # of each job
        self.jobs: dict[str, Job] = {}

    def add(
        self, run: ComparedRun, script: str, *overrides: str, output: Path, after: list[Job], name: str = ""
    ) -> Job:
        """A script's run, after others; the same one where it is there already.

        Args:
            name: instead of the script's and the overrides, for messages.
        """
        title = f"{run.config.name} {name or ' '.join([script.removesuffix('.py'), *overrides])}".replace("/", "-")
        if title not in self.jobs:
            file, *given = run.arguments[1:]
            load_config(file, [*given, *overrides])  # a mistake is told before anything starts
            command = self.command(script, [*run.arguments, *overrides])
            key = json.dumps([asdict(run.config), overrides], sort_keys=True)
            self.jobs[title] = Job(title, command, output, key, after)
        return self.jobs[title]

    def command(self, script: str, arguments: list[str]) -> list[str]:
        """The command line that starts a script."""
        launcher = str(REPOSITORY / "scripts" / "launch.sh")
        return ["bash", launcher, str(self.processes), str(REPOSITORY / script), *arguments]


def plan_jobs(runs: list[ComparedRun], processes: int) -> dict[str, Job]:
    """All jobs by name, each behind those that it needs.

    Args:
        processes: of each job.
    """
    graph = Graph(processes)
    base = runs[0]
    paths = base.config.paths
    first: list[Job] = []
    if base.config.model.pretrained is None:
        first = [graph.add(base, "pretrain.py", output=paths.pretrained_here, after=[])]
    reference = graph.add(
        base, "evaluate.py", "evaluate.samples=[]", output=paths.reference, after=[], name="reference"
    )
    for run in runs:
        drawn = [draw(graph, run, model, first) for model in run.models]
        results = run.config.paths.results
        title = f"{run.config.name} evaluate"
        key = json.dumps([asdict(run.config), asdict(base.config.evaluate), run.models], sort_keys=True)
        command = partial(score_command, graph, base, drawn, results)
        graph.jobs[title] = Job(title, command, results, key, [reference], after_all=drawn)
        if "merged" in run.models:  # once more, for its model card
            card = run.config.paths.merged / "README.md"
            graph.add(run, "merge.py", output=card, after=[graph.jobs[title]], name="model card")
    # what is trained first takes longest, and others wait for it; nothing waits for images
    return dict(sorted(graph.jobs.items(), key=lambda item: " sample_ddp " in item[0]))


def draw(graph: Graph, run: ComparedRun, model: str, first: list[Job]) -> Job:
    """The job that draws a model's images, behind all that make the model."""
    paths = run.config.paths
    made = first
    if model in NAMED_TRAININGS and model != DISTILLED:
        made = [train(graph, run, model, first)]
    elif model in ("ensemble", "merged", DISTILLED):
        made = [train(graph, run, str(k), first) for k in range(len(run.config.timesteps.ranges))]
    if model in ("merged", DISTILLED):
        if paths.searched:
            search = graph.add(run, "search.py", output=paths.best_coefficients, after=made)
            # whose report has the control where that is trained
            search.after_all = [train(graph, run, name, first) for name in run.models if name == CONTINUED]
            made = [search]
        made = [graph.add(run, "merge.py", output=paths.merged / "merge.yaml", after=made)]
    if model == DISTILLED:
        made = [train(graph, run, DISTILLED, made)]
    output = paths.all_samples / model
    return graph.add(run, "sample_ddp.py", f"sample.model={model}", output=output, after=made)


def train(graph: Graph, run: ComparedRun, chosen: str, after: list[Job]) -> Job:
    """The training of a range, by its number, or one that has a name."""
    paths = run.config.paths
    output = paths.finetuning(chosen) / "unet" if chosen in NAMED_TRAININGS else paths.finetuned[int(chosen)]
    return graph.add(run, "finetune.py", f"finetune.range={chosen}", output=output, after=after)


def score_command(graph: Graph, base: ComparedRun, drawn: list[Job], results: Path) -> list[str] | None:
    """evaluate.py for a run's folders that are drawn, in the base's features; None where there is none."""
    there = [str(job.output) for job in drawn if job.state in ("done", "unchanged")]
    samples = f"evaluate.samples={json.dumps(there)}"
    return graph.command("evaluate.py", [*base.arguments, samples, f"evaluate.output={results}"]) if there else None


def processes_per_job() -> int:
    """NUM_PROCESSES of the environment, or 1.

    Raises:
        UserError: not a number.
    """
    given = os.environ.get("NUM_PROCESSES", "1")
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"NUM_PROCESSES={given}: must be a whole number above 0")
    return int(given)


def main(comparison: Comparison, file: str, runs: list[ComparedRun], processes: int) -> None:
    """Run the jobs, then make the table of what there is."""
    base = runs[0]
    output = base.config.paths.run / "comparison" / Path(file).stem
    where = places(processes)
    if not where:
        raise UserError(f"NUM_PROCESSES={processes}: more than there are GPUs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # whose python the launcher starts
    planned = plan_jobs(runs, processes)
    with locked(output, "output_dir"):
        jobs = Jobs(list(planned.values()), output, [place | {"PATH": path} for place in where])
        print(f"{len(planned)} jobs, {len(where)} at a time; logs in {output / 'logs'}", flush=True)
        jobs.run()

        from deme.measure.scores import load_scores
        from deme.report.comparison import compared_rows, comparison_table
        from deme.report.tables import score_table

        results = base.config.paths.results
        if results.is_file():
            features, scores = load_scores(results)
            print(f"\n{score_table(scores, features)}\n{results}")
        rows = compared_rows(runs, jobs)
        table = comparison_table(rows, base.config.evaluate.features)
        with atomic_file(output / "rows.json") as temporary:
            temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
        with atomic_file(output / "table.md") as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}\n{output / 'table.md'}")
    failed = [job for job in jobs.jobs if job.state == "failed"]
    if failed:
        dropped = [job.name for job in jobs.jobs if job.state == "dropped"]
        unmade = f"; not tried without it: {', '.join(dropped)}" if dropped else ""
        raise RunError("; ".join(f"{job.name}: {job.error}" for job in failed) + unmade)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(REPOSITORY / "configs/comparison/models.yaml"), metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with ended_in_one_line(parser.prog) as run_folder:
        arguments = parser.parse_intermixed_args()
        comparison, overrides = load_comparison(arguments.config, arguments.overrides, ORDER)
        runs = list(compared_runs(comparison, overrides))
        run_folder.append(runs[0].config.paths.run)
        processes = processes_per_job()
        if arguments.dry_run:
            print("\n".join(plan_jobs(runs, processes)))
        else:
            main(comparison, arguments.config, runs, processes)
