"""Where a study is kept: an Optuna storage, and what is read of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, inspect

from deme.config.section import without_password
from deme.errors import RunError, UserError, one_line
from deme.job.checked import checked

HEARTBEAT = 30  # seconds between two signs of life of a running trial
GRACE = 300  # seconds without one after which it is taken for dead
TABLES = {"studies", "trials", "version_info"}  # some of Optuna's


def open_storage(url: str) -> RDBStorage:
    """An Optuna storage by its URL."""
    try:
        if url.startswith("sqlite"):
            engine = create_engine(url)
            tables = set(inspect(engine).get_table_names())
            engine.dispose()
            if tables - BaseModel.metadata.tables.keys() and not tables >= TABLES:  # a few of Optuna's: it was killed
                raise UserError("a database of another program")
        return RDBStorage(url, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy and the databases' drivers raise their own
        reason = one_line(error).replace(url, without_password(url))
        raise UserError(f"no Optuna storage can be opened there: {reason}") from None


@dataclass(frozen=True)
class Kept:
    """What a search notes of a trial."""

    place: int
    passes: int


@contextmanager
def reading(storage: RDBStorage) -> Iterator[None]:
    """Say what is wrong with the storage where the block can't read or write it; never its password.

    Raises:
        RunError: it is gone, locked for long or full.
    """
    try:
        yield
    except StorageInternalError as error:
        raise RunError(f"search.storage: {one_line(error)}; the same command goes on") from error
    except (RunError, UpdateFinishedTrialError):
        raise
    except Exception as error:  # Optuna and SQLAlchemy raise whatever damaged rows lead to
        place = storage.engine.url.render_as_string(hide_password=True)
        raise UserError(f"search.storage={place}: damaged, or not of this search: {one_line(error)}") from error


def read_trials(
    storage: RDBStorage, study: Study, names: Sequence[str], states: Sequence[TrialState]
) -> list[FrozenTrial]:
    """The trials of these states, of which those that are complete hold all that is read of them.

    Args:
        names: of the coefficients.

    Raises:
        RunError: it can't be reached.
    """
    with reading(storage):
        if study.directions != [StudyDirection.MINIMIZE]:
            raise UserError(f"study {study.study_name} does not minimize one value")
        found = study.get_trials(deepcopy=False, states=states)
        for trial in found:
            if trial.state is TrialState.COMPLETE:
                kept = checked(trial.user_attrs, Kept, f"trial {trial.number}")
                checked({name: trial.params.get(name) for name in names}, dict[str, float], f"trial {trial.number}")
                if kept.place < 0 or kept.passes < 0 or not isinstance(trial.value, float):
                    raise UserError(f"trial {trial.number} is no candidate")
    return found
