"""Feed damaged files of every format that is read from outside to the functions that read them.

    python tests/robustness/fuzz.py                       # ten minutes of each format
    python tests/robustness/fuzz.py png npz --seconds 60
    python tests/robustness/fuzz.py png --start 12345 --examples 1     # one again, with its traceback

A damaged file is read, or refused in one line as a user's mistake or a run that can't go on. Every other end is a
fault: another error, a crash, ten seconds of a processor, 4 GiB. Example i of a format is a function of i alone.
"""

import argparse
import faulthandler
import io
import itertools
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from robustness.damaged_formats import FORMATS

from deme.errors import RunError, UserError

SECONDS = 10  # of a processor that an example may take
MEMORY = 4 * 2**30  # bytes that it may take


def out_of_time(_number: int, _frame: object) -> NoReturn:
    """Signal handler."""
    raise TimeoutError(f"more than {SECONDS} s")


def fault(name: str, number: int) -> str | None:
    """The traceback of an example's end that is not allowed, if it has one."""
    choose = random.Random(f"{name} {number}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for read in FORMATS[name](choose, Path(folder)):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    read()
            except (UserError, RunError):
                pass
            except OSError as error:
                if error.filename is None:  # else the script names the file
                    return traceback.format_exc()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                return traceback.format_exc()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(FORMATS)}; all, if none is named")
    parser.add_argument("--seconds", type=float, default=600, help="for each format")
    parser.add_argument("--examples", type=int, help="of each format, at most")
    parser.add_argument("--start", type=int, default=0, help="the first example's number")
    arguments = parser.parse_args()
    if unknown := set(arguments.formats) - FORMATS.keys():
        parser.error(f"no format: {', '.join(unknown)}")
    faulthandler.enable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, out_of_time)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HOME": tempfile.mkdtemp()}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    faults = 0
    for name in arguments.formats or FORMATS:
        end = time.monotonic() + arguments.seconds
        found = set()
        for count in itertools.count(1):
            number = arguments.start + count - 1
            trace = fault(name, number)
            if trace is not None and (place := trace.splitlines()[-3:][0]) not in found:  # each place once
                found.add(place)
                print(f"{name} {number}\n{trace}", flush=True)
            if count == arguments.examples or time.monotonic() >= end:
                break
        print(f"{name}: {count} examples, {len(found)} faults", flush=True)
        faults += len(found)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
