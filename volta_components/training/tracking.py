# SPDX-License-Identifier: Apache-2.0
"""The numbers of a training for MLflow and the console."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler

from volta_components.distributed import mean_over_processes, process_rank
from volta_components.errors import AGAIN, InputError
from volta_components.training.record import code_version, shown_settings

logger = logging.getLogger(__name__)

MLFLOW_BATCH = 100  # parameters that a store takes at a time
# Of an epoch's means, what is printed; MONAI's ``StatsHandler`` would print all of them.
SHOWN = (
    *("loss", "loss_global", "loss_patch", "loss_reconstruction", "volumes_per_second"),
    *("global_teacher_entropy", "global_predicted", "patch_teacher_entropy", "patch_predicted"),
)


def find_mlflow_handler(engine: Engine) -> Any:
    """The MLflow handler that ``--tracking`` has attached to an engine and that has begun; ``None`` without one.

    ``monai.bundle`` appends it to the list of handlers after the config was read, so no config can refer to it.
    """
    return next((handler for handler in _mlflow_handlers(engine) if handler.cur_run is not None), None)


def name_runs(*engines: Engine | None) -> None:
    """Make the names of MLflow's runs text, before it looks for them.

    ``--run_name 7`` arrives as a number, and MLflow finds no run of that name: training and validation would be
    recorded as two runs, and a resumed training as two more.
    """
    for engine in filter(None, engines):
        for handler in _mlflow_handlers(engine):
            if handler.run_name is not None:
                handler.run_name = str(handler.run_name)


def _mlflow_handlers(engine: Engine) -> Iterator[Any]:
    for handlers in engine._event_handlers.values():
        for handler, *_ in handlers:
            owner = getattr(handler, "__self__", None)
            if owner is None:
                owner = getattr(getattr(handler, "__wrapped__", None), "__self__", None)
            if isinstance(owner, MLFlowHandler):
                yield owner


def describe_run(handler: Any, settings: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
    """Give MLflow a run's settings, as parameters that it does not have yet, and its tags."""
    run_id = handler.cur_run.info.run_id
    known = handler.client.get_run(run_id).data.params
    params = [(name, value) for name, value in shown_settings(settings).items() if name not in known]
    for start in range(0, len(params), MLFLOW_BATCH):
        handler._log_params(dict(params[start : start + MLFLOW_BATCH]))
    for name, value in tags.items():
        handler.client.set_tag(run_id, name, str(value))


class TrainingRecord:
    """Means of a mini-batch's numbers, for the log, MLflow and the end of an epoch.

    MONAI's MLflow handler records one loss and the learning rate; this one gives it every number that the trainer
    returns, averaged over ``interval`` mini-batches and all processes, and puts the epoch's means into
    ``engine.state.metrics``, where MONAI's handlers look for them. After a resume in the middle of an epoch, its means
    cover only the remaining mini-batches.

    Args:
        settings: recorded as parameters; the bundle, the seed and the datalist's hash as tags as well.
        interval: mini-batches over which to average.
    """

    def __init__(self, settings: Mapping[str, Any], interval: int = 8) -> None:
        self.settings = dict(settings)
        tags = {name: settings[name] for name in ("bundle", "seed", "datalist_hash") if name in settings}
        self.tags = {"code_version": code_version(), **tags}
        self.interval = interval
        self._described = False
        self._recent: dict[str, list[float]] = defaultdict(list)
        self._epoch: dict[str, list[float]] = defaultdict(list)

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch and epoch."""
        # Before StatsHandler's, which prints a traceback that Python prints once more.
        engine.add_event_handler(Events.EXCEPTION_RAISED, raise_error)
        engine.add_event_handler(Events.STARTED, name_runs)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _iteration_completed(self, engine: Any) -> None:
        for name, value in engine.state.output[0].items():
            self._recent[name].append(value)
            self._epoch[name].append(value)
        mlflow_handler = find_mlflow_handler(engine)
        if mlflow_handler is not None and not self._described:
            describe_run(mlflow_handler, self.settings, self.tags)
        self._described = True
        if engine.state.iteration % self.interval == 0:
            means = _means(self._recent, engine.state.device)
            if mlflow_handler is not None:
                mlflow_handler._log_metrics(means, step=engine.state.iteration)

    def _completed(self, engine: Engine) -> None:
        mlflow_handler = None if self._described else find_mlflow_handler(engine)
        if mlflow_handler is None:
            return
        run_id = mlflow_handler.cur_run.info.run_id
        if not mlflow_handler.client.get_run(run_id).data.metrics:
            # Nothing was left to train, and MONAI's handler has opened a new run beside the finished one.
            mlflow_handler.client.set_tag(run_id, "superseded", "true")

    def _epoch_completed(self, engine: Any) -> None:
        means = _means(self._epoch, engine.state.device)
        engine.state.metrics |= means
        if process_rank() == 0:
            numbers = ", ".join(f"{name} {means[name]:.4g}" for name in SHOWN if name in means)
            logger.info("epoch %d of %s: %s", engine.state.epoch, engine.state.max_epochs, numbers)


def raise_error(engine: Engine, error: BaseException) -> None:
    """Raise an engine's error before MONAI's ``StatsHandler`` prints its traceback; one of MLflow with its store.

    Raises:
        InputError: if MLflow's store failed, which its own error does not name.
    """
    handler = next(_mlflow_handlers(engine), None)
    cause: BaseException | None = error
    while handler is not None and cause is not None:
        if type(cause).__module__.split(".")[0] in ("mlflow", "sqlalchemy", "sqlite3"):
            raise InputError(
                f"{handler.client.tracking_uri}: MLflow's store failed ({str(cause).splitlines()[0]}); see that it is "
                f"there, not locked, and on a disk with space, {AGAIN}"
            ) from error
        cause = cause.__cause__ or cause.__context__
    raise error


def _means(numbers: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """Means over all processes, on the device (NCCL cannot reduce tensors on the CPU); the lists are emptied."""
    names = sorted(numbers)
    means = torch.tensor([float(np.mean(numbers[name])) for name in names], dtype=torch.float64, device=device)
    numbers.clear()
    return dict(zip(names, mean_over_processes(means).tolist(), strict=True))
