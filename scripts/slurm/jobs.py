"""Submit an experiment or a comparison to Slurm, or tell where it stands: what submit.sh and status.sh start.

    python scripts/slurm/jobs.py submit|status FILE [overrides]

In the repository's root. The jobs are those of compare.py; an experiment alone is compared as
configs/comparison/models.yaml has it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import argparse
import os
import shlex

from deme.config.comparison import compared_runs, is_comparison, load_comparison
from deme.errors import RunError
from deme.job.command import ended_in_one_line
from deme.job.files import make_folder
from deme.job.graph import Job, Ledger
from deme.job.locks import locked
from deme.job.slurm import Queue, submit
from deme.job.stages import LAST, stages_of
from deme.models.variants import ORDER

MODELS = "configs/comparison/models.yaml"


def plan_jobs(file: str, overrides: list[str]) -> tuple[Path, list[Job]]:
    """The comparison's folder, and its jobs; the last one does what takes seconds, and makes the table."""
    if not is_comparison(file):
        file, overrides = MODELS, [f"base={file}", *overrides]
    comparison, others = load_comparison(file, overrides, ORDER)
    runs = list(compared_runs(comparison, others))
    jobs = stages_of(comparison, runs, int(os.environ["BLOCKS"]), has_cache=True)
    jobs = [job for job in jobs if job.stage not in LAST]
    scores = [job for job in jobs if job.stage == "evaluate"]
    folder = runs[0].config.paths.comparison(file)
    settings = "\n".join(job.settings for job in scores)
    arguments = ["--config", file, *overrides, "--table"]
    table = Job(runs[0].config.name, "table", "compare.py", arguments, folder / "table.md", settings, after_all=scores)
    return folder, [*jobs, table]


def submit_missing(folder: Path, jobs: list[Job], again: str) -> None:
    """Submit what is missing, or print its sbatch lines."""
    ledger, queue, logs = Ledger(folder / "done"), Queue(folder), folder / "logs"
    if os.environ.get("DRY_RUN"):
        queue.ask()
        submit(jobs, ledger, queue, logs, is_dry=True)
        return
    make_folder(logs, "output_dir")
    with locked(queue.file, "output_dir"):
        queue.ask()
        count = submit(jobs, ledger, queue, logs)
    print(f"{count} job(s) submitted; where they stand:\n  bash scripts/slurm/status.sh {again}")


def show(folder: Path, jobs: list[Job]) -> None:
    """A line for each job."""
    ledger, queue = Ledger(folder / "done"), Queue(folder)
    try:
        queue.ask()
    except RunError:
        print("Slurm does not answer: the files alone")
    done = [job for job in jobs if ledger.is_done(job)]
    for job in jobs:
        state = "complete" if job in done else how_far(job)
        number = queue.ids.get(job.name) if job not in done else None
        slurm = "" if number is None else f"job {number} {queue.states.get(job.name, 'ended').lower()}"
        print(f"{job.name:<50} {state:<16} {slurm}".rstrip())
    print(f"{len(done)} of {len(jobs)} complete")
    if queue.ids:
        print(f"what the jobs said: {folder / 'logs'}/")


def how_far(job: Job) -> str:
    """What there is of a job's output."""
    if job.output is None:
        return "not checked"
    folder = job.output.parent if job.output.suffix else job.output
    images = sum(1 for _ in folder.glob("[0-9]*.png"))
    if images:
        return f"{images} images"
    if job.output.exists():
        return "not checked"  # made by other means: the job would find out
    training = folder.with_name("pretraining") if job.stage == "pretrain" else folder.parent
    steps = [int(checkpoint.name.removeprefix("step-")) for checkpoint in training.glob("checkpoints/step-*")]
    return f"step {max(steps)}" if steps else "missing"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("submit", "status"))
    parser.add_argument("file", help="YAML: an experiment, or a comparison")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with ended_in_one_line(parser.prog):
        arguments = parser.parse_intermixed_args()
        folder, jobs = plan_jobs(arguments.file, arguments.overrides)
        if arguments.what == "submit":
            submit_missing(folder, jobs, shlex.join([arguments.file, *arguments.overrides]))
        else:
            show(folder, jobs)
