# SPDX-License-Identifier: Apache-2.0
"""What MLflow gets of a fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from volta_components.data.datalist import Datalist
from volta_components.distributed import mean_over_processes
from volta_components.downstream.leaks import Origin
from volta_components.training.record import code_version
from volta_components.training.sampling import ResumableSampler
from volta_components.training.tracking import describe_run, find_mlflow_handler, name_runs

# Set by crossval: hashes of all that decides a run's result, and of what all runs of an init share.
SETTINGS_TAG = "crossval_settings"
RECIPE_TAG = "crossval_recipe"


class TrainingPlan:
    """Order and learning rate of a ``SupervisedTrainer``, as functions of epoch and mini-batch: nothing to restore.

    MONAI's ``LrScheduleHandler`` drives PyTorch's schedulers, whose counters would have to be saved with the run.

    Args:
        sampler: told where each epoch begins.
        learning_rate: of an optimiser step, counted from 0.
    """

    def __init__(self, sampler: ResumableSampler, learning_rate: Callable[[int], float]) -> None:
        self.sampler = sampler
        self.learning_rate = learning_rate

    def attach(self, engine: Engine) -> None:
        """Follow epochs and mini-batches."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_STARTED, self._iteration_started)

    def _epoch_started(self, engine: Engine) -> None:
        self.sampler.set_position(engine.state.epoch)

    def _iteration_started(self, engine: Any) -> None:
        rate = self.learning_rate(engine.state.iteration - 1)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate


class RunRecord:
    """Settings, tags and epoch means of a fine-tuning run, for MLflow, the log and ``history``.

    MONAI's MLflow handler records a loss at every mini-batch, by iteration; here ``train_loss`` is the epoch's mean
    over all processes, at the epoch, as the validation's numbers are, and tags are set. A fine-tuning run has
    checkpoints at ends of epochs only, so that no epoch's mean misses its beginning.

    Args:
        settings: recorded as parameters.
        tags: see ``run_tags``.
        evaluator: the validation engine, whose metrics ``history`` holds too; run it before this handler.
    """

    def __init__(self, settings: Mapping[str, Any], tags: Mapping[str, Any], evaluator: Engine | None = None) -> None:
        self.settings = dict(settings)
        self.tags = dict(tags)
        self.evaluator = evaluator
        self.history: list[dict[str, float]] = []
        self._losses: list[Tensor] = []
        self._recorded = False
        self._engine: Engine | None = None

    def state_dict(self) -> dict[str, Any]:
        """The numbers of past epochs."""
        return {"history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.history = [dict(row) for row in state["history"]]

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch and epoch; once, whoever attaches it."""
        if self._engine is engine:
            return
        self._engine = engine
        engine.add_event_handler(Events.STARTED, lambda: name_runs(engine, self.evaluator))
        engine.add_event_handler(Events.EPOCH_STARTED, self.record)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self.record)

    def record(self, engine: Engine) -> None:
        """Parameters and tags to MLflow, once."""
        handler = find_mlflow_handler(engine)
        if handler is None or self._recorded:
            return
        self._recorded = True
        handler.iteration_logger = lambda _: None
        describe_run(handler, self.settings, self.tags)

    def _iteration_completed(self, engine: Engine) -> None:
        output: Any = engine.state.output
        self._losses.append((output[0] if isinstance(output, list) else output)["loss"].detach())

    def _epoch_completed(self, engine: Any) -> None:
        row = {
            "epoch": engine.state.epoch,
            "train_loss": float(mean_over_processes(torch.stack(self._losses).double().mean())),
            "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
        }
        self._losses.clear()
        engine.state.metrics |= {name: value for name, value in row.items() if name != "epoch"}
        if self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch:
            row |= {name: float(value) for name, value in self.evaluator.state.metrics.items()}
        self.history.append(row)


def run_tags(
    bundle: str, init: str, fold: int, fraction: float, seed: int, datalist: Datalist, origin: Origin
) -> dict[str, str]:
    """The tags by which MLflow's runs are found and compared; ``finished`` comes last, by ``FinishRun``."""
    cohorts = {str(item.get("cohort", "")) for item in datalist.content["training"]} | {datalist.name}
    return {
        "bundle": bundle,
        "init": init,
        "fold": str(fold),
        "fraction": f"{fraction:g}",
        "seed": str(seed),
        "datalist_hash": datalist.hash,
        "datalist_name": datalist.name,
        "code_version": code_version(),
        "encoder_sha256": origin.encoder_sha256,
        "pretrain_datalist_hash": origin.pretrain_datalist_hash,
        "leak": origin.leak,
        "phantom": str(any("phantom" in cohort.lower() for cohort in cohorts)).lower(),
    }
