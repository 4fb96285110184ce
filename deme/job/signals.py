"""SIGTERM (preemption) and Ctrl-C end a script with one line and the status that shells expect."""

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal ended the run. Not an Exception: nothing that handles errors may go on after it.

    Args:
        state: what the run leaves behind, for the message.
    """

    def __init__(self, number: int, state: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{state and f'; {state}'}")
        self.status = 128 + number


stopped_by: list[int] = []  # signals that raised Interrupted, which libraries may swallow or translate


def raise_interrupted(number: int, frame: FrameType | None) -> None:
    """The handler of SIGNALS. No second signal interrupts the cleaning up."""
    ignore_signals()
    stopped_by.append(number)
    raise Interrupted(number)


def ignore_signals() -> None:
    """Let nothing interrupt what follows."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Have Linux send SIGTERM when the parent is gone: a process left alone would train on, and hold its lock."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within the block, only append signals to the list that is yielded."""
    received = list(stopped_by)
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
