"""Jobs that depend on each other, and which of them have been done."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deme.config.paths import for_shell
from deme.job.files import REPOSITORY, make_folder, write_small_file


@dataclass(eq=False)
class Job:
    """A script's run that makes something.

    Jobs of one run and stage that wait for the same differ in `own` alone: a cluster takes them as an array.
    """

    run: str
    stage: str
    script: str  # from the repository's root
    # what is called when its turn comes gets those of `after_all` that have been done; None: nothing to do
    arguments: Sequence[str] | Callable[[Sequence["Job"]], Sequence[str] | None]
    output: Path | None  # what it makes; None: a cache that may not be needed
    settings: str  # everything else that the output depends on: also what is read that no job makes
    after: list["Job"] = field(default_factory=list)  # must have been done
    after_all: list["Job"] = field(default_factory=list)  # must have ended, however
    own: str = ""  # one more override
    parts: Sequence[Path] = ()  # the files and folders of the output that others read; none: the output itself
    is_alone: bool = False  # knows one process
    state: str = "waiting"  # running, done, unchanged (done before), failed, stopped, dropped (one before it failed)
    error: str = ""

    @property
    def name(self) -> str:
        """For messages, and of its log."""
        return f"{self.run} {self.stage} {self.own}".rstrip()

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for the settings."""
        return hashlib.sha256(self.settings.encode()).hexdigest()[:16]

    @property
    def made(self) -> list[str]:
        """The files and folders that it makes."""
        return [for_shell(path) for path in self.parts or ([] if self.output is None else [self.output])]

    @property
    def before(self) -> list["Job"]:
        """The jobs whose output it may read: not those of caches, which only a cluster has and which change nothing."""
        return [job for job in (*self.after, *self.after_all) if job.output is not None]

    @property
    def is_made(self) -> bool:
        """Whether it has succeeded, now or before."""
        return self.state in ("done", "unchanged")

    @property
    def needed(self) -> list["Job"]:
        """All that must have succeeded, if it is to make all that it can."""
        return [*self.after, *(self.after_all if callable(self.arguments) else [])]

    def arguments_after(self, there: Sequence["Job"]) -> list[str] | None:
        """What the script gets where these of `after_all` have been done, but for `own`."""
        found = self.arguments(there) if callable(self.arguments) else self.arguments
        return None if found is None else list(found)

    def command(self, processes: int) -> list[str] | None:
        """The command line that starts it, over so many processes, once those before it have ended."""
        arguments = self.arguments_after([job for job in self.after_all if job.is_made])
        if arguments is None:
            return None
        launcher = str(REPOSITORY / "scripts" / "launch.sh")
        number = "1" if self.is_alone else str(processes)
        own = [self.own] if self.own else []
        return ["bash", launcher, number, str(REPOSITORY / self.script), *arguments, *own]


class Ledger:
    """Which jobs have been done: a file for each in `folder`, with three lines.

    Its key; what stands for the entries of the jobs before it, as they were when it began; what stands for the files
    that it made, as they were when it ended. On a cluster a job's shell writes its own (scripts/slurm/job.sh).
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def entry(self, job: Job) -> Path:
        """The file of a job."""
        return self.folder / job.name

    def made_of(self, job: Job) -> str:
        """What stands for the entries of the jobs before it."""
        return hashlib.sha256(b"".join(map(self._read, job.before))).hexdigest()

    def note(self, job: Job, made_of: str) -> None:
        """It has been done.

        Args:
            made_of: as it was when the job began.
        """
        make_folder(self.folder, "output_dir")
        write_small_file(self.entry(job), f"{job.key}\n{made_of}\n{state_of(job.made)}\n".encode())

    def begin(self, job: Job) -> str:
        """It starts, and what there was of it no longer counts; `made_of` at this moment."""
        self.entry(job).unlink(missing_ok=True)
        return self.made_of(job)

    def plan(self, job: Job) -> None:
        """Write down what its shell needs to note that it has been done: the jobs before it, and what it makes."""
        for kind, lines in (("before", [one.name for one in job.before]), ("made", job.made)):
            folder = self.folder.with_name(kind)
            make_folder(folder, "output_dir")
            write_small_file(folder / job.name, os.fsencode("".join(f"{line}\n" for line in lines)))

    def is_done(self, job: Job) -> bool:
        """Whether a job was done with these settings, of what there is now, and its output stands as it was made.

        What it was made from is taken to be done.
        """
        found = self._read(job)
        if not found.startswith(job.key.encode()) or (job.output is not None and not job.output.exists()):
            return False
        return found == f"{job.key}\n{self.made_of(job)}\n{state_of(job.made)}\n".encode()

    def done(self, jobs: Sequence[Job]) -> set[Job]:
        """Those that have been done, as everything has that they were made from.

        Args:
            jobs: none before one that it needs.
        """
        found: set[Job] = set()
        for job in jobs:
            noted = [one for one in job.after_all if self._read(one).startswith(one.key.encode())]
            if found.issuperset([*job.after, *noted]) and self.is_done(job):
                found.add(job)
        return found

    def _read(self, job: Job) -> bytes:
        """A job's entry; empty where there is none."""
        try:
            return self.entry(job).read_bytes()
        except OSError:
            return b""


def state_of(paths: Iterable[str]) -> str:
    """What stands for files and folders: of each file its path, size, inode and the time of its last change.

    Any writing sets that time, which can't be set back, unlike that of modification, which copies and archives keep.
    """
    lines = []
    for path in paths:
        for file in files_below(path):
            try:
                found = os.stat(file)
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode):
                seconds, rest = divmod(found.st_ctime_ns, 10**9)
                lines.append(os.fsencode(f"{file} {found.st_size} {found.st_ino} {seconds}.{rest:09d}0\n"))
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def files_below(path: str) -> Iterable[str]:
    """A file itself, or all files in a folder and the folders in it, each once, also where links lead there."""
    if not os.path.isdir(path):
        yield path
        return
    seen = set()
    for folder, inner, files in os.walk(path, followlinks=True):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:
            inner.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        yield from (os.path.join(folder, name) for name in files)
