"""One job at a time per output: a second one is refused by the name of the first, or waits for it."""

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from deme.errors import RunError, UserError
from deme.job.files import TEMPORARY, make_folder, remove_leftovers, writing

HEARTBEAT = 2.0  # seconds between two signs of life of an owner
LEASE = 300.0  # seconds without one, as seen by who waits, after which the owner is taken for dead
POLLED_EVERY = 2.0  # seconds between two looks at what another job holds; the first ones come sooner


class InUse(UserError):
    """Another job holds an output."""


@contextmanager
def locked(output: Path, key: str, wait: bool = False) -> Iterator[None]:
    """Hold the file or folder `output` against other jobs while the block lasts; clear up after one that was killed.

    The lock is a `filelock.SoftFileLease` beside the output. It is created exclusively, so it needs no locks of the
    operating system, which hosts that share a folder may not see of each other.

    Args:
        key: the setting that `output` comes from.
        wait: for the job that holds it, see `Attempts`.

    Raises:
        InUse: another job holds it; names its host and process.
    """
    with ExitStack() as held:
        attempt = Attempts(held, output, key, wait)
        while not attempt():
            pass
        yield


class Attempts:
    """A function to call until it returns True: then `held` lets go of the lock when it is closed.

    The lock of a dead process of this host is taken over at once. Any other owner is watched: it shows a sign of life
    every two seconds, upon which this job is refused, or it is dead after `LEASE`. No clocks are compared.

    Args:
        wait: for a living owner, too. A job that Slurm has started again waits in any case: its earlier self may be
            running on a node that was cut off.
    """

    def __init__(self, held: ExitStack, output: Path, key: str, wait: bool):
        self.output = output if output.name else output.absolute()
        if not self.output.name:
            raise UserError(f"{key}={output}: must be a file or folder below it")
        self.key = key
        self.file = lock_file(self.output)
        self.lock = _lease(self.file)
        held.callback(self.lock.release)
        self.wait = wait or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        self.seen: tuple[int, int, int] | None = None  # what changes with every sign of life
        self.since = 0.0  # when `seen` was first seen
        self.pause = 0.1  # seconds
        self.is_told = False

    def __call__(self) -> bool:
        """
        Raises:
            InUse: another job holds it, and this one is not to wait.
        """
        make_folder(self.output.parent, self.key)
        with writing(self.file):
            if self._acquire():
                remove_leftovers(self.output.resolve())
                return True
            self._watch()
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, POLLED_EVERY)
        return False

    def _acquire(self) -> bool:
        if self.file.is_symlink() or (self.file.exists() and not self.file.is_file()):
            raise UserError(f"{self.key}={self.output}: {self.file} is no lock, but stands in its place: delete it")
        with suppress(Timeout, LeaseSettingsMismatch):
            self.lock.acquire(timeout=0)
        return self.lock.is_locked

    def _watch(self) -> None:
        """Look at a lock that another job holds: refuse a living one, and remove a dead one."""
        owner = self.lock.owner
        try:
            stat = self.file.stat()
        except FileNotFoundError:  # released since
            return
        seen, now = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns), time.monotonic()
        name = "another process" if owner is None else f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
        in_use = f"{self.key}={self.output}: in use by {name}; if that has ended, `rm {self.file}`"
        if self.wait:
            self._tell(f"{in_use}; waiting for it")
        elif self.seen not in (None, seen) and owner is not None:
            raise InUse(in_use)
        if seen != self.seen:
            self.seen, self.since = seen, now
        elif now - self.since > 1.1 * LEASE:  # filelock was to take it over by now
            self._remove_dead()
        elif now - self.since > 4 * HEARTBEAT:
            minutes = f"{LEASE / 60:.0f} minutes"
            self._tell(f"{in_use}, or wait: without a sign of life it loses the lock after {minutes}")

    def _remove_dead(self) -> None:
        """Remove the lock that was watched, and no other that has just taken its place.

        filelock takes over only where the disk can exchange two names in one step, as NFS can't, and no empty file,
        which a job leaves that was killed before it wrote its name.
        """
        aside = self.file.with_name(f"{TEMPORARY}{self.output.name}-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            self.file.rename(aside)
            stat = aside.stat()
            if (stat.st_ino, stat.st_mtime_ns) != self.seen[:2]:
                with suppress(FileExistsError):
                    os.link(aside, self.file)
            aside.unlink()

    def _tell(self, message: str) -> None:
        if not self.is_told and os.environ.get("RANK", "0") == "0":
            print(message, flush=True)
        self.is_told = True


def lock_file(output: Path) -> Path:
    """The lock beside an output."""
    return output.with_name(f".{output.name}.lock")


def clear_lock(output: Path) -> None:
    """Delete the lock of a complete output, which nobody takes any more, if its owner was killed on this host."""
    if lock_file(output).is_file():
        lock = _lease(lock_file(output))
        with suppress(OSError, LeaseSettingsMismatch), lock.acquire(timeout=0):
            pass


def _lease(file: Path) -> SoftFileLease:
    return SoftFileLease(file, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, on_compromise=_end)


def _end(lost: LeaseCompromise) -> None:
    """End this process, whose lock is gone or could not be renewed for too long.

    Another job may hold it: this one was suspended, or cut off from the disk. Not even a checkpoint may be written.
    """
    with suppress(OSError, ValueError):
        print(f"{lost.lock_file}: lost to another job ({lost.reason}); this one stops", file=sys.stderr, flush=True)
    os._exit(RunError.status)
