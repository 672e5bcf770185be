# SPDX-License-Identifier: Apache-2.0
"""MLflow holds one open run of a name; a run is taken as long as its process lives."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mlflow import MlflowClient
from planned_runs import planned

from volta_components.crossval.execute import execute
from volta_components.crossval.store import claim, finished_runs, run_lock
from volta_components.errors import InputError


def test_a_run_is_taken_as_long_as_its_child_lives(place):
    run = planned(place)[0]
    with run_lock(run.folder / "lock") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    assert execute(run).status == "busy"
    child.communicate(b"\n")
    with run_lock(run.folder / "lock") as lock:
        assert lock is not None


def test_a_claim_leaves_one_open_run_of_a_name(place):
    first = planned(place)[0]
    other = planned(place, settings={"epochs": 7})[0]
    assert first.name == other.name and first.folder != other.folder
    client = MlflowClient(first.tracking_uri)
    one = claim(first)
    client.set_terminated(one, "FINISHED")  # as MONAI's handler does before predictions are written
    assert claim(first) == one
    assert client.get_run(one).info.status == "RUNNING"
    two = claim(other)
    # MONAI's handler takes up any run of the name that is not FINISHED: the first must not be it.
    assert client.get_run(one).info.status == "FINISHED" and client.get_run(two).info.status == "RUNNING"
    client.set_tag(one, "finished", "true")
    assert claim(first) is None


def test_a_file_that_is_no_store_is_named_before_mlflow_opens_it(tmp_path):
    path = tmp_path / "mlruns.db"
    path.write_text("my notes")
    with pytest.raises(InputError, match=r"mlruns\.db"):
        finished_runs(f"sqlite:///{path}", "volta3d_ixi_sex")
    assert path.read_text() == "my notes"
