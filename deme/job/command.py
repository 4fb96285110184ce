"""A script's command line, and how it ends."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from deme.config.experiment import Config
from deme.config.paths import Paths
from deme.config.reading import load_config
from deme.errors import RunError, UserError
from deme.job.files import REPOSITORY, to_yaml
from deme.job.signals import SIGNALS, Interrupted, ignore_signals, raise_interrupted, stopped_by


def print_once(line: str) -> None:
    """Print where all processes of a job have come to the same result, before they know each other."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def _leave_process_group() -> None:
    """Wait for the other processes and close the connections: one that just exits may abort in their threads."""
    distributed = sys.modules.get("torch.distributed")  # imported by main, or not needed
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _tell_launcher(line: str) -> bool:
    """Let torch's launcher, if it is there, repeat an error in its last lines, in the file that it names for that."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
    return bool(file)


def run_script(description: str, plan: Callable[[Config], str], main: Callable[[Config], None]) -> None:
    """Every script's command line: `--config FILE key=value …`, with `--dry-run` or `--path NAME`.

    Args:
        description: the script's docstring, shown by --help.
        plan: says in a few lines what `main` would do; printed by --dry-run under the resolved configuration.
        main: does it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=REPOSITORY / "configs/digits.yaml", metavar="FILE", help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and the plan, do nothing")
    parser.add_argument("--path", choices=Paths.names(), help="print where this lies, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    for number in SIGNALS:
        signal.signal(number, raise_interrupted)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.path is not None:
            print(config.paths.lines(arguments.path))
        elif arguments.dry_run:
            print(to_yaml(asdict(config)), plan(config), sep="\n")
        else:
            main(config)
            _leave_process_group()
        if stopped_by:
            raise Interrupted(stopped_by[0])
    except BaseException as error:
        ignore_signals()
        if stopped_by and not isinstance(error, Interrupted):
            error = Interrupted(stopped_by[0])
        if isinstance(error, OSError) and error.filename is not None:
            error = UserError(f"{error.filename}: {error.strerror}")
        if not isinstance(error, (UserError, RunError, Interrupted)):
            raise
        line = f"{parser.prog}: {'error: ' * isinstance(error, UserError)}{error}"
        if not _tell_launcher(line) or os.environ["RANK"] == "0":
            print(line, file=sys.stderr)
        sys.exit(error.status)
