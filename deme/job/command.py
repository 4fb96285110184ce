"""A script's command line, and how it ends: any error is one line."""

import argparse
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
from typing import TextIO

from deme.config.experiment import Config
from deme.config.reading import load_config
from deme.errors import RunError, UserError, one_line
from deme.job.files import REPOSITORY, to_yaml
from deme.job.signals import SIGNALS, Interrupted, end_with_parent, ignore_signals, raise_interrupted, stopped_by


def run_script(description: str, plan: Callable[[Config], str], main: Callable[[Config], None]) -> None:
    """Every script's command line: `--config FILE key=value …`, with `--dry-run` or `--path NAME`.

    Args:
        description: the script's docstring, for --help.
        plan: says in a few lines what `main` would do, for --dry-run.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=REPOSITORY / "configs/digits.yaml", metavar="FILE", help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the plan, do nothing")
    parser.add_argument("--path", choices=list(vars(Config().paths)), help="print where this lies, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with ended_in_one_line(parser.prog) as run_folder:
        arguments = parser.parse_intermixed_args()
        _end_with_launcher()
        config = load_config(arguments.config, arguments.overrides)
        run_folder.append(config.paths.run_folder)
        if arguments.path is not None:
            print(config.paths.lines(arguments.path))
        elif arguments.dry_run:
            print(to_yaml(config.recorded), plan(config), sep="\n")
        else:
            main(config)
            _leave_process_group()


@contextmanager
def ended_in_one_line(script: str) -> Iterator[list[Path]]:
    """End this process with one line on standard error if the block raises any error.

    Yields:
        a list for the folder that takes a traceback, once it is known.
    """
    for number in SIGNALS:
        signal.signal(number, raise_interrupted)
    _prepare_streams()
    folder: list[Path] = []
    try:
        yield folder
        sys.stdout.flush()
        if stopped_by:
            raise Interrupted(stopped_by[0])
    except SystemExit:
        raise
    except BaseException as error:
        ignore_signals()
        if stopped_by and not isinstance(error, Interrupted):
            error = Interrupted(stopped_by[0])
        _end(script, error, folder[0] if folder else None)


def _prepare_streams() -> None:
    """Replace closed outputs, whose numbers the next files would take, and print in terminals of every alphabet."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for as long as the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _end(script: str, error: BaseException, folder: Path | None) -> None:
    """Leave the script with an error's line and status."""
    status, message = _explained(error, folder)
    line = f"{script}: {message}"
    if not _tell_launcher(line) or os.environ.get("RANK", "0") == "0":
        with suppress(OSError, ValueError):  # closed, or full
            print(line, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if _is_stuck(stream):  # or Python complains at its end, and exits with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _explained(error: BaseException, folder: Path | None) -> tuple[int, str]:
    """The exit status and the line for an error."""
    reason = one_line(error)
    if isinstance(error, Interrupted):
        return error.status, str(error)
    if isinstance(error, UserError):
        return error.status, f"error: {reason}"
    if isinstance(error, RunError):
        return error.status, reason
    if isinstance(error, OSError) and error.filename is not None:
        return UserError.status, f"error: {error.filename}: {reason}"
    if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and _is_stuck(sys.stdout)):
        return RunError.status, f"standard output: {reason}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return RunError.status, f"out of memory, a smaller batch_size or micro_batch_size takes less: {reason}"
    return RunError.status, f"this is a fault of ours: {reason}; the traceback is in {_write_traceback(folder)}"


def _is_stuck(stream: TextIO) -> bool:
    """True if an output stream is closed, or its disk is full."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _write_traceback(folder: Path | None) -> Path:
    """Write the traceback of the error that is handled beside the run, or else among temporary files."""
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    places = [folder, Path(tempfile.gettempdir())] if folder is not None else [Path(tempfile.gettempdir())]
    for place in places:
        with suppress(OSError):
            (place / name).write_text(traceback.format_exc(), encoding="utf-8")
            return place / name
    return places[-1] / name


def _end_with_launcher() -> None:
    """Have a worker of torch's launcher end when the launcher ends."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
        end_with_parent()
        if os.getppid() != launcher:  # it ended in between
            os.kill(os.getpid(), signal.SIGTERM)


def _leave_process_group() -> None:
    """Wait for the other processes and close the connections: one that just exits may abort in their threads."""
    distributed = sys.modules.get("torch.distributed")  # imported by main, or not needed
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _tell_launcher(line: str) -> bool:
    """Write an error to the file that torch's launcher names, if it is there, for its own last lines."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
    return bool(file)
