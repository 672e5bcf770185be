# SPDX-License-Identifier: Apache-2.0
"""What MLflow and the log get of a fine-tuning, and how it ends: scores, tables, finished run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from volta_components.distributed import mean_over_processes, process_rank
from volta_components.downstream.results import FoldResults
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.method.weights import is_of_run, read_record
from volta_components.training.checkpoint import remove_checkpoints
from volta_components.training.cost import cost_metrics
from volta_components.training.record import check_settings, plain_settings, shown_settings
from volta_components.training.tracking import (
    describe_run,
    device_of,
    find_mlflow_handler,
    group_metrics,
    prepare_handlers,
    raise_error,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class FinishRun:
    """Records a run, scores it once when it is complete, and keeps a complete run from being done again.

    At the end: ``results`` writes its files; ``result.json`` with settings, tags, numbers and history is written; the
    checkpoint is removed, as it is no longer needed; MLflow gets everything, ``finished`` last. A run that was killed
    in between resumes with the steps that are left. If ``result.json`` exists, no epoch is trained.

    ``train_loss`` is the epoch's mean over all processes, at the epoch, as the validation's numbers are; MLflow has it
    as ``train/loss``. A fine-tuning run has checkpoints at ends of epochs only, so that no epoch's mean misses its
    beginning.

    Put it after ``ValidationHandler``. Its state is the history: the numbers of past epochs.

    Attributes:
        settings: must be the same when the run is started again; MLflow has them as parameters.
        tags: see ``run_tags``.
        evaluator: the validation engine, whose metrics the history holds too.
        results: called in every process with the trainer; writes files in the first one only. Without it the run is
            recorded, and nobody is scored.

    Raises:
        InputError: at the start, if the results' folder holds a finished run of other settings; at the first mini-batch
            whose loss is not finite.
    """

    settings: Mapping[str, Any]
    tags: Mapping[str, Any]
    evaluator: Engine | None = None
    results: FoldResults | None = None

    def __post_init__(self) -> None:
        self.settings = plain_settings(self.settings)
        self.history: list[dict[str, float]] = []
        self._losses: list[Tensor] = []
        self._is_described = False
        self._before: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The numbers of past epochs."""
        return {"history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.history = [dict(row) for row in state["history"]]

    @property
    def path(self) -> Path:
        """The record of a finished run."""
        assert self.results is not None
        return self.results.folder / "result.json"

    def attach(self, engine: Engine) -> None:
        """Follow every mini-batch and epoch; look for a finished run at the start; finish at the end."""
        engine.add_event_handler(Events.EXCEPTION_RAISED, raise_error)
        engine.add_event_handler(Events.STARTED, prepare_handlers, self.evaluator, settings=self.settings)
        engine.add_event_handler(Events.EPOCH_STARTED, self._describe)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._describe)
        if self.results is not None:
            engine.add_event_handler(Events.STARTED, self._started)
            engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Engine) -> None:
        if not self.path.is_file():
            return
        before = read_json(self.path)
        reason = f"{self.path} is of a finished run with other settings (name, there, here)"
        check_settings(before.get("settings", {}), self.settings, reason, "the folder")
        self._before = before
        if process_rank() == 0:
            self._look_for_model()
        logger.info("%s is of the same run, which is finished: nothing is trained", self.path)
        length, epochs = engine.state.epoch_length, engine.state.max_epochs
        assert length is not None and epochs is not None
        engine.load_state_dict({"iteration": epochs * length, "epoch_length": length, "max_epochs": epochs})

    def _look_for_model(self) -> None:
        """Say where a finished run's model is, if another's has taken its place, or how to have it again."""
        assert self.results is not None
        if self.results.model_path is None:
            return
        path, settings = Path(self.results.model_path), shown_settings(self.settings)
        places = [path, *sorted(path.parent.glob(f"{path.stem}_*{path.suffix}"))]
        own = [place for place in places if place.is_file() and is_of_run(read_record(place), settings)]
        if path not in own:
            again = "remove the folder and start again, or train it under another name (--run_name NAME --suffix _NAME)"
            what = "has the model of another run" if path.is_file() else "is missing"
            hint = f"this run's is {own[0]} (--model_path takes it)" if own else f"to have this run's again, {again}"
            logger.warning("%s %s; %s", path, what, hint)

    def _describe(self, engine: Engine) -> None:
        """Parameters, tags and scans of each part to MLflow, once."""
        handler = find_mlflow_handler(engine)
        if handler is None or self._is_described:
            return
        self._is_described = True
        parts = {} if self.results is None else vars(self.results.parts)
        data = {name: items for name, items in parts.items() if name != "unused"}
        describe_run(handler, self.settings, self.tags, data, device_of(engine))

    def _iteration_completed(self, engine: Engine) -> None:
        output: Any = engine.state.output
        loss = (output[0] if isinstance(output, list) else output)["loss"].detach()
        if not torch.isfinite(loss).all():
            raise InputError(
                f"the training has diverged: the loss is {loss.mean().item()} at mini-batch {engine.state.iteration} "
                f"(epoch {engine.state.epoch}). The checkpoint of the epochs before is kept; train with a lower "
                "--learning_rate and another --run_name, and see that no volume holds NaN (volta3d check)"
            )
        self._losses.append(loss)

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

    def _completed(self, engine: Engine) -> None:
        handler = find_mlflow_handler(engine)
        run_id = None if handler is None else str(handler.cur_run.info.run_id)
        content = self._before
        if content is None:
            assert self.results is not None
            results = self.results(engine)
            content = {
                "settings": self.settings,
                "tags": dict(self.tags),
                "metrics": dict(results.metrics),
                "artifacts": [list(artifact) for artifact in results.artifacts],
                "history": self.history,
                "mlflow_run_id": run_id,
                **results.record,
            }
            if process_rank() == 0:
                write_json(self.path, content)
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in content["metrics"].items())
                logger.info("finished: %s; all of it is in %s", numbers, self.path)
        elif handler is not None and content["mlflow_run_id"] not in (None, run_id):
            known = handler.client.search_runs(
                [handler.cur_run.info.experiment_id], f"attributes.run_id = '{content['mlflow_run_id']}'"
            )
            if known and known[0].data.tags.get("finished") == "true":
                # MONAI's handler opens a new run beside a finished one of the same name.
                handler.client.set_tag(run_id, "superseded", "true")
                return
        if process_rank() == 0:
            remove_checkpoints(self.path.parent)
            if handler is not None:
                if content["mlflow_run_id"] != run_id:  # so that the next start finds it logged
                    content = {**content, "mlflow_run_id": run_id}
                    write_json(self.path, content)
                self._log(handler, engine.state.epoch, content)

    def _log(self, handler: Any, epoch: int, content: Mapping[str, Any]) -> None:
        """Give MLflow numbers and files, and mark the run as finished when all of it is there."""
        client, run_id = handler.client, str(handler.cur_run.info.run_id)
        numbers = {name: float(value) for name, value in content["metrics"].items()}
        handler._log_metrics({**group_metrics(numbers, "score/"), **cost_metrics(content.get("cost", {}))}, step=epoch)
        for name, folder in [*content["artifacts"], (self.path.name, "")]:
            path = self.path.parent / name
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            log(run_id, str(path), folder or None)
        client.set_tag(run_id, "finished", "true")
