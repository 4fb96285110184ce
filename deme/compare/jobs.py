"""Jobs that depend on each other, a ledger of those that are done, and running them side by side on this machine."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.networks import RANDOM_DIRECTIONS, is_lora
from deme.config.paths import for_shell, is_made, places_of
from deme.job.command import Interrupted, end_with_parent, noted_signals
from deme.job.files import atomic_file, make_folder, sha256
from deme.job.repository import REPOSITORY, found_path
from deme.models.lora_settings import CONFIG
from deme.models.pipelines import TEXT_ENCODERS

POLLED_EVERY = 0.2  # seconds
LINKED = ("vae", *TEXT_ENCODERS)  # parts of a pipeline whose weights merge.py gives another name
MADE = ("done", "unchanged")  # states of a job that has succeeded, now or earlier


@dataclass(eq=False)
class Job:
    """One run of a script.

    Jobs of the same run and stage that wait for the same jobs differ in `own` alone: they are an array on a cluster.
    """

    run: str
    stage: str
    script: str  # relative to the repository
    # a function gets the jobs of `after_all` that are done; it returns None if there is nothing to do
    arguments: list[str] | Callable[[Sequence["Job"]], list[str] | None]
    output: Path | None  # None: a cache, which may not be needed
    key: str  # a hash of everything else that the output depends on, including files that no job makes
    after: list["Job"] = field(default_factory=list)  # must be done before
    after_all: list["Job"] = field(default_factory=list)  # must have ended before, done or not
    own: str = ""  # one more override
    parts: Sequence[Path] = ()  # files and folders of the output that other jobs read; empty: the output itself
    single_process: bool = False
    state: str = "waiting"  # running, done, unchanged (done earlier), failed, stopped, dropped (a job before it failed)
    error: str = ""

    @property
    def name(self) -> str:
        """For messages and log files."""
        return f"{self.run} {self.stage} {self.own}".rstrip()

    @property
    def made(self) -> list[str]:
        """The files and folders that the job makes."""
        parts = self.parts or filter(None, [self.output])
        return [for_shell(place) for path in parts for place in places_of(path)]

    @property
    def waits_for(self) -> list["Job"]:
        """The jobs that must have ended before this one starts."""
        return [*self.after, *self.after_all]

    @property
    def needed(self) -> list["Job"]:
        """The jobs that must succeed for a complete output."""
        return self.waits_for if callable(self.arguments) else self.after

    @property
    def before(self) -> list["Job"]:
        """The jobs whose output this one may read. Caches, which only a cluster has, change no result."""
        return [job for job in self.waits_for if job.output is not None]

    def arguments_after(self, there: Sequence["Job"]) -> list[str] | None:
        """All but `own`, given the jobs of `after_all` that are done."""
        return self.arguments(there) if callable(self.arguments) else self.arguments


class Ledger:
    """The jobs that are done: a file of three lines for each, in `folder`.

    The lines are the job's key, a hash of the entries of the jobs before it when it began, and the state of its output
    when it ended. On a cluster scripts/slurm/job.sh writes them.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def entry(self, job: Job) -> bytes:
        """What is noted of a job; nothing if it is not done."""
        file = self.folder / job.name
        return file.read_bytes() if file.is_file() else b""

    def made_of(self, job: Job) -> str:
        """A hash of the entries of the jobs before this one."""
        return hashlib.sha256(b"".join(map(self.entry, job.before))).hexdigest()

    def note(self, job: Job, made_of: str) -> None:
        """Note that a job is done; `made_of` is that of the moment when it began."""
        self.write(self.folder.name, job, [job.key, made_of, state_of(job.made)])

    def write(self, kind: str, job: Job, lines: Iterable[str]) -> None:
        """Write an entry, or what scripts/slurm/job.sh needs for it: the names `before` a job, and what is `made`."""
        file = self.folder.with_name(kind) / job.name
        make_folder(file.parent, "output_dir")
        with atomic_file(file, is_durable=False) as temporary:
            temporary.write_bytes(as_lines(lines))

    def is_done(self, job: Job) -> bool:
        """True if a job was done with these settings and inputs, and its output has not changed since.

        The jobs before it are taken to be done.
        """
        if not self.entry(job) or (job.output is not None and not is_made(job.output)):
            return False
        return self.entry(job) == as_lines([job.key, self.made_of(job), state_of(job.made)])

    def done(self, jobs: Sequence[Job]) -> set[Job]:
        """The jobs that are done, and so are all jobs before them; each job must follow those that it needs."""
        done: set[Job] = set()
        for job in jobs:
            noted = [before for before in job.after_all if self.entry(before).startswith(before.key.encode())]
            if done.issuperset([*job.after, *noted]) and self.is_done(job):
                done.add(job)
        return done


def state_of(paths: Iterable[str]) -> str:
    """A hash of files and folders that changes with every write to them, by scripts/state_of.sh."""
    script = ["bash", str(REPOSITORY / "scripts/state_of.sh")]
    return subprocess.run(script, input=as_lines(paths), stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def state_outside(path: str) -> str:
    """The state of a file or folder that no job makes; that of a LoRA with PEFT's configuration beside it, if any.

    merge.py may hard-link a pipeline's encoders, which sets their ctime: their weights are hashed instead.
    """
    linked = [file for part in LINKED for file in sorted(Path(path, part).glob("*.safetensors"))]
    if not linked:
        return state_of(map(for_shell, [path, *[Path(path).with_name(CONFIG)] * is_lora(path)]))
    others = {Path(path, name) for name in glob("**", root_dir=path, recursive=True, include_hidden=True)} - set(linked)
    return " ".join([state_of(for_shell(file) for file in others if file.is_file()), *map(sha256, linked)])


def outside(config: Config, script: str) -> list[str]:
    """Files and folders that a script reads and no job makes; the script runs again when they change."""
    given: list[Any] = [] if script in ("merge.py", "sample_ddp.py", RANDOM_DIRECTIONS) else [config.data.name]
    if script in ("merge.py", "search.py"):
        given += [network.folder for network in config.merged_networks if network.word is None]
    pipelines = [config.model.pretrained, config.model.config]
    pipelines += [config.pretrain.encoders] * (script == "pretrain.py")
    given += map(found_path, filter(None, pipelines))
    given += [config.merge.coefficients] * (script in ("merge.py", "search.py") and not config.needs_search)
    if config.sample.prediction_scale != "search":
        given += [config.sample.prediction_scale] * (script in ("sample_ddp.py", "search.py"))
    given += [config.sample.prompts] * (script in ("sample_ddp.py", "search.py"))
    given += [config.evaluate.clip_model] * (script in ("evaluate.py", "search.py"))
    given += config.search.start if script == "search.py" else []
    judges = config.evaluate.judges[: None if script == "evaluate.py" else 1]
    given += [judge.path for judge in judges] if script in ("evaluate.py", "search.py") else []
    return [str(path) for path in given if isinstance(path, str | Path) and os.path.exists(path)]


def as_lines(parts: Iterable[str]) -> bytes:
    """Names and paths for a shell script, one a line."""
    return os.fsencode("".join(f"{part}\n" for part in parts))


class Jobs:
    """Runs jobs, none before one that it needs, side by side in `places`, and each in so many processes.

    One that is done and whose inputs have not changed does not run again.
    """

    def __init__(self, jobs: list[Job], ledger: Ledger, logs: Path, places: list[dict[str, str]], processes: int = 1):
        self.jobs, self.ledger, self.logs, self.processes = longest_chain_first(jobs), ledger, logs, processes
        self.free = list(places)
        self.running: dict[Job, tuple[subprocess.Popen, dict[str, str], str, float]] = {}
        make_folder(logs, "output_dir")

    def run(self) -> None:
        """Run all that can run. An exception, such as a signal's, ends the processes, which save what they have."""
        try:
            while any(job.state in ("waiting", "running") for job in self.jobs):
                for job in [job for job in self.jobs if job.state == "waiting"]:
                    self._try_to_start(job)
                if self.running:
                    self._collect("failed")
        except BaseException:
            for process, *_ in self.running.values():
                os.killpg(process.pid, signal.SIGTERM)
            while self.running:
                self._collect("stopped")
            raise

    def _try_to_start(self, job: Job) -> None:
        if any(before.state in ("failed", "dropped") for before in job.after):
            job.state = "dropped"
        elif not self.free or any(before.state in ("waiting", "running") for before in job.waits_for):
            return
        elif self.ledger.is_done(job):
            job.state = "unchanged"
        elif (arguments := job.arguments_after([before for before in job.after_all if before.state in MADE])) is None:
            job.state = "dropped"
        else:
            self._start(job, arguments)

    def _start(self, job: Job, arguments: list[str]) -> None:
        command = ["bash", str(REPOSITORY / "scripts/launch.sh"), "1" if job.single_process else str(self.processes)]
        command += [str(REPOSITORY / job.script), *arguments, *filter(None, [job.own])]
        place, made_of = self.free.pop(0), self.ledger.made_of(job)
        (self.ledger.folder / job.name).unlink(missing_ok=True)  # its earlier output no longer counts
        log = self.logs / f"{job.name}.log"
        with log.open("ab") as output, noted_signals() as signals:  # no process may start unnoticed
            process = subprocess.Popen(
                command,
                env=os.environ | place,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches it through `run` alone
                preexec_fn=end_with_parent,
            )
            job.state = "running"
            self.running[job] = process, place, made_of, time.monotonic()
        print(f"{job.name}: started", flush=True)
        if signals:
            raise Interrupted(signals[0])

    def _collect(self, state_of_failed: str) -> None:
        """Wait a little, then note the jobs that have ended; `stopped` if `run` ended them."""
        time.sleep(POLLED_EVERY)
        for job, (process, place, made_of, since) in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            del self.running[job]
            self.free.append(place)
            if status == 0 and (job.output is None or is_made(job.output)):
                job.state = "done"
                self.ledger.note(job, made_of)
                print(f"{job.name}: done in {time.monotonic() - since:.0f} s", flush=True)
                continue
            job.state = state_of_failed
            log = (self.logs / f"{job.name}.log").read_text(encoding="utf-8", errors="replace")
            lines = [f"status {status}", *filter(None, map(str.strip, log.split("\n")))]  # \r is read as a line break
            job.error = lines[-1] if status else "its time is up; the same command goes on"  # finetune.max_minutes
            print(f"{job.name}: {'FAILED: ' * (job.state == 'failed')}{job.error}", file=sys.stderr, flush=True)


def longest_chain_first(jobs: Sequence[Job]) -> list[Job]:
    """Sort jobs, none before one that it needs, by the longest chain of jobs that wait for them: no idle end."""

    @cache
    def length(job: Job) -> int:
        return 1 + max((length(other) for other in jobs if job in other.waits_for), default=0)

    return sorted(jobs, key=length, reverse=True)


def places(processes: int, jobs_per_gpu: int = 1) -> list[dict[str, str]]:
    """The environment variables of each place where a job can run: `processes` GPUs, or CPU cores if there is no GPU.

    The list is empty if there are fewer GPUs than `processes`. `jobs_per_gpu` jobs share a GPU.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "false") != "true":
        import torch

        if torch.cuda.is_available():
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = given.split(",") if given else list(map(str, range(torch.cuda.device_count())))
            groups = [gpus[start : start + processes] for start in range(0, len(gpus) - processes + 1, processes)]
            return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups] * jobs_per_gpu
    count = max(1, len(os.sched_getaffinity(0)) // processes)
    return [{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}] * count
