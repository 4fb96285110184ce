"""One job at a time per output: a second one is refused by the name of the first, or waits for it."""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from deme.errors import RunError, UserError
from deme.job.files import TEMPORARY, make_folder, remove_leftovers, stamp, writing

HEARTBEAT = 0.5  # seconds between two signs of life of an owner
LEASE = 300.0  # seconds without one, as seen by who waits, after which the owner is taken for dead
POLLED_EVERY = 2.0  # seconds between two looks at what another job holds; the first ones come sooner


class InUse(UserError):
    """Another job holds an output."""


@contextmanager
def locked(
    output: Path, key: str, wait: bool = False, share: Callable[[Callable[[], bool]], bool] = lambda attempt: attempt()
) -> Iterator[None]:
    """Hold the file or folder `output` against other jobs while the block lasts; clear up after one that was killed.

    The lock is a `filelock.SoftFileLease` beside the output. It is created exclusively, so it needs no locks of the
    operating system, which hosts that share a folder may not see of each other.

    Args:
        key: the setting that `output` comes from.
        wait: for a living owner, too. A job that Slurm has started again waits in any case: its earlier self may be
            running on a node that was cut off.
        share: makes an attempt in one of several processes and returns its result in all of them.

    Raises:
        InUse: another job holds it; names its host and process.
    """
    output = output if output.name else output.absolute()
    if not output.name:
        raise UserError(f"{key}={output}: must be a file or folder below it")
    lock = SoftFileLease(lock_file(output), lease_duration=LEASE, heartbeat_interval=HEARTBEAT, on_compromise=_end)
    attempts = _attempts(lock, output, key, wait or os.environ.get("SLURM_RESTART_COUNT", "0") != "0")
    try:
        while not share(lambda: next(attempts)):
            pass
        yield
    finally:
        lock.release()


def lock_file(output: Path) -> Path:
    """The lock beside an output."""
    return output.with_name(f".{output.name}.lock")


def _attempts(lock: SoftFileLease, output: Path, key: str, wait: bool) -> Iterator[bool]:
    """Yield False for each attempt that fails, and True once the lock is held.

    The lock of a dead process of this host is taken over at once. Any other owner is watched: it gives a sign of life,
    upon which this job is refused, or it is dead after `LEASE`. No clocks are compared.
    """
    file = lock_file(output)
    seen, since, pause, is_told = None, 0.0, 0.1, False
    with writing(file):
        make_folder(output.parent, key)
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise UserError(f"{key}={output}: {file} is no lock, but stands in its place: delete it")
        while True:
            with suppress(Timeout, LeaseSettingsMismatch):
                lock.acquire(timeout=0)
                break
            owner, now, latest = lock.owner, time.monotonic(), stamp(file)
            if latest is None:  # released since
                continue
            name = "another process" if owner is None else f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
            in_use = f"{key}={output}: in use by {name}; if that has ended, `rm {file}`"
            if latest != seen:
                if seen is not None and not wait:
                    raise InUse(in_use)
                seen, since = latest, now
            elif now - since > 1.1 * LEASE:  # filelock was to take it over by now
                _remove_dead(file, seen)
            if not is_told and (wait or now - since > LEASE / 30):
                is_told = True
                limit = f"{LEASE / 60:.0f} minutes without a sign of life"
                if os.environ.get("RANK", "0") == "0":
                    print(f"{in_use}; waiting for it, or for {limit}", flush=True)
            time.sleep(pause)
            pause = min(2 * pause, POLLED_EVERY)
            yield False
        remove_leftovers(output.resolve())
    yield True


def _remove_dead(file: Path, seen: tuple[int, ...]) -> None:
    """Remove the lock that was seen, and no other that has just taken its place.

    filelock takes over only where the disk can exchange two names in one step, as NFS can't, and no empty file, which
    a job leaves that was killed before it wrote its name.
    """
    aside = file.with_name(f"{TEMPORARY}{file.stem.removeprefix('.')}-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        file.rename(aside)
        if stamp(aside) != seen:
            with suppress(FileExistsError):
                os.link(aside, file)
        aside.unlink()


def _end(lost: LeaseCompromise) -> None:
    """End this process, whose lock is gone or could not be renewed for too long.

    Another job may hold it: this one was suspended, or cut off from the disk. Not even a checkpoint may be written.
    """
    with suppress(OSError, ValueError):
        print(f"{lost.lock_file}: lost to another job ({lost.reason}); this one stops", file=sys.stderr, flush=True)
    os._exit(RunError.status)
