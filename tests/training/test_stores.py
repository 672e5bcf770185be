# SPDX-License-Identifier: Apache-2.0
"""MLflow's store: whole or absent, whatever kills its making; damaged ones are named, or made again without runs."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_bundle import empty_store
from mlflow import MlflowClient
from monai.bundle import ConfigParser

from volta_components.errors import InputError
from volta_components.training import stores
from volta_components.training.stores import check_store, prepare_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A whole store without runs."""
    empty_store(tmp_path)
    return tmp_path / "mlruns.db"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Which stores were made, without the seconds that it takes."""
    template = tmp_path_factory.mktemp("template")
    empty_store(template)
    paths: list[Path] = []

    def make(path: Path) -> None:
        paths.append(path)
        shutil.copy(template / "mlruns.db", path)

    monkeypatch.setattr(stores, "_make", make)
    return paths


def uri(path: Path) -> str:
    return f"sqlite:///{path}"


def run_ids(path: Path) -> list[str]:
    client = MlflowClient(uri(path))
    return [run.info.run_id for run in client.search_runs([item.experiment_id for item in client.search_experiments()])]


def test_a_whole_store_stays_as_it_is(store: Path, made: list[Path]) -> None:
    for _ in range(2):
        before = store.read_bytes()
        prepare_store(uri(store))
        check_store(uri(store))
        assert store.read_bytes() == before
        MlflowClient(uri(store)).create_run("0")  # and the same with a run in it
    assert not made
    prepare_store("https://mlflow.example.org")  # of other stores nothing is known


def test_an_absent_store_is_made_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mlruns.db"
    with pytest.raises(InputError, match="no such MLflow store"):
        check_store(uri(path))
    prepare_store(uri(path))
    assert [item.name for item in path.parent.iterdir()] == ["mlruns.db"]
    MlflowClient(uri(path)).create_run("0")
    assert len(run_ids(path)) == 1
    check_store(uri(path))


def test_every_torn_store_without_runs_is_made_again(store: Path, made: list[Path]) -> None:
    whole = store.read_bytes()
    dice = random.Random(0)
    for length in [0, 1, 15, 16, 100, 4096, *(dice.randrange(len(whole)) for _ in range(20))]:
        store.write_bytes(whole[:length])
        made.clear()
        prepare_store(uri(store))
        assert made == [store], length
        assert store.read_bytes() == whole


@pytest.mark.parametrize("change", ["DROP TABLE runs", "DELETE FROM alembic_version", "DROP TABLE latest_metrics"])
def test_a_store_whose_tables_are_not_all_there_is_made_again(store: Path, made: list[Path], change: str) -> None:
    """As a kill leaves it, between two tables or two versions."""
    with sqlite3.connect(store) as connection:
        if "latest" in change:
            connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        if "runs" in change:
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                if name not in ("experiments", "alembic_version") and not name.startswith("sqlite"):
                    connection.execute(f"DROP TABLE {name}")
        else:
            connection.execute(change)
    connection.close()
    prepare_store(uri(store))
    assert made == [store]


def test_a_torn_store_with_runs_is_named_and_never_touched(store: Path, made: list[Path]) -> None:
    client = MlflowClient(uri(store))
    for _ in range(30):
        client.create_run("0")
    artifact = store.parent / "mlruns" / "0" / "run" / "artifacts" / "result.json"
    artifact.parent.mkdir(parents=True)
    artifact.write_text("{}")
    whole = store.read_bytes()
    dice = random.Random(0)
    for length in [4096, len(whole) // 2, len(whole) - 1, *(dice.randrange(4096, len(whole)) for _ in range(10))]:
        store.write_bytes(whole[:length])
        for look in (prepare_store, check_store):
            with pytest.raises(InputError, match=r"mlruns\.db: MLflow's store is damaged .*restore it from a copy"):
                look(uri(store))
        assert store.read_bytes() == whole[:length]
    assert not made


def test_a_torn_store_that_may_have_runs_but_none_that_finished_is_kept_aside(
    store: Path, made: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    MlflowClient(uri(store)).create_run("0")
    torn = store.read_bytes()[:9000]
    store.write_bytes(torn)
    prepare_store(uri(store))
    assert made == [store]
    assert store.with_name("mlruns.db.damaged").read_bytes() == torn
    assert "mlruns.db.damaged" in caplog.text


def test_other_files_are_named_and_never_touched(tmp_path: Path, made: list[Path]) -> None:
    text, other = tmp_path / "notes.txt", tmp_path / "other.db"
    text.write_text("my notes")
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE patients (name)")
    connection.close()
    for path in (text, other):
        before = path.read_bytes()
        with pytest.raises(InputError, match=f"{path.name}: .*not an MLflow store"):
            prepare_store(uri(path))
        assert path.read_bytes() == before
    blocked = text / "mlruns.db"
    with pytest.raises(InputError, match=r"notes\.txt/mlruns\.db: MLflow's store cannot be "):
        prepare_store(uri(blocked))
    assert not made


def test_a_locked_store_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.1))
    other = connect(store, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match=r"mlruns\.db: MLflow's store is locked by another process; wait for it"):
        prepare_store(uri(store))
    other.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_cannot_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Before 3.21, filelock took it for a lock that another process holds, and waited for ever."""

    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=rf"mlruns\.db: MLflow's store cannot be made \({os.strerror(number)}\)"):
        prepare_store(uri(tmp_path / "mlruns.db"))


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_store_is_made_on_a_disk_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 3.24 on, filelock then takes the file's being there for the lock."""

    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    prepare_store(uri(tmp_path / "mlruns.db"))
    assert [item.name for item in tmp_path.iterdir()] == ["mlruns.db"]


def test_a_config_prepares_the_store_that_it_names(
    tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ids = {"imports": ["$import volta_components.bundle as volta"], "call": "$volta.prepare_tracking()"}
    ConfigParser(ids).get_parsed_content("call")  # no tracking
    assert not made
    ids["tracking_uri"] = f"$'sqlite:///{tmp_path}/' + 'a.db'"
    ConfigParser(ids).get_parsed_content("call")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(tmp_path / "b.db"))
    ConfigParser(ids).get_parsed_content("call")
    assert made == [tmp_path / "a.db", tmp_path / "b.db"]


MAKE = (
    "import sys; from volta_components.training.stores import prepare_store; prepare_store(sys.argv[1]); print('made')"
)


@pytest.mark.slow
def test_a_store_whose_making_is_killed_is_made_by_the_next(tmp_path: Path) -> None:
    """Real processes, killed at random moments of their first seconds, until one has made it."""
    path = tmp_path / "mlruns.db"
    dice = random.Random()
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", MAKE, uri(path)], stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(".partial-*")):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.exists():
            check_store(uri(path))
            path.unlink()
    subprocess.run([sys.executable, "-c", MAKE, uri(path)], check=True, capture_output=True)
    assert [item.name for item in tmp_path.iterdir()] == ["mlruns.db"]
    MlflowClient(uri(path)).create_run("0")
    assert len(run_ids(path)) == 1
