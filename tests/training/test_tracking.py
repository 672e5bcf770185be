# SPDX-License-Identifier: Apache-2.0
"""Means for MLflow and the console."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_mlflow import FakeMLFlow
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler

from volta_components.training import tracking
from volta_components.training.record import code_version
from volta_components.training.tracking import TrainingRecord, find_mlflow_handler


def test_the_record_averages_over_mini_batches_and_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLFlow({"seed": "3"})
    monkeypatch.setattr(tracking, "find_mlflow_handler", lambda engine: fake)
    engine = Engine(lambda e, b: [{"loss": float(b**2), **({"learning_rate": float(b)} if b % 2 == 0 else {})}])
    engine.state.device = torch.device("cpu")
    settings = {"seed": 3, "size": (8, 12), "views": {"flip": 0.5}, "datalist_hash": "abc", "config": {"a": "@b"}}
    TrainingRecord(settings, interval=3).attach(engine)
    engine.run(range(1, 6), max_epochs=2)
    assert engine.state.metrics == {"loss": 55 / 5, "learning_rate": 3.0}
    # Mini-batches 1..5 and 1..5 again, three by three; a number that some lack is averaged over those that have it.
    assert fake.metrics[3] == pytest.approx({"loss": (1 + 4 + 9) / 3, "learning_rate": 2.0})
    assert fake.metrics[6] == pytest.approx({"loss": (16 + 25 + 1) / 3, "learning_rate": 4.0})
    assert fake.metrics[9] == pytest.approx({"loss": (4 + 9 + 16) / 3, "learning_rate": 3.0})
    # Once; not what a resumed run has already; of the config's text, only a hash.
    (params,) = fake.params
    assert len(params.pop("config")) == 12
    assert params == {"size": [8, 12], "views.flip": 0.5, "datalist_hash": "abc"}
    assert fake.client.tags == {"code_version": code_version(), "datalist_hash": "abc", "seed": "3"}


def test_means_over_processes_are_taken_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL, unlike gloo, reduces nothing that lies on the CPU."""
    seen: list[str] = []
    monkeypatch.setattr(tracking, "mean_over_processes", lambda x: seen.append(x.device.type) or torch.zeros(x.shape))
    engine: Any = Engine(lambda e, b: [{"loss": 1.0}])
    engine.state.device = torch.device("meta")
    TrainingRecord({}, interval=1).attach(engine)
    engine.run([0])
    assert seen == ["meta", "meta"]  # the mini-batch's, and the epoch's


def test_the_mlflow_handler_is_found_once_it_has_a_run() -> None:
    engine = Engine(lambda e, b: None)
    assert find_mlflow_handler(engine) is None
    tracker = MLFlowHandler.__new__(MLFlowHandler)
    tracker.cur_run = None
    engine.add_event_handler(Events.ITERATION_COMPLETED, tracker.iteration_completed)
    assert find_mlflow_handler(engine) is None
    tracker.cur_run = object()
    assert find_mlflow_handler(engine) is tracker
