"""Jobs on a Slurm cluster, as arrays, each behind those that it needs: scripts/slurm/jobs.py."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deme.errors import RunError, UserError
from deme.job.graph import Job, Ledger

JOBS = "jobs.tsv"  # a line for each: its name, and Slurm's id


class Queue:
    """What Slurm knows of jobs that were submitted before.

    Args:
        folder: keeps which ones those were.
    """

    def __init__(self, folder: Path):
        self.file = folder / JOBS
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.ids = dict(line.split("\t") for line in lines)  # by the job's name
        self.states: dict[str, str] = {}  # the same → Slurm's word for it, where it is queued or runs

    def ask(self) -> None:
        """Ask Slurm, where there are jobs to ask for.

        Raises:
            RunError: it does not answer.
        """
        if not self.ids or shutil.which("squeue") is None:
            return
        command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"]
        states = dict(line.split() for line in answer_of(command).splitlines())
        self.states = {name: states[number] for name, number in self.ids.items() if number in states}

    def note(self, job: Job, number: str, is_dry: bool) -> None:
        """A job has been submitted."""
        self.ids[job.name] = number
        self.states[job.name] = "SUBMITTED"
        if not is_dry:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{job.name}\t{number}\n")


def submit(jobs: Sequence[Job], ledger: Ledger, queue: Queue, logs: Path, is_dry: bool = False) -> int:
    """Submit what is missing, and neither queued nor running: the number of jobs.

    Args:
        jobs: none before one that it needs.
        logs: folder.
        is_dry: print what would be submitted.

    Raises:
        UserError, RunError: sbatch is not there, or refuses a job; says why.
    """
    count = 0
    for group in arrays(jobs):
        missing = [job for job in group if job.name not in queue.states and must_run(job, ledger, queue)]
        if not missing:
            continue
        first = missing[0]
        is_array = bool(first.own)
        line = sbatch_line(f"{first.run}-{first.stage}", logs / ("%x-%A_%a.log" if is_array else "%x-%j.log"))
        line += [f"--array=0-{len(missing) - 1}"] if is_array else []
        line += dependencies(first, queue)
        given = first.arguments(first.after_all) if callable(first.arguments) else first.arguments
        line += ["scripts/slurm/job.sh", str(ledger.folder), first.script, *given, "--"]
        line += [part for job in missing for part in (job.name, job.key, job.own)]
        if is_dry:
            print(shlex.join(line))
            number = f"{first.run}-{first.stage}".upper()
        else:
            number = answer_of(line).strip().partition(";")[0]  # behind it, the name of a cluster
        for place, job in enumerate(missing):
            queue.note(job, f"{number}_{place}" if is_array else number, is_dry)
            if not is_dry:
                print(f"{job.name:<50} job {queue.ids[job.name]}", flush=True)
        count += len(missing)
    return count


def arrays(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs of one run and stage together: they differ in their own override alone."""
    by_stage: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        by_stage.setdefault((job.run, job.stage), []).append(job)
    return list(by_stage.values())


def must_run(job: Job, ledger: Ledger, queue: Queue) -> bool:
    """Whether a job has not been done, or what it was made from is being made anew."""
    return not ledger.is_done(job) or any(before.name in queue.states for before in (*job.after, *job.after_all))


def dependencies(job: Job, queue: Queue) -> list[str]:
    """sbatch's option: jobs that must succeed, and those that must end before; only where they are under way."""
    # arguments that would depend on which of them succeeded are those for all
    groups = {"afterok": [*job.after, *(job.after_all if callable(job.arguments) else [])]}
    groups["afterany"] = [before for before in job.after_all if before not in groups["afterok"]]
    under_way = {kind: [queue.ids[b.name] for b in found if b.name in queue.states] for kind, found in groups.items()}
    parts = [":".join([kind, *numbers]) for kind, numbers in under_way.items() if numbers]
    return [f"--dependency={','.join(parts)}", "--kill-on-invalid-dep=yes"] if parts else []


def sbatch_line(name: str, log: Path) -> list[str]:
    """The beginning of sbatch's command line, by the settings of scripts/slurm/settings.sh."""
    given = os.environ
    line = ["sbatch", "--parsable", f"--job-name={name}", f"--nodes={given['NODES']}", "--ntasks-per-node=1"]
    options = {"PARTITION": "partition", "ACCOUNT": "account", "TIME": "time", "CPUS": "cpus-per-task"}
    line += [f"--{option}={given[setting]}" for setting, option in options.items() if given[setting]]
    line += [f"--gpus-per-node={given['GPUS']}"] if given["GPUS"] != "0" else []
    line += shlex.split(given["OPTIONS"])
    line += ["--export=ALL", "--requeue", "--open-mode=append", f"--signal=B:USR1@{given['NOTICE']}"]
    return [*line, f"--output={log}"]


def answer_of(command: list[str]) -> str:
    """What a command of Slurm's prints.

    Raises:
        UserError: there is no such command.
        RunError: it failed; says why.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: not found; DRY_RUN=1 prints what would be submitted")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RunError(f"{command[0]}: {result.stderr.strip() or f'status {result.returncode}'}")
    return result.stdout
