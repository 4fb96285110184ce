"""Jobs side by side where processors are free, and not again where nothing changed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deme.compare.graph import Job, Ledger
from deme.job.files import make_folder
from deme.job.signals import Interrupted, end_with_parent, noted_signals

POLLED_EVERY = 0.2  # seconds between two looks at the commands that run


class Jobs:
    """Jobs in their order, on this machine; their logs lie in `folder`.

    Args:
        places: the environment variables of each place where a job can run: one per processor or GPU.
        processes: of each job.
    """

    def __init__(
        self, jobs: Sequence[Job], ledger: Ledger, folder: Path, places: Sequence[dict[str, str]], processes: int = 1
    ):
        self.jobs = jobs
        self.ledger = ledger
        self.logs = folder
        self.free = list(places)
        self.processes = processes
        # by process id: where it runs, since when, what it is made of
        self.running: dict[int, tuple[subprocess.Popen, dict[str, str], float, Job, str]] = {}
        make_folder(folder, "output_dir")

    def run(self) -> None:
        """Run all that can be run; whatever ends this early ends the commands, which save what they have."""
        try:
            while any(job.state in ("waiting", "running") for job in self.jobs):
                self._start_those_ready()
                if self.running:
                    time.sleep(POLLED_EVERY)
                    self._collect()
        except BaseException:
            for process, *_ in self.running.values():
                os.killpg(process.pid, signal.SIGTERM)
            while self.running:
                time.sleep(POLLED_EVERY)
                self._collect(stopped=True)
            raise

    def _start_those_ready(self) -> None:
        for job in self.jobs:
            if job.state != "waiting":
                continue
            if any(before.state in ("failed", "dropped") for before in job.after):
                job.state = "dropped"
            elif all(before.is_made for before in job.after) and all(
                before.state not in ("waiting", "running") for before in job.after_all
            ):
                if self.ledger.is_done(job):
                    job.state = "unchanged"
                elif self.free:
                    self._start(job)

    def _start(self, job: Job) -> None:
        command = job.command(self.processes)
        if command is None:
            job.state = "dropped"
            return
        place, made_of = self.free.pop(0), self.ledger.begin(job)
        with self._log(job).open("ab") as log, noted_signals() as signals:  # else one might run on, unknown to us
            process = subprocess.Popen(
                command,
                env=os.environ | place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes from here alone
                preexec_fn=end_with_parent,
            )
            job.state = "running"
            self.running[process.pid] = (process, place, time.monotonic(), job, made_of)
        print(f"{job.name}: started", flush=True)
        if signals:
            raise Interrupted(signals[0])

    def _collect(self, stopped: bool = False) -> None:
        """Take note of the commands that have ended.

        Args:
            stopped: by us.
        """
        for pid, (process, place, since, job, made_of) in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[pid]
            self.free.append(place)
            if status == 0 and (job.output is None or job.output.exists()):
                job.state = "done"
                self.ledger.note(job, made_of)
                print(f"{job.name}: done in {time.monotonic() - since:.0f} s", flush=True)
            else:
                job.state = "stopped" if stopped else "failed"
                by_itself = "its time is up; the same command goes on"  # finetune.max_minutes
                job.error = by_itself if status == 0 else last_line(self._log(job)) or f"status {status}"
                print(f"{job.name}: {'' if stopped else 'FAILED: '}{job.error}", file=sys.stderr, flush=True)

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job.name}.log"


def places(processes: int, jobs_per_gpu: int = 1) -> list[dict[str, str]]:
    """The environment of each place where a job can run: so many GPUs for each, or else so many of the CPU's cores.

    Args:
        processes: of each job, with a GPU or a core each.
        jobs_per_gpu: jobs that share a GPU, which a small network leaves idle most of the time.

    Returns:
        none where there are fewer GPUs than a job wants.
    """
    devices: list[str] = []
    if os.environ.get("ACCELERATE_USE_CPU", "false") != "true":
        import torch

        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = given.split(",") if given else map(str, range(torch.cuda.device_count()))
        devices = list(numbers) if torch.cuda.is_available() else []
    if devices:
        groups = [devices[start : start + processes] for start in range(0, len(devices), processes)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups if len(group) == processes] * jobs_per_gpu
    count = max(1, len(os.sched_getaffinity(0)) // processes)
    return [{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}] * count


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
