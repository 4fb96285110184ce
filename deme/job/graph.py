"""Jobs that depend on each other, and which of them have been done."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    settings: str  # everything else that the output depends on
    after: list["Job"] = field(default_factory=list)  # must have been done
    after_all: list["Job"] = field(default_factory=list)  # must have ended, however
    own: str = ""  # one more override
    inputs: list[Path] = field(default_factory=list)  # files and folders that no job makes
    is_whole: Callable[[], bool] = lambda: True  # whether all of the output is there
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
    """Which jobs have been done: a file for each, that holds its key, in `folder`.

    On a cluster a job's shell writes its own (scripts/slurm/job.sh).
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def entry(self, job: Job) -> Path:
        """The file of a job."""
        return self.folder / job.name

    def note(self, job: Job) -> None:
        """It has been done."""
        make_folder(self.folder, "output_dir")
        write_small_file(self.entry(job), f"{job.key}\n".encode())

    def is_done(self, job: Job) -> bool:
        """Whether a job was done with these settings, and its output stands as it was made from what there is now.

        What it was made from is taken to be done.
        """
        if not self._holds_key(job) or not job.is_whole():
            return False
        before = [self.entry(one) for one in self._made_from(job)]
        outputs = [] if job.output is None else [job.output]
        return all(_changed(path) <= _changed(self.entry(job)) for path in (*before, *outputs, *job.inputs))

    def done(self, jobs: Sequence[Job]) -> set[Job]:
        """Those that have been done, as everything has that they were made from.

        Args:
            jobs: none before one that it needs.
        """
        found: set[Job] = set()
        for job in jobs:
            if found.issuperset([*job.after, *self._made_from(job)]) and self.is_done(job):
                found.add(job)
        return found

    def _made_from(self, job: Job) -> list[Job]:
        return [one for one in (*job.after, *job.after_all) if self._holds_key(one)]

    def _holds_key(self, job: Job) -> bool:
        try:
            return self.entry(job).read_text(encoding="utf-8") == f"{job.key}\n"
        except OSError:
            return False


def _changed(path: Path) -> float:
    """When it changed last, in nanoseconds; ∞ where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return float("inf")
