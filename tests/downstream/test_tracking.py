# SPDX-License-Identifier: Apache-2.0
"""What MLflow and the log get of a fine-tuning."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from mlflow import MlflowClient
from monai.engines import IterationEvents, SupervisedTrainer
from monai.handlers import MLFlowHandler
from torch import nn

from volta_components.downstream.finish import FinishRun
from volta_components.downstream.leaks import Origin
from volta_components.downstream.tracking import TrainingPlan, run_name, run_tags, share_text
from volta_components.errors import InputError
from volta_components.files import write_json
from volta_components.training.sampling import ResumableSampler


def engine_of(values: list[float], epochs: int) -> Any:
    """An engine whose mini-batches have the given losses."""
    engine: Any = Engine(lambda e, batch: {"loss": torch.tensor(batch)})
    engine.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    return engine


def test_plan_sets_the_rate_of_every_step_and_the_order_of_every_epoch():
    sampler = ResumableSampler(3, seed=1)
    engine = engine_of([], 2)
    engine.data_loader = SimpleNamespace(sampler=sampler)
    TrainingPlan(1.0, 0.0, warmup_epochs=2 / 3).attach(engine)
    rates: list[float] = []
    epochs: list[int] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rates.append(e.optimizer.param_groups[0]["lr"]))
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: epochs.append(sampler.epoch))
    engine.run([0.0, 0.0, 0.0], max_epochs=2)
    assert epochs == [1, 2]
    cosine = [(1 + np.cos(np.pi * step / 3)) / 2 for step in range(4)]
    np.testing.assert_allclose(rates, [0.0, 0.5, *cosine], atol=1e-12)
    engine = engine_of([], 2)
    TrainingPlan(1.0, 0.0, warmup_epochs=3).attach(engine)
    with pytest.raises(InputError, match="fewer warmup_epochs or more epochs"):
        engine.run([0.0, 0.0, 0.0], max_epochs=2)


def test_what_is_pretrained_moves_at_its_own_rate_and_only_after_the_frozen_epochs():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    groups: Any = [
        {"params": list(network[1].parameters()), "rate": 1.0, "pretrained": False},
        {"params": list(network[0].parameters()), "rate": 0.25, "pretrained": True},
    ]
    batches = [{"image": torch.rand(3, 2), "label": torch.rand(3, 1)} for _ in range(2)]
    trainer: Any = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        train_data_loader=batches,
        epoch_length=2,
        network=network,
        optimizer=torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1),
        loss_function=nn.MSELoss(),
        decollate=False,
    )
    plan = TrainingPlan(0.1, 0.1, frozen_epochs=1)
    trainer.data_loader = type("Loader", (list,), {"sampler": ResumableSampler(2, seed=0)})(batches)
    plan.attach(trainer)
    start = network[0].weight.detach().clone()
    seen: list[tuple[float, float, bool, bool]] = []

    def look(engine: Any) -> None:
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        has_state = network[0].weight in engine.optimizer.state
        seen.append((*rates, torch.equal(network[0].weight, start), has_state))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
    head = network[1].weight.detach().clone()
    trainer.run()
    assert seen[:2] == [(0.1, 0.025, True, False)] * 2  # not even decayed
    assert seen[2:] == [(0.1, 0.025, False, True)] * 4
    assert not torch.equal(network[1].weight, head)
    # Adam's first step is of the rate's size, whatever the gradient: the running means begin when the encoder does.
    assert trainer.optimizer.state[network[0].weight]["step"] == 4


@pytest.mark.parametrize("frozen", [2, -1])
def test_frozen_epochs_must_leave_some_to_train_in(frozen):
    engine = engine_of([], 2)
    engine.register_events(*IterationEvents)
    TrainingPlan(1.0, frozen_epochs=frozen).attach(engine)
    with pytest.raises(InputError, match=f"frozen_epochs {frozen} in a run of 2 epochs.*unfrozen_blocks 0"):
        engine.run([0.0], max_epochs=2)


def test_record_keeps_epoch_means_and_resumes_with_them():
    engine = engine_of([], 2)
    record = FinishRun({"seed": 0}, {"fold": 1})
    record.attach(engine)
    engine.run([1.0, 2.0, 6.0], max_epochs=2)
    assert [row["train_loss"] for row in record.history] == [3.0, 3.0]
    assert engine.state.metrics["train_loss"] == 3.0
    again = FinishRun({}, {})
    again.load_state_dict(record.state_dict())
    assert again.history == record.history


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_training_that_diverges_stops_at_that_mini_batch(loss):
    engine = engine_of([], 2)
    FinishRun({}, {}).attach(engine)
    with pytest.raises(InputError, match=rf"diverged: the loss is {loss} at mini-batch 2 .*--learning_rate"):
        engine.run([1.0, loss, 6.0], max_epochs=2)
    assert engine.state.iteration == 2


def test_tags_tell_everything_that_runs_are_compared_by(tmp_path):
    datalist: Any = SimpleNamespace(
        name="demo", hash="h", content={"training": [{"cohort": "phantom"}, {"cohort": "x"}]}
    )
    settings = {"bundle": "ixi_sex", "init": "volta", "fold": 2, "fraction": 0.2, "seed": 7, "epochs": 3}
    tags = run_tags(settings, datalist, Origin("e", "p", "allowed"))
    expected = {
        "bundle": "ixi_sex",
        "init": "volta",
        "fold": "2",
        "fraction": "0.2",
        "seed": "7",
        "datalist_hash": "h",
        "datalist_name": "demo",
        "encoder_sha256": "e",
        "pretrain_datalist_hash": "p",
        "leak": "allowed",
        "phantom": "true",
    }
    assert {name: tags[name] for name in expected} == expected
    assert set(tags) - set(expected) == {"code_version"}
    write_json(tmp_path / "x.json", tags)
    assert json.loads((tmp_path / "x.json").read_text()) == tags


def test_a_run_named_by_a_number_is_one_run_also_when_resumed(tmp_path):
    """As ``--run_name 7 --tracking mlflow`` gives it."""

    def train():
        trainer, evaluator = engine_of([], 1), Engine(lambda e, b: None)
        FinishRun({}, {}, evaluator).attach(trainer)
        for engine in (evaluator, trainer):  # as monai.bundle does, after the config's own handlers
            engine.state.metrics = {}
            handler = MLFlowHandler(f"sqlite:///{tmp_path}/mlruns.db", experiment_name="some", run_name=7)
            handler.iteration_log = False
            handler.attach(engine)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
        trainer.run([1.0])

    train()
    train()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    runs = client.search_runs([client.get_experiment_by_name("some").experiment_id])
    assert [run.info.run_name for run in runs] == ["7"]


def test_each_fraction_has_a_name_of_its_own():
    assert [share_text(share) for share in (1, 1.0, 0.2, 0.05)] == ["1", "1", "0.2", "0.05"]
    shares = [1 / 3, 0.3333333, 0.333333, 0.33333334, 1e-7]
    assert [float(share_text(share)) for share in shares] == shares
    assert run_name("volta", 0, 0.3333333, 7) == "volta_fold0_frac0.3333333_seed7"
    assert run_name("volta", "x", "abc", None) == "volta_foldx_fracabc_seedNone"
