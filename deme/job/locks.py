"""One job at a time per output: a second one is refused, by the name of the first."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from deme.errors import UserError
from deme.job.files import make_folder, remove_leftovers, writing


@contextmanager
def locked(output: Path, key: str) -> Iterator[None]:
    """Hold the file or folder `output` against other jobs while the block lasts; clear up after one that was killed.

    The operating system's lock on `.NAME.lock` beside it ends with the process, however that ends. The file names the
    owner: for the message, and for disks shared by hosts that don't see each other's locks.

    Args:
        key: the configuration key that `output` comes from.

    Raises:
        UserError: another job holds it; names its host and process.
    """
    output = output if output.name else output.absolute()
    if not output.name:
        raise UserError(f"{key}={output}: must be a file or folder below it")
    make_folder(output.parent, key)
    host = socket.gethostname()
    file = _lock_file(output)
    lock = FileLock(file)
    with writing(file):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{key}={output}: in use by {_owner(file) or 'another process'}") from None
    try:
        owner = _owner(file)
        if owner and not owner.endswith(f" on {host}"):  # one of this host is dead, or its lock would stand
            raise UserError(f"{key}={output}: in use by {owner}; if that has ended, delete {file}")
        try:
            with writing(file):
                file.write_text(f"process {os.getpid()} on {host}", encoding="utf-8")
                remove_leftovers(output.parent, output.name)
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
                file.unlink(missing_ok=True)


def _lock_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _owner(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # it has just ended
        return ""
