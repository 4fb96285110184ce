"""One job at a time per output: a second one is refused, by the name of the first."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from deme.errors import UserError
from deme.job.files import make_folder, remove_leftovers, writing

RENEWED_EVERY = 60  # seconds between two signs of life of an owner
LEASE = 10 * RENEWED_EVERY  # seconds without one after which the owner of another host is taken for dead
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class InUse(UserError):
    """Another job holds an output."""


@contextmanager
def locked(output: Path, key: str) -> Iterator[None]:
    """Hold the file or folder `output` against other jobs while the block lasts; clear up after one that was killed.

    The operating system's lock on `.NAME.lock` beside it ends with the process, however that ends. The file names the
    owner, for the message and for disks shared by hosts that don't see each other's locks: an owner under the same
    kernel (which containers share) or of the same host is dead where its lock is free; one of another host gives a
    sign of life every minute, and is dead after ten without.

    Args:
        key: the configuration key that `output` comes from.

    Raises:
        InUse: another job holds it; names its host and process.
    """
    output = output if output.name else output.absolute()
    if not output.name:
        raise UserError(f"{key}={output}: must be a file or folder below it")
    make_folder(output.parent, key)
    file = _lock_file(output)
    lock = FileLock(file)
    with writing(file):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InUse(f"{key}={output}: in use by {_owner(file)[0] or 'another process'}") from None
    try:
        owner, is_dead = _owner(file)
        if not is_dead:
            wait = f"if that has ended, `rm {file}`, or wait {LEASE // 60} minutes"
            raise InUse(f"{key}={output}: in use by {owner}; {wait}")
        try:
            with writing(file):
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n{_boot_id()}", encoding="utf-8")
                remove_leftovers(output.resolve())
            with signs_of_life(partial(_touch, file), RENEWED_EVERY):
                yield
        finally:
            file.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone
    finally:
        lock.release()


def clear_lock(output: Path) -> None:
    """Delete the lock of a complete output, which nobody takes any more, where its owner was killed at the very end."""
    file = _lock_file(output)
    with suppress(OSError, Timeout):
        if file.exists():
            with FileLock(file, timeout=0):
                if _owner(file)[1]:
                    file.unlink(missing_ok=True)


@contextmanager
def signs_of_life(give: Callable[[], None], every: float) -> Iterator[None]:
    """Call `give` again and again while the block lasts, in a thread.

    Args:
        every: seconds between two calls, and before the first.
    """
    done = threading.Event()

    def renew() -> None:
        while not done.wait(every):
            give()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _touch(file: Path) -> None:
    with suppress(OSError):
        os.utime(file)


def _lock_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _owner(file: Path) -> tuple[str, bool]:
    """The owner that a lock's file names, in one line, and whether it is dead, given that its lock is free."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:  # it has just ended
        return "", True
    owner, boot_id, *_ = [*lines, "", ""]
    is_here = owner.endswith(f" on {socket.gethostname()}") or (boot_id != "" and boot_id == _boot_id())
    return owner[:200], not owner or is_here or age > LEASE


def _boot_id() -> str:
    """What tells this running kernel from all others; empty where there is none."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
