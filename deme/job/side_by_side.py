"""Commands that depend on each other, side by side where processors are free, and not again where nothing changed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deme.job.files import atomic_file, make_folder, read_json
from deme.job.signals import end_with_parent

POLLED_EVERY = 0.2  # seconds between two looks at the commands that run
DONE = "done.json"


@dataclass
class Job:
    """A command that makes something."""

    name: str  # for messages, and of its log
    command: Sequence[str] | Callable[[], Sequence[str] | None]  # called when its turn comes; None: nothing to do
    output: Path  # what it makes
    key: str  # stands for everything else that the output depends on: the configuration
    after: list["Job"] = field(default_factory=list)  # must have succeeded
    after_all: list["Job"] = field(default_factory=list)  # must have ended, however
    state: str = "waiting"  # running, done, unchanged (done before), failed, stopped, dropped (one before it failed)
    error: str = ""


class Jobs:
    """Jobs in their order; `folder` keeps their logs, and what is done.

    Args:
        places: the environment variables of each place where a job can run: one per processor or GPU.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path, places: Sequence[dict[str, str]]):
        self.jobs = jobs
        self.folder = folder
        self.free = list(places)
        self.running: dict[int, tuple[subprocess.Popen, dict[str, str], float, Job]] = {}  # by process id
        make_folder(folder / "logs", "output_dir")
        self.done = read_json(folder / DONE) if (folder / DONE).exists() else {}

    def run(self) -> None:
        """Run all that can be run; whatever ends this early ends the commands, which save what they have."""
        try:
            while any(job.state in ("waiting", "running") for job in self.jobs):
                self._start_those_ready()
                if self.running:
                    time.sleep(POLLED_EVERY)
                    self._collect()
        except BaseException as error:
            for process, *_ in self.running.values():
                os.killpg(process.pid, getattr(error, "number", signal.SIGTERM))
            while self.running:
                time.sleep(POLLED_EVERY)
                self._collect(stopped=True)
            raise

    def seconds(self, name: str) -> float:
        """Wall time of a job, all its attempts together; 0 where there is none of this name."""
        return self.done.get(name, {}).get("seconds", 0.0)

    def _start_those_ready(self) -> None:
        for job in self.jobs:
            if job.state != "waiting":
                continue
            if any(before.state in ("failed", "dropped") for before in job.after):
                job.state = "dropped"
            elif all(before.state in ("done", "unchanged") for before in job.after) and all(
                before.state not in ("waiting", "running") for before in job.after_all
            ):
                if self._is_unchanged(job):
                    job.state = "unchanged"
                elif self.free:
                    self._start(job)

    def _is_unchanged(self, job: Job) -> bool:
        """Whether its output stands there as it was made, and from what is there now."""
        known = self.done.get(job.name, {})
        same = known.get("key") == job.key and known.get("output") == _stamp(job.output) is not None
        return same and all(before.state != "done" for before in (*job.after, *job.after_all))

    def _start(self, job: Job) -> None:
        command = job.command() if callable(job.command) else job.command
        if command is None:
            job.state = "dropped"
            return
        place = self.free.pop(0)
        log = (self.folder / "logs" / f"{job.name}.log").open("ab")
        with log:
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
        self.running[process.pid] = (process, place, time.monotonic(), job)
        print(f"{job.name}: started", flush=True)

    def _collect(self, stopped: bool = False) -> None:
        """Take note of the commands that have ended.

        Args:
            stopped: by us.
        """
        for pid, (process, place, since, job) in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[pid]
            self.free.append(place)
            took = time.monotonic() - since
            known = self.done.get(job.name, {})
            seconds = took + (known.get("seconds", 0.0) if known.get("key") == job.key else 0.0)
            self.done[job.name] = {"key": job.key, "seconds": seconds}
            if status == 0:
                job.state = "done"
                self.done[job.name]["output"] = _stamp(job.output)
                print(f"{job.name}: done in {took:.0f} s", flush=True)
            else:
                job.state = "stopped" if stopped else "failed"
                job.error = last_line(self.folder / "logs" / f"{job.name}.log") or f"status {status}"
                print(f"{job.name}: {'' if stopped else 'FAILED: '}{job.error}", file=sys.stderr, flush=True)
            with atomic_file(self.folder / DONE) as temporary:
                temporary.write_text(json.dumps(self.done, indent=1), encoding="utf-8")


def places(processes: int) -> list[dict[str, str]]:
    """The environment of each place where a job can run: so many GPUs for each, or else so many of the CPU's cores.

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
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups if len(group) == processes]
    count = max(1, len(os.sched_getaffinity(0)) // processes)
    return [{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}] * count


def _stamp(path: Path) -> int | None:
    """When it changed last; None where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
