"""Submit an experiment or a comparison to Slurm, or print its status; submit.sh and status.sh start this.

Their settings are environment variables; the working directory is the repository. The jobs are those of compare.py. An
experiment alone has the rows of configs/comparison/models.yaml.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import argparse
import os
import shlex
from contextlib import nullcontext

from deme.compare.comparison import LAST, ComparedRun, Stages, load_comparison
from deme.config.paths import is_made
from deme.config.reading import override, read_mapping
from deme.errors import RunError
from deme.job.command import ended_in_one_line
from deme.job.files import checkpoint_steps, locked, make_folder
from deme.compare.jobs import Job, Ledger
from deme.job.records import digest_of
from deme.compare.slurm import Queue, missing_jobs, submit

MODELS = "configs/comparison/models.yaml"


def plan_jobs(file: str, overrides: list[str]) -> tuple[Path, list[Job]]:
    """The folder of the jobs' files, and the jobs. The last one makes the table, the model card and the page."""
    if "runs" not in read_mapping(file):
        file, overrides = MODELS, [override("base", file), *overrides]
    comparison, runs = load_comparison(file, overrides)
    check_runs(runs)
    jobs = Stages(comparison, runs, int(os.environ["BLOCKS"]), has_cache=True).jobs
    jobs = [job for job in jobs if job.stage not in LAST]
    scores = [job for job in jobs if job.stage == "evaluate"]
    base = runs[0].config
    name, output = f"table-{Path(file).stem}", base.paths.comparison(file) / "table.md"
    arguments, key = ["--config", file, *overrides, "--table"], digest_of({job.name: job.key for job in scores})
    table = Job(base.name, name, "compare.py", arguments, output, key, after_all=scores, single_process=True)
    return base.paths.jobs, [*jobs, table]


def check_runs(runs: list[ComparedRun]) -> None:
    """Refuse trainings whose steps the processes can't share, or that a setting would end early."""
    of_each_node = os.environ["NUM_PROCESSES"] or max(1, int(os.environ["GPUS"]))
    rule = "TIME limits a job, which then goes on by itself"
    for config in (run.config for run in runs):
        for settings in [config.finetune, *([config.pretrain] if config.model.pretrained is None else [])]:
            settings.check("max_minutes", settings.max_minutes is None, rule)
            settings.check_shares(int(os.environ["NODES"]) * int(of_each_node))


def submit_missing(folder: Path, jobs: list[Job], again: str) -> None:
    """Submit the jobs that are missing, or print their sbatch lines."""
    ledger, logs, file = Ledger(folder / "done"), folder / "logs", folder / "jobs.tsv"
    is_dry = bool(os.environ.get("DRY_RUN"))
    if not is_dry:
        make_folder(logs, "output_dir")
    with nullcontext() if is_dry else locked(file, "output_dir"):
        queue = Queue(file)
        queue.ask()
        missing = missing_jobs(jobs, ledger, queue)
        submit(missing, ledger, queue, logs, is_dry)
    if not is_dry:
        print(f"{len(missing)} job(s) submitted; where they stand:\n  bash scripts/slurm/status.sh {again}")


def show(folder: Path, jobs: list[Job]) -> None:
    """Print a line for each job."""
    queue, has_answered = Queue(folder / "jobs.tsv"), False
    try:
        has_answered = queue.ask()
    except RunError:
        print("Slurm does not answer: the files alone")
    done = Ledger(folder / "done").done(jobs)
    for job in jobs:
        slurm = ""
        if job not in done and job.name in queue.numbers:
            state = queue.states.get(job.name, "ended").lower() if has_answered else ""
            slurm = f"job {queue.numbers[job.name]} {state}"
        print(f"{job.name:<50} {'complete' if job in done else progress(job):<16} {slurm}".rstrip())
    print(f"{len(done)} of {len(jobs)} complete")
    if queue.numbers:
        print(f"logs: {folder / 'logs'}/")


def progress(job: Job) -> str:
    """What there is of the output of a job that is not done."""
    if job.output is None:
        return "not checked"
    folder = job.output.parent if job.output.suffix else job.output
    images = sum(1 for _ in folder.glob("[0-9]*.png"))
    if images:
        return f"{images} images"
    if is_made(job.output):
        return "not checked"  # made by other means; the job itself finds out
    training = folder.with_name("pretraining") if job.stage == "pretrain" else folder.parent
    steps = checkpoint_steps(training / "checkpoints")
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
