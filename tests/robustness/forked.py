"""Runs of the scripts in processes forked from one that has imported the libraries: a second each instead of ten.

What runs is the script's file as `__main__`, with its own signal handlers, process group and exit status.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARIES = [
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "datasets",
    "deme.training.trainer",
    "deme.data.examples",
    "deme.models.denoisers",
    "deme.search.ways",
    "deme.report.figures",
    "alembic.command",  # these are imported when they are first used
    "optuna.storages._rdb.models",
    "sklearn.datasets",
    "sklearn.ensemble",
    "torch._decomp.decompositions_for_jvp",
    "torch_fidelity",
    "deme.analysis.gradient_conflict",
]


CALLS = ("replace", "rename", "unlink", "mkdir", "rmdir", "open", "close", "fsync")  # of os, around changes of files


class Run:
    """`python SCRIPT ARGUMENTS` in `folder`, on one thread of the CPU.

    Args:
        file_size_limit: bytes; a longer file can't be written, as on a full disk.
        killed_at: the process kills itself before so many of CALLS; 0: never.
        environment: instead of this process's variables.
        streams: where its output and its errors go; without them they are kept here.
        python: what it starts as Python itself.
    """

    def __init__(
        self,
        script: str,
        arguments: list[str],
        folder: Path,
        file_size_limit: int | None = None,
        killed_at: int = 0,
        environment: dict[str, str] | None = None,
        streams: list[Connection] | None = None,
        python: str = sys.executable,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        pipes = [] if streams else [context.Pipe(duplex=False) for _ in range(2)]
        self.output: dict[Connection, bytes] = {reader: b"" for reader, _ in pipes}
        writers = streams or [writer for _, writer in pipes]
        self.calls = context.Value("q", 0)  # of CALLS, so far
        limits = (file_size_limit, killed_at, self.calls)
        arguments = (script, arguments, str(folder), environment or dict(os.environ), python, writers, limits)
        self.process = context.Process(target=_run, args=arguments)
        self.process.start()
        for writer in writers:
            writer.close()

    @property
    def stdout(self) -> str:
        return self._text(0)

    @property
    def stderr(self) -> str:
        return self._text(1)

    def _text(self, stream: int) -> str:
        return list(self.output.values())[stream].decode(errors="replace")

    def send(self, number: int) -> None:
        """Send a signal to the process and those that it has started."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:  # it has no group of its own yet, or has just ended
                with suppress(ProcessLookupError):
                    os.kill(self.process.pid, number)

    def wait(self, seconds: float = 600) -> int | None:
        """The exit status, or −N after signal N; None where it still runs after so many seconds."""
        end = time.monotonic() + seconds
        streams = list(self.output)
        while streams:
            ready = wait(streams, max(0, end - time.monotonic()))
            if not ready:
                return None
            for stream in ready:
                part = os.read(stream.fileno(), 2**16)
                self.output[stream] += part
                if not part:
                    streams.remove(stream)
        self.process.join(max(0, end - time.monotonic()))
        return self.process.exitcode


def _run(
    script: str,
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    python: str,
    writers: list[Connection],
    limits: tuple[int | None, int, Synchronized],
) -> None:
    os.setpgid(0, 0)
    for number, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), number)
        writer.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ |= environment | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    sys.executable = python
    os.chdir(folder)
    sys.path.insert(0, str(REPOSITORY))
    sys.argv = [script, *arguments]
    file_size_limit, killed_at, calls = limits
    count_calls(calls, killed_at)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def count_calls(calls: Synchronized, killed_at: int) -> None:
    """Wrap CALLS so that this process counts them, and is killed before one of them."""

    def counted(call: Callable) -> Callable:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            with calls.get_lock():
                calls.value += 1
                if calls.value == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
