"""Run jobs side by side on this machine; a job that is done and whose inputs have not changed does not run again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deme.compare.graph import Job, Ledger
from deme.job.command import Interrupted, end_with_parent, noted_signals
from deme.job.files import make_folder

POLLED_EVERY = 0.2  # seconds


class Running(NamedTuple):
    """A job's process."""

    process: subprocess.Popen
    place: dict[str, str]
    since: float
    made_of: str  # as Ledger.begin returns it


class Jobs:
    """Jobs, those that the longest chain of others waits for first; their logs lie in `folder`.

    Args:
        places: the environment variables of each place where a job can run, from `places`.
        processes: of each job.
    """

    def __init__(
        self, jobs: Sequence[Job], ledger: Ledger, folder: Path, places: Sequence[dict[str, str]], processes: int = 1
    ):
        self.jobs = longest_chain_first(jobs)
        self.ledger = ledger
        self.logs = folder
        self.free = list(places)
        self.processes = processes
        self.running: dict[Job, Running] = {}
        make_folder(folder, "output_dir")

    def run(self) -> None:
        """Run all that can run. An exception, such as a signal's, ends the processes, which save what they have."""
        try:
            while any(job.state in ("waiting", "running") for job in self.jobs):
                for job in self.jobs:
                    if job.state == "waiting":
                        self._try_to_start(job)
                if self.running:
                    time.sleep(POLLED_EVERY)
                    self._collect()
        except BaseException:
            for running in self.running.values():
                os.killpg(running.process.pid, signal.SIGTERM)
            while self.running:
                time.sleep(POLLED_EVERY)
                self._collect(stopped=True)
            raise

    def _try_to_start(self, job: Job) -> None:
        if any(before.state in ("failed", "dropped") for before in job.after):
            job.state = "dropped"
            return
        if not self.free or any(before.state in ("waiting", "running") for before in job.waits_for):
            return
        if self.ledger.is_done(job):
            job.state = "unchanged"
        elif (command := job.command(self.processes)) is None:
            job.state = "dropped"
        else:
            self._start(job, command)

    def _start(self, job: Job, command: list[str]) -> None:
        place, made_of = self.free.pop(0), self.ledger.begin(job)
        with self._log(job).open("ab") as log, noted_signals() as signals:  # no process may start unnoticed
            process = subprocess.Popen(
                command,
                env=os.environ | place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches it through `run` alone
                preexec_fn=end_with_parent,
            )
            job.state = "running"
            self.running[job] = Running(process, place, time.monotonic(), made_of)
        print(f"{job.name}: started", flush=True)
        if signals:
            raise Interrupted(signals[0])

    def _collect(self, stopped: bool = False) -> None:
        """Note the jobs that have ended; `stopped` if `run` ended them."""
        for job, running in list(self.running.items()):
            status = running.process.poll()
            if status is None:
                continue
            del self.running[job]
            self.free.append(running.place)
            if status == 0 and (job.output is None or job.output.exists()):
                job.state = "done"
                self.ledger.note(job, running.made_of)
                print(f"{job.name}: done in {time.monotonic() - running.since:.0f} s", flush=True)
                continue
            job.state = "stopped" if stopped else "failed"
            time_is_up = "its time is up; the same command goes on" if status == 0 else ""  # finetune.max_minutes
            job.error = time_is_up or last_line(self._log(job)) or f"status {status}"
            print(f"{job.name}: {'' if stopped else 'FAILED: '}{job.error}", file=sys.stderr, flush=True)

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job.name}.log"


def longest_chain_first(jobs: Sequence[Job]) -> list[Job]:
    """Sort jobs by the length of the longest chain of jobs that wait for them, so that no place is idle at the end.

    Args:
        jobs: none before one that it needs; jobs of equal length keep this order.
    """
    length = dict.fromkeys(jobs, 1)
    for job in reversed(jobs):
        for before in job.waits_for:
            length[before] = max(length[before], length[job] + 1)
    return sorted(jobs, key=length.__getitem__, reverse=True)


def places(processes: int, jobs_per_gpu: int = 1) -> list[dict[str, str]]:
    """The environment variables of each place where a job can run: `processes` GPUs, or CPU cores if there is no GPU.

    The list is empty if there are fewer GPUs than `processes`. `jobs_per_gpu` jobs share a GPU.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "false") != "true":
        import torch

        if torch.cuda.is_available():
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
            groups = [gpus[start : start + processes] for start in range(0, len(gpus) - processes + 1, processes)]
            return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups] * jobs_per_gpu
    count = max(1, len(os.sched_getaffinity(0)) // processes)
    return [{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}] * count


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
