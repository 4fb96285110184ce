"""Jobs that depend on each other, and which of them have been done."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deme.job.files import REPOSITORY, make_folder

ALONE = ("merge.py", "report.py")  # scripts that know one process


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
    state: str = "waiting"  # running, done, unchanged (done before), failed, stopped, dropped (one before it failed)
    error: str = ""

    @property
    def name(self) -> str:
        """For messages, and of its log."""
        return f"{self.run} {self.stage} {self.own}".rstrip().replace("/", "-")

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for the settings."""
        return hashlib.sha256(self.settings.encode()).hexdigest()[:16]

    def arguments_after(self, there: Sequence["Job"]) -> list[str] | None:
        """What the script gets where these of `after_all` have been done."""
        found = self.arguments(there) if callable(self.arguments) else self.arguments
        return None if found is None else [*found, *([self.own] if self.own else [])]

    def command(self, processes: int) -> list[str] | None:
        """The command line that starts it, over so many processes, once those before it have ended."""
        arguments = self.arguments_after([job for job in self.after_all if job.state in ("done", "unchanged")])
        if arguments is None:
            return None
        launcher = str(REPOSITORY / "scripts" / "launch.sh")
        number = "1" if self.script in ALONE else str(processes)
        return ["bash", launcher, number, str(REPOSITORY / self.script), *arguments]


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
        self.entry(job).write_text(f"{job.key}\n", encoding="utf-8")

    def is_done(self, job: Job) -> bool:
        """Whether a job was done with these settings, after those before it, and its output stands as it was made."""
        if not self._holds_key(job):
            return False
        made_of = [self.entry(before) for before in (*job.after, *job.after_all) if self._holds_key(before)]
        changed = [*made_of, *([] if job.output is None else [job.output])]
        return all(_changed(path) <= _changed(self.entry(job)) for path in changed)

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
