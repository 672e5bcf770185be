# SPDX-License-Identifier: Apache-2.0
"""MLflow's SQLite store: made whole or not at all, and looked at before MLflow opens it."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from volta_components.errors import InputError
from volta_components.files import atomic_path
from volta_components.training.ids import check_ids
from volta_components.training.record import calling_config

logger = logging.getLogger(__name__)

SQLITE = "sqlite:///"
MAGIC = b"SQLite format 3\0"
# What MLflow makes before everything else.
EARLY_TABLES = {"experiments", "runs", "tags", "metrics", "params", "alembic_version"}
SHARED_ROW_TRIES = 5

Result = TypeVar("Result")


class DamagedStoreError(InputError):
    """A store that cannot be read."""


def store_file(tracking_uri: str) -> Path | None:
    """The file of a SQLite store; None for any other store."""
    return Path(tracking_uri.removeprefix(SQLITE)) if tracking_uri.startswith(SQLITE) else None


def prepare_store(tracking_uri: str) -> None:
    """Make an MLflow store in a SQLite file, if there is none; refuse one that is broken.

    MLflow makes the tables of a new store one after the other, for some seconds. A process that is killed meanwhile
    leaves a store that MLflow can never open again. Here the tables are made in a file of another name, which is then
    renamed. A store in such a state is made again if it has no runs. One that cannot be read, but has no artifacts
    beside it either, has no finished run; it is kept as ``NAME.damaged``, and a new one is made. All other kinds of
    stores are MLflow's own business.

    Args:
        tracking_uri: the store's address.

    Raises:
        InputError: if the file is damaged and may have finished runs, is locked, or no store, or cannot be read or
            written.
    """
    path = store_file(tracking_uri)
    if path is None or not path.name or _can_stay(path):
        return
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not _can_stay(path):  # no other process has made it meanwhile
                _make(path)
            lock.unlink(missing_ok=True)  # filelock would leave it; a process that waits for it opens a new one
    except OSError as error:
        raise InputError(
            f"{path}: MLflow's store cannot be made ({error.strerror or error}); give another place (--tracking_uri)"
        ) from error


def check_store(tracking_uri: str) -> None:
    """Refuse a store that cannot be read; nothing is made.

    Raises:
        InputError: if it is absent, damaged, locked, or has no runs because its making was broken off.
    """
    path = store_file(tracking_uri)
    if path is not None and not _is_whole(path):
        what = "an MLflow store whose making was broken off" if path.exists() else "no such MLflow store"
        raise InputError(f"{tracking_uri}: {what}; run volta3d crossval first, or name another with --tracking-uri")


def prepare_tracking() -> None:
    """``check_ids`` for the config in which this is called as an expression; ``prepare_store`` if it is tracked."""
    check_ids()
    parser = calling_config("prepare_tracking")
    if "tracking_uri" in parser:  # MONAI adds it where there is tracking; the variable comes first, as MONAI has it
        prepare_store(os.environ.get("MLFLOW_TRACKING_URI") or str(parser.get_parsed_content("tracking_uri")))


def check_experiment(experiment: Any, other: str) -> None:
    """Refuse an experiment that was deleted in MLflow, which keeps its name; ``other`` is how to give another.

    Raises:
        InputError: with the command that restores it.
    """
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise InputError(
            f"MLflow's experiment {experiment.name} was deleted; restore it (mlflow experiments restore -x "
            f"{experiment.experiment_id}, with MLFLOW_TRACKING_URI set to its store), or give another ({other})"
        )


def share_rows(write: Callable[[], Result]) -> Result:
    """Write what several runs have in common: their experiment, its tags, their data sets.

    MLflow looks for a row and then adds it. Of two runs that begin together, the second cannot add what the first has
    added meanwhile, and has to look again.
    """
    from mlflow.exceptions import MlflowException

    for _ in range(SHARED_ROW_TRIES - 1):
        try:
            return write()
        except MlflowException as error:
            if not re.search("IntegrityError|UniqueViolation", str(error)):
                raise
    return write()


def _can_stay(path: Path) -> bool:
    """Whether a store is whole, or has to be made; one that is damaged and has no finished run is put aside."""
    try:
        return _is_whole(path)
    except DamagedStoreError as error:
        # Where MONAI and crossval let MLflow write the artifacts, which every finished run has.
        if any(file.is_file() for file in (path.parent / "mlruns").rglob("*")):
            raise
        aside = path.with_name(f"{path.name}.damaged")
        logger.warning("%s; it has no finished run, and is kept as %s", str(error).partition(";")[0], aside)
        path.replace(aside)
        return False


def _make(path: Path) -> None:
    # Here, since it takes a second.
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with atomic_path(path) as temporary:
        SqlAlchemyStore(f"{SQLITE}{temporary}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
        # A journal of the old file would be played back into the new one.
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether a file is a store that can be used; False if it has to be made, or made again.

    Raises:
        InputError: if it has, or may have, runs but is damaged; or is no store.
    """
    remedy = (
        "restore it from a copy, or save what can be read (sqlite3 FILE .recover | sqlite3 NEW), or move it away: a "
        "new store is then made, and its runs are trained again"
    )
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"{path}: MLflow's store cannot be read ({error.strerror})") from error
    if not MAGIC.startswith(start):
        raise InputError(f"{path}: not an MLflow store; give another (--tracking_uri)")
    if len(start) < len(MAGIC):
        return False
    try:
        with closing(sqlite3.connect(path, timeout=30)) as store:
            tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "runs" in tables:
                (runs,) = store.execute("SELECT count(*) FROM runs").fetchone()
                if runs == 0:
                    return _is_current(store, path)
            elif tables - EARLY_TABLES:
                raise InputError(f"{path}: a SQLite file, but not an MLflow store; give another (--tracking_uri)")
            else:
                return False
            verdict = _verdict(store, path)
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise InputError(
                f"{path}: MLflow's store is locked by another process; wait for it, or end it, and start again"
            ) from error
        if "malformed" not in str(error) and "not a database" not in str(error):
            raise InputError(f"{path}: MLflow's store cannot be used ({error})") from error
        raise DamagedStoreError(f"{path}: MLflow's store is damaged ({error}) and may have runs; {remedy}") from error
    if verdict != "ok":
        raise DamagedStoreError(
            f"{path}: MLflow's store is damaged ({verdict.splitlines()[-1]}) and has runs; {remedy}"
        )
    return True


def _verdict(store: sqlite3.Connection, path: Path) -> str:
    """What is wrong with a database, or "ok". SQLite itself does not miss a last page that nothing lies on yet."""
    (pages,), (size,) = (store.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
    if path.stat().st_size < pages * size:
        return f"{path.stat().st_size:,} of {pages * size:,} bytes"
    (verdict,) = store.execute("PRAGMA quick_check(1)").fetchone()
    return str(verdict)


def _is_current(store: sqlite3.Connection, path: Path) -> bool:
    """Whether all tables of a store without runs are there, in the form of the MLflow that is installed, and whole."""
    import mlflow
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    try:
        versions = [version for (version,) in store.execute("SELECT version_num FROM alembic_version")]
        if _verdict(store, path) != "ok":
            return False
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            raise
        return False
    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    try:
        scripts.get_revisions(versions)
    except CommandError:
        return True  # of a newer MLflow, which says so
    return versions == scripts.get_heads()
