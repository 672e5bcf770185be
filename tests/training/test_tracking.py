# SPDX-License-Identifier: Apache-2.0
"""Means for MLflow and the console."""

from __future__ import annotations

import json
import shlex
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_mlflow import FakeMLFlow
from ignite.engine import Engine, Events
from mlflow import MlflowClient
from monai.handlers import MLFlowHandler

from volta_components.errors import InputError
from volta_components.training import tracking
from volta_components.training.record import code_version
from volta_components.training.sampling import KeyedDataset
from volta_components.training.stores import prepare_store
from volta_components.training.tracking import (
    TrainingRecord,
    command_line,
    describe_run,
    device_of,
    find_mlflow_handler,
    group_metrics,
    hardware,
    hide_folders,
    prepare_handlers,
)

CPU = torch.device("cpu")


def test_a_command_reads_as_it_was_typed_and_names_no_folders() -> None:
    configs = "['bundles/pretrain/configs/train.json','bundles/pretrain/configs/tiny.json']"
    typed = f'python -m monai.bundle run --config_file "{configs}" --name "it\'s" --dataset_dir anna/data'
    words = [*typed.split('"')[0].split(), configs, "--name", "it's", "--dataset_dir", "/home/anna/data"]
    assert command_line(words) == typed
    for odd in ("$HOME's", "a b", 'it\'s "odd"'):
        assert shlex.split(command_line([odd])) == [odd]


def test_the_record_averages_over_mini_batches_and_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/home/anna/study/env/python", "-m", "pytest"])
    monkeypatch.setattr(sys, "argv", ["/home/anna/study/env/pytest.py"])
    fake = FakeMLFlow({"seed": "3"})
    monkeypatch.setattr(tracking, "find_mlflow_handler", lambda engine: fake)
    engine = Engine(lambda e, b: [{"loss": float(b**2), **({"learning_rate": float(b)} if b % 2 == 0 else {})}])
    engine.state.device = torch.device("cpu")
    settings = {"seed": 3, "size": (8, 12), "views": {"flip": 0.5}, "datalist_hash": "abc", "config": {"a": "@b"}}
    TrainingRecord(settings, interval=3).attach(engine)
    engine.run(range(1, 6), max_epochs=2)
    assert engine.state.metrics == {"loss": 55 / 5, "learning_rate": 3.0}
    # Mini-batches 1..5 and 1..5 again, three by three; a number that some lack is averaged over those that have it.
    assert fake.metrics[3] == pytest.approx({"step/loss": (1 + 4 + 9) / 3, "step/learning_rate": 2.0})
    assert fake.metrics[6] == pytest.approx({"step/loss": (16 + 25 + 1) / 3, "step/learning_rate": 4.0})
    assert fake.metrics[9] == pytest.approx({"step/loss": (4 + 9 + 16) / 3, "step/learning_rate": 3.0})
    # Once; not what a resumed run has already; of the config's text, only a hash.
    (params,) = fake.params
    assert len(params.pop("config")) == 12
    assert params == {"size": [8, 12], "views.flip": 0.5, "datalist_hash": "abc"}
    expected = {"code_version": code_version(), "datalist_hash": "abc", "seed": "3"}
    assert fake.client.tags.items() >= expected.items()
    assert fake.client.tags["mlflow.user"] and fake.client.tags["mlflow.source.name"]
    assert "pytest" in fake.client.tags["command"] and "cores" in fake.client.tags["hardware"]
    assert not [value for value in fake.client.tags.values() if "anna" in value]
    assert "`train/`, `val/`: means by epoch" in fake.client.experiment_tags["mlflow.note.content"]


def test_a_metric_has_one_axis_whatever_the_tracking_settings_say(tmp_path: Path) -> None:
    """MONAI's own settings log the loss of every mini-batch by iteration, and means by epoch."""
    engine: Any = Engine(lambda e, b: [{"loss": 1.0}])
    engine.state.device, engine.state.metrics = torch.device("cpu"), {}
    items = [{"subject_id": f"s{number}", "patient_id": "p"} for number in range(4)]
    loader = torch.utils.data.DataLoader(KeyedDataset(items, lambda item: 0.0), sampler=[(1, n) for n in range(4)])
    settings = {"bundle": "pretrain", "datalist_hash": "abc"}
    TrainingRecord(settings, interval=2).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: engine.state.metrics.update(validation_share_better=0.5))
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    handler = MLFlowHandler(uri, experiment_name="some", run_name=7, output_transform=lambda output: output[0]["loss"])
    handler.attach(engine)
    engine.run(loader, max_epochs=2)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("some")
    assert "bundle `pretrain`" in experiment.tags["mlflow.note.content"]
    [run] = client.search_runs([experiment.experiment_id])
    steps = {
        name: [point.step for point in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    assert steps == {"step/loss": [2, 4, 6, 8], "train/loss": [1, 2], "val/share_better": [1, 2]}
    [given] = run.inputs.dataset_inputs
    assert given.dataset.name == "pretrain (training)" and json.loads(given.dataset.profile)["scans"] == 4
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_a_process_of_crossval_logs_to_the_run_that_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MONAI's handler takes an open run of its name, whichever it is."""
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("some")
    runs = [client.create_run(experiment, run_name="volta_fold0").info.run_id for _ in range(3)]
    for run_id in runs:
        monkeypatch.setenv(tracking.RUN_ID, run_id)
        engine = Engine(lambda e, b: None)
        handler = MLFlowHandler(uri, experiment_name="some", run_name="volta_fold0")
        handler.attach(engine)
        prepare_handlers(engine)
        handler.start(engine)
        assert handler.cur_run.info.run_id == run_id


def test_a_deleted_experiment_is_named_with_the_remedy(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    prepare_store(uri)
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("some"))
    engine = Engine(lambda e, b: None)
    engine.add_event_handler(Events.STARTED, prepare_handlers, settings={})
    MLFlowHandler(uri, experiment_name="some", run_name="a").attach(engine)
    with pytest.raises(InputError, match=r"some was deleted; restore it .*--experiment_name NAME"):
        engine.run([0])


def test_an_open_run_is_taken_up_only_with_the_settings_it_has(tmp_path: Path) -> None:
    """An attempt that was killed before its first checkpoint, and one after it with another learning rate."""
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    prepare_store(uri)
    client = MlflowClient(uri)

    def train(rate: float, epochs: int = 1, is_killed: bool = False) -> str:
        engine, other = (Engine(lambda e, b: [{"loss": 1.0}]) for _ in range(2))
        engine.state.device = torch.device("cpu")  # type: ignore[attr-defined]
        settings = {"learning_rate": rate, "size": (1, 2), "epochs": epochs, "config": {"a": "@b"}}
        engine.add_event_handler(Events.STARTED, prepare_handlers, other, settings=settings)
        seen = []
        for each, closes in ((engine, True), (other, False)):
            handler = MLFlowHandler(uri, experiment_name="some", run_name="a", close_on_complete=closes)
            handler.iteration_log = False
            handler.attach(each)
            each.add_event_handler(Events.EPOCH_STARTED, lambda _, h: seen.append(h.cur_run.info.run_id), handler)
        record = TrainingRecord(settings)
        engine.add_event_handler(Events.ITERATION_COMPLETED, record._iteration_completed)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: other.run([0]))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: 1 / 0 if is_killed else None)
        try:
            engine.run([0], max_epochs=epochs)
        except ZeroDivisionError:
            assert is_killed
        assert len(set(seen)) == 1  # validation logs to the training's run
        return str(seen[0])

    theirs = client.create_run(client.create_experiment("some"), run_name="a", tags={"crossval_settings": "x"})
    client.log_param(theirs.info.run_id, "learning_rate", "0.7")
    first = train(0.1, is_killed=True)
    assert train(0.1, is_killed=True) == first
    second = train(0.2, is_killed=True)
    assert second != first
    old = client.get_run(first)
    assert old.info.status == "KILLED" and old.data.tags["superseded"] == "true"
    assert client.get_run(second).data.params["learning_rate"] == "0.2"
    third = train(0.2, epochs=2)
    assert third not in (first, second)
    assert client.get_run(third).data.params.items() >= {"epochs": "2", "max_epochs": "2"}.items()
    assert client.get_run(theirs.info.run_id).info.status == "RUNNING"
    assert train(0.1, is_killed=True) not in (first, second, third)


def test_runs_that_begin_together_share_an_experiment(tmp_path: Path) -> None:
    """MONAI's handler does not know what SQLite says to the second of two that make one."""
    uri, barrier = f"sqlite:///{tmp_path}/mlruns.db", threading.Barrier(6)
    prepare_store(uri)

    def begin(number: int) -> str:
        engine = Engine(lambda e, b: None)
        handler = MLFlowHandler(uri, experiment_name="some", run_name=f"volta_fold{number}")
        handler.attach(engine)
        barrier.wait()
        prepare_handlers(engine)
        handler.start(engine)
        return str(handler.cur_run.info.experiment_id)

    with ThreadPoolExecutor(6) as threads:
        assert len(set(threads.map(begin, range(6)))) == 1


def test_names_of_metrics_are_grouped() -> None:
    metrics = dict.fromkeys(("train_loss", "val_auroc", "validation_mean_view", "optimistic_epoch", "auroc_low"), 1.0)
    grouped = {"train/loss", "val/auroc", "val/mean_view", "optimistic/epoch", "score/auroc_low"}
    assert set(group_metrics(metrics, "score/")) == grouped


def test_means_over_processes_are_taken_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL, unlike gloo, reduces nothing that lies on the CPU."""
    seen: list[str] = []
    monkeypatch.setattr(tracking, "mean_over_processes", lambda x: seen.append(x.device.type) or torch.zeros(x.shape))
    engine: Any = Engine(lambda e, b: [{"loss": 1.0}])
    engine.state.device = torch.device("meta")
    TrainingRecord({}, interval=1).attach(engine)
    engine.run([0])
    assert seen == ["meta", "meta"]  # the mini-batch's, and the epoch's


def test_hardware_is_what_the_run_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert "cores" in hardware(CPU)
    engine: Any = Engine(lambda e, b: None)
    engine.state.device = "cuda:1"
    assert hardware(device_of(engine)) == "GPU cuda:1"


def test_the_mlflow_handler_is_found_once_it_has_a_run() -> None:
    engine = Engine(lambda e, b: None)
    assert find_mlflow_handler(engine) is None
    tracker = MLFlowHandler.__new__(MLFlowHandler)
    tracker.cur_run = None
    engine.add_event_handler(Events.ITERATION_COMPLETED, tracker.iteration_completed)
    assert find_mlflow_handler(engine) is None
    tracker.cur_run = object()
    assert find_mlflow_handler(engine) is tracker


def test_folders_of_people_are_hidden_in_what_is_passed_on() -> None:
    config = {
        "dataset_dir": "/home/anna/study/data/harp",
        "tracking_uri": "sqlite:////home/anna/runs/mlruns.db",
        "output_dir": "$'/scratch/anna/runs/volta_fold0'",
        "encoder_path": "$@bundle_root + '/../pretrain/models'",
        "ckpt_dir": "$@output_dir + '/models'",
        "relative": "data/harp/datalist.json",
        "store": "http://mlflow.lab:5000/a/b",
        "half": "$@num_layers // 2",
    }
    assert hide_folders("python -m x --a /home/anna/a/b --c=/home/d/e f/g/h") == "python -m x --a a/b --c=d/e f/g/h"
    hidden = json.loads(hide_folders(json.dumps(config)))
    assert hidden == {
        **config,
        "dataset_dir": "data/harp",
        "tracking_uri": "runs/mlruns.db",
        "output_dir": "$'runs/volta_fold0'",
    }


def test_a_store_that_fails_while_training_is_named(tmp_path: Path) -> None:
    """Put aside between two epochs, as by a drive that goes away."""
    store = tmp_path / "runs" / "mlruns.db"
    prepare_store(f"sqlite:///{store}")
    engine = Engine(lambda *_: [{"loss": 1.0}])
    engine.state.device = torch.device("cpu")  # type: ignore[attr-defined]
    TrainingRecord({}, interval=1).attach(engine)
    handler = MLFlowHandler(f"sqlite:///{store}", experiment_name="some", run_name="a", iteration_log=False)
    handler.attach(engine)
    away = Events.EPOCH_COMPLETED(once=1)
    engine.add_event_handler(away, lambda: store.parent.rename(tmp_path / "away"))
    with pytest.raises(InputError, match=r"runs/mlruns\.db: MLflow's store failed .*start the same command again"):
        engine.run([0, 1], max_epochs=3)


def test_other_errors_stay_what_they_are() -> None:
    engine = Engine(lambda *_: 1 / 0)
    TrainingRecord({}).attach(engine)
    with pytest.raises(ZeroDivisionError):
        engine.run([0])


def test_runs_that_begin_together_share_their_data_sets(tmp_path: Path) -> None:
    """MLflow looks whether a data set is known and then adds it: meanwhile another run may have done so."""
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("some")
    processes = 4
    for number in range(4):
        runs = [client.create_run(experiment) for _ in range(processes)]
        together = threading.Barrier(processes)

        def describe(run: Any, number: int = number, together: threading.Barrier = together) -> None:
            own = MlflowClient(uri)
            handler = SimpleNamespace(client=own, cur_run=run, artifacts=(), _log_params=lambda params: None)
            together.wait()
            tags = {"bundle": f"bundle{number}"}
            describe_run(handler, {}, tags, {"training": [{"subject_id": "a", "patient_id": "a"}]}, CPU)

        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(describe, runs))
        for run in runs:
            [given] = client.get_run(run.info.run_id).inputs.dataset_inputs
            assert given.dataset.name == f"bundle{number} (training)"
