"""Jobs on a Slurm cluster, as arrays, each behind those that it needs: scripts/slurm/jobs.py."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deme.compare.graph import Job, Ledger
from deme.config.paths import for_shell
from deme.errors import RunError, UserError
from deme.job.signals import Interrupted, noted_signals

JOBS = "jobs.tsv"  # a line for each that was submitted: its name, its key and Slurm's number


@dataclass
class Queue:
    """What Slurm knows of jobs that were submitted before."""

    file: Path
    numbers: dict[str, str] = field(default_factory=dict)  # by the job's name
    keys: dict[str, str] = field(default_factory=dict)  # the same
    states: dict[str, str] = field(default_factory=dict)  # Slurm's word for what is queued or runs
    has_answered: bool = False

    def __post_init__(self):
        content = self.file.read_bytes().decode(errors="replace") if self.file.exists() else ""
        for line in content.removesuffix("\n").split("\n") if content else []:
            parts = line.rsplit("\t", 2)
            if len(parts) != 3:
                raise UserError(f"{self.file}: not a line of a job: {line!a}; delete it")
            self.keys[parts[0]], self.numbers[parts[0]] = parts[1:]

    def ask(self) -> None:
        """Ask Slurm, where it is there and there are jobs to ask for.

        Raises:
            RunError: it does not answer.
        """
        if not self.numbers or shutil.which("squeue") is None:
            return
        command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"]
        states = {
            number: state for number, _, state in (line.partition(" ") for line in answer_of(command).splitlines())
        }
        self.states = {name: states[number] for name, number in self.numbers.items() if number in states}
        self.has_answered = True

    def note(self, group: Sequence[Job], number: str) -> None:
        """A job has been submitted, or an array of them."""
        for place, job in enumerate(group):
            self.numbers[job.name] = f"{number}_{place}" if job.own else number
            self.keys[job.name], self.states[job.name] = job.key, "SUBMITTED"


def missing_jobs(jobs: Sequence[Job], ledger: Ledger, queue: Queue) -> list[Job]:
    """Those that have not been done, or whose inputs are to be made, and that are neither queued nor running.

    Args:
        jobs: none before one that it needs.
    """
    missing: list[Job] = []
    outdated: list[str] = []
    for job in jobs:
        if job.name not in queue.states:
            waits = any(before.name in queue.states or before in missing for before in (*job.after, *job.after_all))
            if waits or not ledger.is_done(job):
                missing.append(job)
        elif queue.keys[job.name] != job.key or any(before in missing for before in job.needed):
            outdated.append(job.name)
    if outdated:
        numbers = " ".join(queue.numbers[name] for name in outdated)
        rule = "under way with other settings or inputs: wait until that has ended, or"
        raise UserError(f"{', '.join(outdated)}: {rule} scancel {numbers}")
    return missing


def submit(jobs: Sequence[Job], ledger: Ledger, queue: Queue, logs: Path, is_dry: bool = False) -> None:
    """Submit jobs, those of one stage as an array.

    Args:
        jobs: none before one that it needs.
        logs: folder.
        is_dry: print what would be submitted.
    """
    by_stage: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        by_stage.setdefault((job.run, job.stage), []).append(job)
    for group in by_stage.values():
        line = sbatch_line(group, logs, ledger, queue)
        if is_dry:
            print(shlex.join(line))
            queue.note(group, f"{group[0].run}-{group[0].stage}".upper())
            continue
        for job in group:
            ledger.plan(job)
        with noted_signals() as signals:  # what Slurm has taken is noted
            queue.note(group, answer_of(line).strip().partition(";")[0])  # behind it, the name of a cluster
            with queue.file.open("a", encoding="utf-8") as file:
                file.writelines(f"{job.name}\t{job.key}\t{queue.numbers[job.name]}\n" for job in group)
        for job in group:
            print(f"{job.name:<50} job {queue.numbers[job.name]}", flush=True)
        if signals:
            raise Interrupted(signals[0])


def sbatch_line(group: Sequence[Job], logs: Path, ledger: Ledger, queue: Queue) -> list[str]:
    """sbatch's command line for the jobs of a stage, by the settings of scripts/slurm/settings.sh."""
    given, first = os.environ, group[0]
    nodes = "1" if first.is_alone else given["NODES"]
    line = ["sbatch", "--parsable", f"--job-name={first.run}-{first.stage}", f"--nodes={nodes}", "--ntasks-per-node=1"]
    options = {"PARTITION": "partition", "ACCOUNT": "account", "TIME": "time", "CPUS": "cpus-per-task"}
    line += [f"--{option}={given[setting]}" for setting, option in options.items() if given[setting]]
    line += [f"--gpus-per-node={given['GPUS']}"] if given["GPUS"] != "0" else []
    try:
        line += shlex.split(given["OPTIONS"])
    except ValueError as error:
        raise UserError(f"OPTIONS={given['OPTIONS']}: {error}") from None
    line += ["--export=ALL", "--requeue", "--open-mode=append", f"--signal=B:USR1@{given['NOTICE']}"]
    if "\\" in str(logs):
        raise UserError(f"output_dir: {logs}: Slurm writes no logs where a name holds a backslash")
    folder = str(logs).replace("%", "%%")  # %j stands for a number
    line += [f"--output={folder}/{'%x-%A_%a.log' if first.own else '%x-%j.log'}"]
    line += [f"--array=0-{len(group) - 1}"] if first.own else []
    # those that must succeed, and those that must end before: where they are under way
    kinds = {"afterok": first.needed, "afterany": [job for job in first.after_all if job not in first.needed]}
    under_way = {
        kind: [queue.numbers[j.name] for j in before if j.name in queue.states] for kind, before in kinds.items()
    }
    waits = ",".join(":".join([kind, *numbers]) for kind, numbers in under_way.items() if numbers)
    line += [f"--dependency={waits}", "--kill-on-invalid-dep=yes"] if waits else []
    processes = "1" if first.is_alone else given["NUM_PROCESSES"]
    command = ["scripts/slurm/job.sh", for_shell(ledger.folder), nodes, processes, first.script]
    tasks = [part for job in group for part in (job.name, job.key, job.own)]
    return [*line, *command, *first.arguments_after(first.after_all), "--", *tasks]


def answer_of(command: list[str]) -> str:
    """What a command of Slurm's prints.

    Raises:
        RunError: it failed; says why.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: not found; DRY_RUN=1 prints what would be submitted")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RunError(f"{command[0]}: {result.stderr.strip() or f'status {result.returncode}'}")
    return result.stdout
