"""Submit jobs to Slurm, each behind the jobs that it needs (scripts/slurm/jobs.py)."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deme.compare.jobs import Job, Ledger
from deme.config.paths import for_shell
from deme.errors import RunError, UserError
from deme.job.command import Interrupted, noted_signals

OPTIONS = {"PARTITION": "partition", "ACCOUNT": "account", "TIME": "time", "CPUS": "cpus-per-task"}  # sbatch's names


class Queue:
    """The jobs that were submitted, by name, and what Slurm says of them; a line of the file has name, key, number."""

    def __init__(self, file: Path):
        self.file = file
        self.numbers: dict[str, str] = {}  # Slurm's
        self.keys: dict[str, str] = {}
        self.states: dict[str, str] = {}  # Slurm's word for a job that is queued or runs
        content = file.read_bytes().decode(errors="replace") if file.exists() else ""
        for line in filter(None, content.split("\n")):  # other line breaks may stand in names
            name, *parts = line.rsplit("\t", 2)
            if len(parts) != 2:
                raise UserError(f"{file}: not a line of a job: {line!a}; delete it")
            self.keys[name], self.numbers[name] = parts

    def ask(self) -> bool:
        """Ask Slurm for the jobs' states, if it is installed and there are jobs. RunError: it does not answer."""
        if not self.numbers or shutil.which("squeue") is None:
            return False
        answer = answer_of(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"])
        states = dict(line.split(maxsplit=1) for line in answer.splitlines())
        self.states = {name: states[number] for name, number in self.numbers.items() if number in states}
        return True

    def note(self, group: Sequence[Job], number: str) -> None:
        """A job has been submitted, or an array of jobs."""
        for place, job in enumerate(group):
            self.numbers[job.name] = f"{number}_{place}" if job.own else number
            self.keys[job.name], self.states[job.name] = job.key, "SUBMITTED"


def missing_jobs(jobs: Sequence[Job], ledger: Ledger, queue: Queue) -> list[Job]:
    """The jobs that are neither in the queue nor done, or that read what is still to be made."""
    missing, outdated = [], []
    for job in jobs:
        if job.name not in queue.states:
            waits = any(before.name in queue.states or before in missing for before in job.waits_for)
            if waits or not ledger.is_done(job):
                missing.append(job)
        elif queue.keys[job.name] != job.key or any(before in missing for before in job.needed):
            outdated.append(job.name)
    if outdated:
        remedy = f"wait until that has ended, or scancel {' '.join(queue.numbers[name] for name in outdated)}"
        raise UserError(f"{', '.join(outdated)}: under way with other settings or inputs: {remedy}")
    return missing


def submit(jobs: Sequence[Job], ledger: Ledger, queue: Queue, logs: Path, is_dry: bool = False) -> None:
    """Submit jobs, those of one stage of a run as an array; or print sbatch's command lines if `is_dry`."""
    by_stage: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        by_stage.setdefault((job.run, job.stage), []).append(job)
    for (run, stage), group in by_stage.items():
        line = sbatch_line(group, logs, ledger, queue)
        if is_dry:
            print(shlex.join(line))
            queue.note(group, f"{run}-{stage}".upper())
            continue
        for job in group:
            ledger.write("before", job, [before.name for before in job.before])
            ledger.write("made", job, job.made)
        with noted_signals() as signals:  # a job that Slurm has taken is noted
            queue.note(group, answer_of(line).strip().partition(";")[0])  # a cluster's name may follow
            with queue.file.open("a", encoding="utf-8") as file:
                file.writelines(f"{job.name}\t{job.key}\t{queue.numbers[job.name]}\n" for job in group)
        for job in group:
            print(f"{job.name:<50} job {queue.numbers[job.name]}", flush=True)
        if signals:
            raise Interrupted(signals[0])


def sbatch_line(group: Sequence[Job], logs: Path, ledger: Ledger, queue: Queue) -> list[str]:
    """sbatch's command line for the jobs of a stage, by the settings of scripts/slurm/settings.sh."""
    given, first = os.environ, group[0]
    nodes, processes = ("1", "1") if first.single_process else (given["NODES"], given["NUM_PROCESSES"])
    if "\\" in str(logs):
        raise UserError(f"output_dir: {logs}: Slurm writes no logs to a folder with a backslash in its name")
    try:
        own_options = shlex.split(given["OPTIONS"])
    except ValueError as error:
        raise UserError(f"OPTIONS={given['OPTIONS']}: {error}") from None
    line = ["sbatch", "--parsable", f"--job-name={first.run}-{first.stage}", f"--nodes={nodes}", "--ntasks-per-node=1"]
    line += [f"--{option}={given[setting]}" for setting, option in OPTIONS.items() if given[setting]]
    line += [f"--gpus-per-node={given['GPUS']}"] if given["GPUS"] != "0" else []
    line += [*own_options, "--export=ALL", "--requeue", "--open-mode=append", f"--signal=B:USR1@{given['NOTICE']}"]
    line.append(f"--output={str(logs).replace('%', '%%')}/{'%x-%A_%a.log' if first.own else '%x-%j.log'}")
    line += [f"--array=0-{len(group) - 1}"] if first.own else []
    others = [before for before in first.after_all if before not in first.needed]
    waits = []
    for kind, jobs in (("afterok", first.needed), ("afterany", others)):  # success, or just the end
        numbers = [queue.numbers[before.name] for before in jobs if before.name in queue.states]
        waits += [":".join([kind, *numbers])] if numbers else []
    line += [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []
    line += ["scripts/slurm/job.sh", for_shell(ledger.folder), nodes, processes, first.script]
    tasks = [part for job in group for part in (job.name, job.key, job.own)]
    return [*line, *first.arguments_after(first.after_all), "--", *tasks]


def answer_of(command: list[str]) -> str:
    """The standard output of a command of Slurm's, which must succeed."""
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: not found; DRY_RUN=1 prints what would be submitted")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RunError(f"{command[0]}: {result.stderr.strip() or f'status {result.returncode}'}")
    return result.stdout
