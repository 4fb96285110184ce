"""A script's command line, its signals, and how it ends: any error is one line."""

import argparse
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from deme.config.experiment import Config
from deme.config.reading import load_config
from deme.errors import RunError, UserError, is_out_of_memory, one_line
from deme.job.files import to_yaml
from deme.job.rank import is_main_process
from deme.job.repository import REPOSITORY, found_path

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # preemption and Ctrl-C
LAUNCHER_NEEDS = 30.0  # seconds at most, until it has seen that the main process has ended
stopped_by: list[int] = []  # signals that raised Interrupted, which libraries may swallow or translate


class Interrupted(BaseException):
    """A signal ended the run. Not an Exception: nothing that handles errors may go on after it."""

    def __init__(self, number: int, state: str = ""):  # state: what the run leaves behind, for the message
        super().__init__(f"stopped by {signal.Signals(number).name}{state and f'; {state}'}")
        self.status = 128 + number


def run_script(description: str, plan: Callable[[Config], str], main: Callable[[Config], None]) -> None:
    """Every script's command line: `--config FILE key=value …`, with --dry-run, which prints `plan`, or --path NAME."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=REPOSITORY / "configs/digits.yaml", metavar="FILE", help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the plan, do nothing")
    parser.add_argument("--path", choices=Config().paths.names, help="print where this lies, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with ended_in_one_line(parser.prog) as run_folder:
        arguments = parser.parse_intermixed_args()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a worker of torch's launcher
            end_with_parent()
        config = load_config(found_path(arguments.config), arguments.overrides)
        run_folder.append(config.paths.run_folder)
        if arguments.path is not None:
            print(*dict.fromkeys(one.paths.lines(arguments.path) for one in config.drawn), sep="\n")
        elif arguments.dry_run:
            print(to_yaml(config.recorded), plan(config), sep="\n")
        else:
            main(config)
            disconnect_all()


def disconnect_all() -> None:
    """Close this process's connections once all processes have come here: one that just exits may abort in them."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


@contextmanager
def ended_in_one_line(script: str) -> Iterator[list[Path]]:
    """End this process with one line on standard error if the block raises any error.

    The list that it yields is for the folder that takes a traceback, once it is known.
    """
    _on_signals(_raise_interrupted)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next file would take its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process lives
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # for terminals of every alphabet
    folder: list[Path] = []
    try:
        yield folder
        sys.stdout.flush()
        if stopped_by:
            raise Interrupted(stopped_by[0])
    except SystemExit as ended:
        if ended.code and not is_main_process():
            # torch's launcher blames the process that ends first: the main one, which says why. It then ends this one
            _on_signals(signal.SIG_DFL)
            time.sleep(LAUNCHER_NEEDS)
        raise
    except BaseException as error:
        _on_signals(signal.SIG_IGN)
        if stopped_by and not isinstance(error, Interrupted):
            error = Interrupted(stopped_by[0])
        _end(script, error, folder[0] if folder else None)


def _end(script: str, error: BaseException, folder: Path | None) -> None:
    """Leave the script with an error's line and status."""
    status, message = _explained(error, folder)
    line = f"{script}: {message}"
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # of torch's launcher, which prints it as its own last lines
    if file:
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
    if not file or is_main_process():
        with suppress(OSError, ValueError):  # closed, or full
            print(line, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if _is_stuck(stream):  # or Python complains at its end, and exits with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _explained(error: BaseException, folder: Path | None) -> tuple[int, str]:
    """The exit status and the line for an error; the traceback of a fault of ours is written."""
    reason = one_line(error)
    if isinstance(error, Interrupted):
        return error.status, str(error)
    if isinstance(error, UserError | RunError):
        return error.status, f"error: {reason}" if isinstance(error, UserError) else reason
    if isinstance(error, OSError) and error.filename is not None:
        return UserError.status, f"error: {error.filename}: {reason}"
    if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and _is_stuck(sys.stdout)):
        return RunError.status, f"standard output: {reason}"
    if is_out_of_memory(error):
        return RunError.status, f"out of memory, a smaller batch_size or micro_batch_size takes less: {reason}"
    for place in [folder] * (folder is not None) + [Path(tempfile.gettempdir())]:
        file = place / f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        with suppress(OSError):
            file.write_text(traceback.format_exc(), encoding="utf-8")
            break
    return RunError.status, f"this is a fault of ours: {reason}; the traceback is in {file}"


def _is_stuck(stream: TextIO) -> bool:
    """True if an output stream is closed, or its disk is full."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    """The handler of SIGNALS. No second signal interrupts the cleaning up."""
    _on_signals(signal.SIG_IGN)
    stopped_by.append(number)
    raise Interrupted(number)


def _on_signals(handler: Any) -> dict[int, Any]:
    """Set the handler of SIGNALS; those before."""
    return {number: signal.signal(number, handler) for number in SIGNALS}


def end_with_parent() -> None:
    """Have Linux send SIGTERM when the parent is gone: a process left alone would train on, and hold its lock."""
    if sys.platform == "linux":
        parent, pr_set_pdeathsig = os.getppid(), 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:  # it ended in between
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within the block, only append signals to the list that is yielded."""
    received = list(stopped_by)
    before = _on_signals(lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
