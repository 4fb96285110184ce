"""One job at a time per output: a second one is refused, by the name of the first, or waits for it."""

import fcntl
import glob
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from deme.errors import RunError, UserError
from deme.job.files import make_folder, remove_leftovers, writing

RENEWED_EVERY = 60  # seconds between two signs of life of an owner
LEASE = 10 * RENEWED_EVERY  # seconds without one after which the owner of another host is taken for dead
POLLED_EVERY = 2.0  # seconds between two looks at what another job holds; the first ones come sooner
YIELDED_WITHIN = 1.0  # seconds in which the later one of two that claim at once has given way
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class InUse(UserError):
    """Another job holds an output."""


class Removed(Exception):
    """A claim that was a moment old was taken for a dead job's."""


class Owner(NamedTuple):
    """Who made a claim, as far as can be seen from here."""

    name: str  # process and host
    renewed: float  # when it gave its last sign of life, by the clock of the disk
    is_locked: bool  # the operating system says that it lives
    is_dead: bool


@contextmanager
def locked(output: Path, key: str, wait: bool = False) -> Iterator[None]:
    """Hold the file or folder `output` against other jobs while the block lasts; clear up after one that was killed.

    Each job puts a claim of its own beside the output, `.NAME.lock-…`, which names it, and then looks for those of
    others: of two, at least one sees the other, whether or not their hosts see each other's locks. As no two claims
    have one name, a dead job's can be deleted without hitting that of a third one.

    The operating system's lock on a claim ends with the process, however that ends: an owner under the same kernel
    (which containers share) or of the same host is dead where its lock is free. One of another host gives a sign of
    life every minute, and is dead after ten without.

    Args:
        key: the configuration key that `output` comes from.
        wait: see `Attempts`.

    Raises:
        InUse: another job holds it; names its host and process.
    """
    with ExitStack() as held:
        attempt = Attempts(held, output, key, wait)
        while not attempt():
            pass
        yield


class Attempts:
    """Calls that try to hold an output, until one returns True: by then `held` lets go of it.

    Args:
        wait: until another job lets go of it, instead of being refused. A job that Slurm has started again waits in any
            case: its earlier self may be running on a node that was cut off.
    """

    def __init__(self, held: ExitStack, output: Path, key: str, wait: bool):
        self.held = held
        self.output = output
        self.key = key
        self.wait = wait or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        self.pause = 0.1  # seconds
        self.is_told = False

    def __call__(self) -> bool:
        """
        Raises:
            InUse: another job holds it, and this one is not to wait.
        """
        try:
            self.held.enter_context(_held(self.output, self.key))
            return True
        except Removed:
            return False
        except InUse as error:
            if not self.wait:
                raise
            if not self.is_told and os.environ.get("RANK", "0") == "0":
                print(f"{error}; waiting for it", flush=True)
            self.is_told = True
            time.sleep(self.pause)
            self.pause = min(2 * self.pause, POLLED_EVERY)
            return False


def clear_lock(output: Path) -> None:
    """Delete the lock of a complete output, which nobody takes any more, where its owner was killed at the very end."""
    if claims(output):
        with suppress(OSError, UserError, RunError, Removed), _held(output, "output"):
            pass


def claims(output: Path) -> list[Path]:
    """The claims of living and dead jobs to an output."""
    found = output.parent.glob(f".{glob.escape(output.name)}.lock-*")
    return [path for path in found if not path.is_dir()]  # a folder is none of ours


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


@contextmanager
def _held(output: Path, key: str) -> Iterator[None]:
    """One attempt of `locked`."""
    output = output if output.name else output.absolute()
    if not output.name:
        raise UserError(f"{key}={output}: must be a file or folder below it")
    make_folder(output.parent, key)
    mine = output.with_name(f".{output.name}.lock-{secrets.token_hex(4)}")
    with ExitStack() as held:
        held.callback(mine.unlink, missing_ok=True)
        try:
            with writing(mine):
                with mine.open("x", encoding="utf-8") as file:  # closed before others are looked for: NFS sends it then
                    file.write(f"process {os.getpid()} on {socket.gethostname()}\n{_boot_id()}")
                with _removed_if_missing():
                    lock = held.enter_context(mine.open("rb+"))
                with suppress(OSError):  # a disk without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                _outlast_others(output, mine)
                remove_leftovers(output.resolve())
        except InUse as error:
            raise InUse(f"{key}={output}: {error}") from None
        with signs_of_life(partial(_renew, mine), RENEWED_EVERY):
            yield


def _outlast_others(output: Path, mine: Path) -> None:
    """Return once all other claims are those of dead jobs, which are deleted. Of several new ones the oldest wins.

    Raises:
        InUse: a living one holds it, or came before.
        Removed: another job took this one's for a dead one's before it was locked.
    """
    end = time.monotonic() + YIELDED_WITHIN
    while True:
        found = claims(output)
        with _removed_if_missing():
            now = mine.stat().st_mtime  # by the disk's clock, as those of the others
        living = []
        for claim in found:
            owner = None if claim == mine else _owner(claim, now)
            if owner is not None and owner.is_dead:
                claim.unlink(missing_ok=True)
            elif owner is not None:
                living.append((owner.renewed, claim, owner))
        if not living:
            return
        renewed, claim, owner = min(living)
        if (renewed, claim) < (now, mine) or time.monotonic() > end:
            wait = "" if owner.is_locked else f"; if that has ended, `rm {claim}`, or wait {LEASE // 60} minutes"
            raise InUse(f"in use by {owner.name or 'another process'}{wait}")
        time.sleep(0.01)


@contextmanager
def _removed_if_missing() -> Iterator[None]:
    """
    Raises:
        Removed: instead of the error of a file that is not there.
    """
    try:
        yield
    except FileNotFoundError:
        raise Removed from None


def _renew(mine: Path) -> None:
    """Give a sign of life; end this process where its claim is gone.

    Another job has taken over what this one held: it may have been suspended, or cut off from the disk, for longer than
    the lease. Not even a checkpoint may be written any more.
    """
    try:
        os.utime(mine)
    except FileNotFoundError:
        with suppress(OSError, ValueError):
            print(f"{mine}: deleted or taken over by another job; this one stops", file=sys.stderr, flush=True)
        os._exit(RunError.status)
    except OSError:
        pass  # the disk may come back


def _owner(claim: Path, now: float) -> Owner | None:
    """Who made a claim; None where that has just ended."""
    try:
        with claim.open("rb") as file:
            name, boot_id, *_ = [*file.read().decode(errors="replace").splitlines(), "", ""]
            is_locked, has_locks = False, True
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                is_locked = True
            except OSError:
                has_locks = False
        renewed = claim.stat().st_mtime
    except FileNotFoundError:
        return None
    is_here = name.endswith(f" on {socket.gethostname()}") or (boot_id != "" and boot_id == _boot_id())
    is_dead = not is_locked and (not name or (is_here and has_locks) or now - renewed > LEASE)
    return Owner(name[:200], renewed, is_locked, is_dead)


def _boot_id() -> str:
    """What tells this running kernel from all others; empty where there is none."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""
