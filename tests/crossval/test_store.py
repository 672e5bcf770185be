# SPDX-License-Identifier: Apache-2.0
"""MLflow holds a run for each name and settings; a run is taken as long as its process lives."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from mlflow import MlflowClient
from planned_runs import planned

from volta_components.crossval.execute import execute
from volta_components.crossval.store import _experiment_id, claim, finished_runs, renew_plan, run_lock
from volta_components.errors import InputError


def test_a_run_is_taken_as_long_as_its_child_lives(place):
    run = planned(place)[0]
    with run_lock(run.folder / "lock") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    assert execute(run).status == "busy"
    child.communicate(b"\n")
    with run_lock(run.folder / "lock") as lock:
        assert lock is not None


def test_a_claim_opens_its_own_run_and_leaves_others_of_its_name_alone(place):
    first = planned(place)[0]
    other = planned(place, settings={"epochs": 7})[0]
    assert first.name == other.name and first.folder != other.folder
    client = MlflowClient(first.tracking_uri)
    one = claim(first)
    client.set_terminated(one, "FINISHED")  # as MONAI's handler does before predictions are written
    assert claim(first) == one
    two = claim(other)
    # Another cross-validation may be training the first at this time.
    assert client.get_run(one).info.status == client.get_run(two).info.status == "RUNNING"
    assert "superseded" not in client.get_run(one).data.tags
    client.set_tag(one, "finished", "true")
    assert claim(first) is None


def test_a_deleted_experiment_is_named_with_the_remedy(place):
    run = planned(place)[0]
    claim(run)
    experiment = _experiment_id(run.tracking_uri, run.experiment)
    MlflowClient(run.tracking_uri).delete_experiment(experiment)
    with pytest.raises(InputError, match=rf"restore -x {experiment}.*\(--experiment NAME\)"):
        claim(run)


def test_a_claimed_run_says_what_it_is_and_what_was_planned(place):
    tags = MlflowClient(f"sqlite:///{place}/runs/mlruns.db").get_run(claim(planned(place)[0])).data.tags
    assert [tags[name] for name in ("bundle", "variant", "fold", "fraction")] == ["fake", "volta", "0", "0.5"]
    plan = {"inits": ["volta", "linear_scratch"], "fractions": [0.5, 1.0], "folds": [0, 1]}
    assert json.loads(tags["crossval_plan"]) == plan


def test_finished_runs_follow_the_newest_plan(place):
    run = planned(place, folds=2)[0]
    client = MlflowClient(run.tracking_uri)
    one = claim(run)
    client.set_tag(one, "finished", "true")
    again = planned(place, folds=1)[0]
    renew_plan(again, finished_runs(run.tracking_uri, run.experiment)[again.name, again.settings])
    assert json.loads(client.get_run(one).data.tags["crossval_plan"])["folds"] == [0]


def test_cross_validations_that_begin_together_share_an_experiment(place, monkeypatch):
    """MLflow looks for a name and then adds it, so that the second of two is refused."""
    address, both_looked = f"sqlite:///{place}/runs/mlruns.db", threading.Barrier(2)
    look = MlflowClient.get_experiment_by_name

    def look_together(client: MlflowClient, name: str) -> Any:
        found = look(client, name)
        if found is None:
            both_looked.wait()
        return found

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", look_together)
    with ThreadPoolExecutor(2) as threads:
        assert len(set(threads.map(_experiment_id, [address] * 2, ["volta3d_ixi_sex"] * 2))) == 1


def test_a_file_that_is_no_store_is_named_before_mlflow_opens_it(tmp_path):
    path = tmp_path / "mlruns.db"
    path.write_text("my notes")
    with pytest.raises(InputError, match=r"mlruns\.db"):
        finished_runs(f"sqlite:///{path}", "volta3d_ixi_sex")
    assert path.read_text() == "my notes"
