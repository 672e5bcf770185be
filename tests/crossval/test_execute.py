# SPDX-License-Identifier: Apache-2.0
"""Runs are started, followed, resumed and queued again."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from planned_runs import epochs, planned

from volta_components.crossval import execute as module
from volta_components.crossval.command import crossval
from volta_components.crossval.execute import Outcome, _tail, execute
from volta_components.crossval.store import claim
from volta_components.errors import InputError


def test_the_cause_in_a_log_is_found(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "$ old\nValueError: of an earlier attempt\n\n$ new\n  0%|  | 1\r 50%|  | 2\nTraceback\n"
        "volta_components.errors.InputError: fold 1 has no AD:\n  sub-1  CN\nRemedy.\n\nThe above exception was\n"
        + "  frame\n" * 40
        + "RuntimeError: Failed to evaluate x\n"
    )
    lines = _tail(log)
    assert lines[:3] == ["volta_components.errors.InputError: fold 1 has no AD:", "  sub-1  CN", "Remedy."]
    assert lines[-1] == "RuntimeError: Failed to evaluate x"
    assert not any("earlier" in line for line in lines)


def test_a_run_whose_parent_raises_does_not_stop_the_others(monkeypatch, tmp_path):
    def run(run, slot):
        if run.name == "b":
            raise RuntimeError("database is locked")
        return Outcome(run, "finished", "")

    monkeypatch.setattr(module, "execute", run)
    runs = [SimpleNamespace(name=name, log=tmp_path / name) for name in ("a", "b", "c")]
    outcomes = {outcome.run.name: outcome for outcome in module.run_here(runs, 1, 0)}
    assert [outcomes[name].status for name in ("a", "b", "c")] == ["finished", "failed", "finished"]
    assert outcomes["b"].detail == "RuntimeError: database is locked"


@pytest.mark.slow
def test_failures_are_reported_others_go_on_and_the_broken_one_is_resumed(place, monkeypatch, capsys):
    command = {"bundle": "fake", "datalist": "datalist.json", "folds": [1], "inits": ["volta", "linear_scratch"]}
    command |= {"jobs": 2, "set": {"epochs": 2}}
    monkeypatch.setenv("FAKE_FAIL", "volta_fold1_frac1_seed1")
    assert crossval(**command) == 1
    output = capsys.readouterr()
    assert "1 of 2 runs are finished" in output.out
    broken, well = (next(place.glob(f"runs/fake/{init}_fold1*")) for init in ("volta", "linear_scratch"))
    assert f"{broken}/log.txt ends with:" in output.err and "RuntimeError: told to fail" in output.err
    assert epochs(well) == ["1 of 1", "2 of 1"]
    before = (well / "log.txt").read_bytes()

    monkeypatch.delenv("FAKE_FAIL")
    assert crossval(**command) == 0
    assert "2 of 2 runs are finished, 1 of them from before" in capsys.readouterr().out
    assert (well / "log.txt").read_bytes() == before
    # The first epoch was told to fail after its checkpoint was written: it is not trained again.
    assert epochs(broken) == ["1 of 1", "2 of 1"]
    client = MlflowClient(f"sqlite:///{place}/runs/mlruns.db")
    runs = client.search_runs([client.get_experiment_by_name("volta3d_fake").experiment_id])
    assert sorted((run.info.run_name, run.data.tags["finished"]) for run in runs) == [
        ("linear_scratch_fold1_frac1_seed1", "true"),
        ("volta_fold1_frac1_seed1", "true"),
    ]
    names = [item.path for item in client.list_artifacts(runs[0].info.run_id)]
    assert "predictions" in names and any(name.startswith("config_") for name in names)


@pytest.mark.slow
def test_slurm_jobs_on_this_machine_and_torchrun_inside_a_run(place, capsys):
    """Submitit's local cluster in place of SLURM; two processes on the CPU in place of two GPUs."""
    command = {"bundle": "fake", "datalist": "datalist.json", "folds": 1, "set": {"epochs": 1}, "executor": "slurm"}
    assert crossval(**command, cluster="local", gpus_per_run=2, overlays=["tiny"]) == 0
    assert "1 of 1 runs are finished, 0 of them" in capsys.readouterr().out
    assert epochs(next(place.glob("runs/fake/volta_fold0*"))) == ["1 of 2"]


def test_a_signal_that_ends_a_job_ends_its_child(place, monkeypatch):
    """As submitit does at the time limit: ``checkpoint`` is called by a signal's handler, on the thread that waits."""
    run = planned(place)[0]
    monkeypatch.setattr(type(run), "command", lambda self: [sys.executable, "-c", "import time; time.sleep(60)"])
    took = []

    def handler(*_):
        begin = time.monotonic()
        module._Job().checkpoint(run)
        took.append(time.monotonic() - begin)

    def interrupt():
        while not module._CHILDREN:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        outcome = execute(run)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert outcome.status == "failed" and outcome.detail == f"exit status {-signal.SIGTERM}"
    assert len(took) == 1 and took[0] < 10


@pytest.mark.slow
def test_runs_of_one_name_side_by_side_log_to_their_own_runs(place, monkeypatch):
    """As two cross-validations with other overlays do. MONAI's handler looks for its run by name alone."""
    runs = [planned(place, settings={"epochs": count})[0] for count in (1, 2)]
    assert runs[0].name == runs[1].name
    ids = [claim(run) for run in runs]
    with ThreadPoolExecutor(2) as pool:
        assert [outcome.status for outcome in pool.map(execute, runs)] == ["finished", "finished"]
    client = MlflowClient(runs[0].tracking_uri)
    found = [client.get_run(run_id) for run_id in ids]
    assert [run.data.params["max_epochs"] for run in found] == ["1", "2"]
    assert [run.data.tags["crossval_settings"] for run in found] == [run.settings for run in runs]
    assert len(client.search_runs([found[0].info.experiment_id])) == 2


@pytest.mark.parametrize("writes", [False, True])
def test_a_log_is_shown_only_if_the_attempt_wrote_it(place, monkeypatch, capsys, writes):
    run = planned(place)[0]
    run.folder.mkdir(parents=True, exist_ok=True)
    run.log.write_text("\n$ first\nof the attempt before\n")

    def fail(run, gpus):
        if writes:
            run.log.write_text(run.log.read_text() + "\n$ second\nof this attempt\n")
        raise InputError("the store is gone")

    monkeypatch.setattr(module, "execute", fail)
    assert module.follow(module.run_here([run], 1, 0), 1, 0) == 1
    said = capsys.readouterr().err
    assert "failed, the store is gone" in said and "attempt before" not in said
    assert ("| of this attempt" in said) == writes


def test_no_slurm_here_is_said(place):
    if shutil.which("srun"):
        pytest.skip("SLURM is here")
    with pytest.raises(InputError, match="--executor"):
        crossval("fake", "datalist.json", folds=1, executor="slurm")


def test_a_job_whose_time_is_up_is_queued_again(place):
    run = planned(place)[0]
    delayed = module._Job().checkpoint(run)
    assert isinstance(delayed.function, module._Job) and delayed.args == (run,)
    assert Outcome(run, "finished").detail == ""
