"""Jobs that depend on each other, and a ledger of those that are done."""

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deme.config.paths import for_shell
from deme.job.files import REPOSITORY, atomic_file, make_folder


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
    settings: str  # everything else that the output depends on, including files that no job makes
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
    def key(self) -> str:
        """A hash of the settings, 16 hexadecimal digits."""
        return hashlib.sha256(self.settings.encode()).hexdigest()[:16]

    @property
    def made(self) -> list[str]:
        """The files and folders that the job makes."""
        return [for_shell(path) for path in self.parts or ([] if self.output is None else [self.output])]

    @property
    def before(self) -> list["Job"]:
        """The jobs whose output this one may read. Caches, which only a cluster has, change no result."""
        return [job for job in self.waits_for if job.output is not None]

    @property
    def waits_for(self) -> list["Job"]:
        """The jobs that must have ended before this one starts."""
        return [*self.after, *self.after_all]

    @property
    def needed(self) -> list["Job"]:
        """The jobs that must succeed for a complete output."""
        return self.waits_for if callable(self.arguments) else self.after

    @property
    def is_made(self) -> bool:
        """True if the job has succeeded, now or earlier."""
        return self.state in ("done", "unchanged")

    def arguments_after(self, there: Sequence["Job"]) -> list[str] | None:
        """The arguments without `own`, given the jobs of `after_all` that are done."""
        return self.arguments(there) if callable(self.arguments) else self.arguments

    def command(self, processes: int) -> list[str] | None:
        """The command line, once the jobs before this one have ended; None if there is nothing to do."""
        arguments = self.arguments_after([job for job in self.after_all if job.is_made])
        if arguments is None:
            return None
        launch = ["bash", str(REPOSITORY / "scripts/launch.sh"), "1" if self.single_process else str(processes)]
        return [*launch, str(REPOSITORY / self.script), *arguments, *([self.own] if self.own else [])]


class Ledger:
    """The jobs that are done: a file of three lines for each, in `folder`.

    The lines are the job's key, a hash of the entries of the jobs before it when it began, and the state of its output
    when it ended. On a cluster scripts/slurm/job.sh writes them.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def entry(self, job: Job) -> Path:
        """The file of a job."""
        return self.folder / job.name

    def made_of(self, job: Job) -> str:
        """A hash of the entries of the jobs before this one."""
        return hashlib.sha256(b"".join(map(self._read, job.before))).hexdigest()

    def begin(self, job: Job) -> str:
        """Note that a job starts, which invalidates its earlier output; returns `made_of` at this moment."""
        self.entry(job).unlink(missing_ok=True)
        return self.made_of(job)

    def note(self, job: Job, made_of: str) -> None:
        """Note that a job is done; `made_of` is what `begin` returned."""
        self._write(self.folder, job, self._lines(job, made_of))

    def plan(self, job: Job) -> None:
        """Write what scripts/slurm/job.sh needs for the entry: the jobs before this one, and what it makes."""
        for kind, lines in (("before", [one.name for one in job.before]), ("made", job.made)):
            self._write(self.folder.with_name(kind), job, as_lines(lines))

    def _write(self, folder: Path, job: Job, content: bytes) -> None:
        make_folder(folder, "output_dir")
        with atomic_file(folder / job.name, is_durable=False) as temporary:
            temporary.write_bytes(content)

    def is_done(self, job: Job) -> bool:
        """True if a job was done with these settings and inputs, and its output has not changed since.

        The jobs before it are taken to be done.
        """
        entry = self._read(job)
        if not entry.startswith(job.key.encode()) or (job.output is not None and not job.output.exists()):
            return False
        return entry == self._lines(job, self.made_of(job))

    def done(self, jobs: Sequence[Job]) -> set[Job]:
        """The jobs that are done, and so are all jobs before them; each job must follow those that it needs."""
        done: set[Job] = set()
        for job in jobs:
            noted = [one for one in job.after_all if self._read(one).startswith(one.key.encode())]
            if done.issuperset([*job.after, *noted]) and self.is_done(job):
                done.add(job)
        return done

    def _lines(self, job: Job, made_of: str) -> bytes:
        return f"{job.key}\n{made_of}\n{state_of(job.made)}\n".encode()

    def _read(self, job: Job) -> bytes:
        """A job's entry; empty if there is none."""
        try:
            return self.entry(job).read_bytes()
        except OSError:
            return b""


def state_of(paths: Iterable[str]) -> str:
    """A hash of files and folders that changes with every write to them, by scripts/state_of.sh."""
    script = ["bash", str(REPOSITORY / "scripts/state_of.sh")]
    return subprocess.run(script, input=as_lines(paths), stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def as_lines(parts: Iterable[str]) -> bytes:
    """Names and paths for a shell script, one a line."""
    return os.fsencode("".join(f"{part}\n" for part in parts))
