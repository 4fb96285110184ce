"""Where studies are kept: an Optuna storage."""

import fcntl
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import create_engine, inspect

from deme.config.section import without_password
from deme.errors import RunError, UserError, naming, one_line
from deme.job.processes import Processes, in_main_process, locked_by_all

HEARTBEAT = 30  # seconds between two heartbeats of a running trial
GRACE = 300  # seconds without a heartbeat after which a trial's candidate is tried again

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=ExperimentalWarning)


def open_storage(url: str) -> RDBStorage:
    """Open or create an Optuna storage."""
    try:
        if url.startswith("sqlite"):
            engine = create_engine(url)
            tables = inspect(engine).get_table_names()
            engine.dispose()
            if tables and "studies" not in tables:  # the first one that Optuna creates
                raise UserError("a database of another program")
        retry = RetryHeartbeatStaleTrialCallback()
        return RDBStorage(url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry)
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy and the database drivers raise their own
        reason = one_line(error).replace(url, without_password(url))
        raise UserError(f"no Optuna storage can be opened there: {reason}") from None


def open_by_all(processes: Processes, url: str | None, folder: Path) -> RDBStorage:
    """Open `search.storage`, or study.db of the search's folder, in every process."""
    where = url or f"sqlite:///{folder / 'study.db'}"

    def create() -> None:
        with naming("search.storage", without_password(url) or folder / "study.db"):
            open_storage(where)

    with locked_by_all(processes, folder / "storage", "search.output", wait=True):  # two at once would fail
        in_main_process(processes, create)
    return open_storage(where)


@contextmanager
def joined(storage: RDBStorage, clear: Callable[[], None]) -> Iterator[None]:
    """Hold a lock beside an SQLite file with the other jobs that use it; a job that is alone there clears it first."""
    url = storage.engine.url
    if url.get_backend_name() != "sqlite":
        yield
        return
    with open(f"{url.database}.lock", "a") as file:
        with suppress(OSError):  # another job holds it, or the disk has no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            clear()
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def reading(storage: RDBStorage) -> Iterator[None]:
    """Explain errors of the storage without its password: RunError if it is gone, full or locked for long."""
    try:
        yield
    except StorageInternalError as error:
        raise RunError(f"search.storage: {one_line(error)}; the same command goes on") from error
    except UpdateFinishedTrialError as error:
        reason = f"no sign of life for {GRACE} seconds, so another job tries this job's candidate"
        raise RunError(f"search.storage: {reason}; the same command goes on") from error
    except (UserError, RunError):
        raise
    except Exception as error:  # damaged rows lead to any error of Optuna and SQLAlchemy
        place = storage.engine.url.render_as_string(hide_password=True)
        raise UserError(f"search.storage={place}: damaged, or not of this search: {one_line(error)}") from error
