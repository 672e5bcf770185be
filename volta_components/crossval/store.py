# SPDX-License-Identifier: Apache-2.0
"""What MLflow knows of a cross-validation's runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from volta_components.crossval.plan import Run
from volta_components.downstream.tracking import PLAN_TAG, RECIPE_TAG, SETTINGS_TAG, share_text
from volta_components.errors import InputError
from volta_components.training.stores import check_experiment, prepare_store, share_rows, store_file


def mlflow_client(tracking_uri: str) -> Any:
    """MLflow's client for a store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri)


def _experiment_id(tracking_uri: str, name: str) -> str:
    """The experiment's id; made, with its store, before the first run, so that parallel runs do not race to do it."""
    from mlflow.exceptions import MlflowException

    prepare_store(tracking_uri)
    database = store_file(tracking_uri)
    location = (database.parent.resolve() / "mlruns").as_uri() if database else None

    def find_or_make() -> str:
        client = mlflow_client(tracking_uri)
        found = client.get_experiment_by_name(name)
        check_experiment(found, "--experiment NAME")
        return str(found.experiment_id if found else client.create_experiment(name, artifact_location=location))

    try:
        return share_rows(find_or_make)
    except MlflowException as error:
        raise InputError(f"--tracking-uri {tracking_uri}: MLflow cannot use it ({error})") from error


def tracking_address(tracking_uri: str | None, folder: Path) -> str:
    """MLflow's store: as given, otherwise ``MLFLOW_TRACKING_URI``, otherwise a database in a folder."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlruns.db"


def pages_hint(tracking_uri: str, experiment: str) -> str:
    """How to look at an experiment in MLflow's pages.

    Without the address's ``workflowType``, a browser that was last at traces of language models opens on these.
    """
    is_server = tracking_uri.startswith("http")
    address = tracking_uri.rstrip("/") if is_server else "http://127.0.0.1:5000"
    place = f"{address}/#/experiments/{_experiment_id(tracking_uri, experiment)}/runs?workflowType=machine_learning"
    return place if is_server else f"mlflow ui --backend-store-uri {tracking_uri}, then {place}"


def search_runs(client: Any, experiment_ids: Iterable[str], query: str) -> Iterator[Any]:
    """All runs that match a query, newest first."""
    token: str | None = None
    while token != "":
        page = client.search_runs(list(experiment_ids), query, max_results=1000, page_token=token)
        yield from page
        token = page.token or ""


def finished_runs(tracking_uri: str, experiment: str) -> dict[tuple[str, str], Any]:
    """The finished runs as MLflow has them, by name and settings."""
    place = _experiment_id(tracking_uri, experiment)  # first: it looks at the store, which MLflow's client may not bear
    runs = search_runs(mlflow_client(tracking_uri), [place], "tags.finished = 'true'")
    return {(run.info.run_name, run.data.tags.get(SETTINGS_TAG, "")): run for run in runs}


def renew_plan(run: Run, finished: Any) -> None:
    """Let a finished run say what the newest cross-validation that it is part of covers: fewer folds, more inits."""
    if finished.data.tags.get(PLAN_TAG) != run.plan:
        mlflow_client(run.tracking_uri).set_tag(finished.info.run_id, PLAN_TAG, run.plan)


def claim(run: Run) -> str | None:
    """Make sure that MLflow holds a run with these settings that is open.

    Open runs of the same name and other settings are left alone: another cross-validation may be training them.

    Returns:
        The run's id, or None if it is finished.
    """
    client = mlflow_client(run.tracking_uri)
    experiment_id = _experiment_id(run.tracking_uri, run.experiment)
    known = search_runs(client, [experiment_id], f"tags.`mlflow.runName` = '{run.name}'")
    ours = [item for item in known if item.data.tags.get(SETTINGS_TAG) == run.settings]
    if any(item.data.tags.get("finished") == "true" for item in ours):
        return None
    # What a run that dies before it has logged anything is counted by.
    tags = {"bundle": run.bundle, "fold": str(run.fold), "fraction": share_text(run.fraction), PLAN_TAG: run.plan}
    tags |= {SETTINGS_TAG: run.settings, RECIPE_TAG: run.recipe, "variant": run.variant, "made_by": run.made_by}
    if not ours:
        return str(client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id)
    run_id = str(ours[0].info.run_id)
    client.update_run(run_id, status="RUNNING")
    client.set_tag(run_id, PLAN_TAG, run.plan)
    return run_id


@contextmanager
def run_lock(path: Path) -> Iterator[int | None]:
    """An exclusive lock that ends with the last process that holds it; None if somebody else has it.

    Yields the lock's file descriptor, to be passed on to a child process. The package ``filelock`` keeps its descriptor
    to itself, so that a run would be free as soon as the parent dies, while its child still trains.
    """
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)
