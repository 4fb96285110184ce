"""Imported first by every script, for Ctrl-C and SIGTERM while the rest is imported; `run_script` takes over."""

import os
import signal
import sys


def end_at_once(number: int, _frame: object) -> None:
    """The handler: nothing has begun yet."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end_at_once)
