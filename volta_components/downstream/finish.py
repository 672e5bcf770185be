# SPDX-License-Identifier: Apache-2.0
"""How a fine-tuning ends: scores, tables, finished run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from volta_components.distributed import process_rank
from volta_components.downstream.results import FoldResults
from volta_components.downstream.tracking import RunRecord
from volta_components.files import read_json, write_json
from volta_components.training.checkpoint import remove_checkpoints
from volta_components.training.cost import cost_metrics
from volta_components.training.record import check_settings
from volta_components.training.tracking import find_mlflow_handler, group_metrics

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class FinishRun:
    """Records a run, scores it once when it is complete, and keeps a complete run from being done again.

    At the end: ``results`` writes its files; ``result.json`` with settings, tags, numbers and history is written; the
    checkpoint is removed, as it is no longer needed; MLflow gets everything, ``finished`` last. A run that was killed
    in between resumes with the steps that are left. If ``result.json`` exists, no epoch is trained.

    Put it after ``ValidationHandler``. Its state is the history, see ``RunRecord``.

    Attributes:
        settings: must be the same when the run is started again.
        tags: see ``run_tags``.
        evaluator: the validation engine.
        results: called in every process with the trainer; writes files in the first one only. Without it the run is
            recorded, and nobody is scored.

    Raises:
        InputError: at the start, if the results' folder holds a finished run of other settings.
    """

    settings: Mapping[str, Any]
    tags: Mapping[str, Any]
    evaluator: Engine | None = None
    results: FoldResults | None = None

    def __post_init__(self) -> None:
        # As JSON gives them back.
        self.settings = json.loads(json.dumps(dict(self.settings), default=str))
        self.record = RunRecord(
            self.settings, self.tags, self.evaluator, self.results.parts if self.results is not None else None
        )
        self.state_dict = self.record.state_dict
        self.load_state_dict = self.record.load_state_dict
        self._before: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        """The record of a finished run."""
        assert self.results is not None
        return self.results.folder / "result.json"

    def attach(self, engine: Engine) -> None:
        """Look for a finished run at the start; finish at the end."""
        self.record.attach(engine)
        if self.results is not None:
            engine.add_event_handler(Events.STARTED, self._started)
            engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: Engine) -> None:
        if not self.path.is_file():
            return
        before = read_json(self.path)
        check_settings(before.get("settings", {}), self.settings, f"{self.path} is of a finished run", "the folder")
        self._before = before
        logger.info("%s is of the same run, which is finished: nothing is trained", self.path)
        length, epochs = engine.state.epoch_length, engine.state.max_epochs
        assert length is not None and epochs is not None
        engine.load_state_dict({"iteration": epochs * length, "epoch_length": length, "max_epochs": epochs})

    def _completed(self, engine: Engine) -> None:
        handler = find_mlflow_handler(engine)
        run_id = None if handler is None else str(handler.cur_run.info.run_id)
        content = self._before
        if content is None:
            assert self.results is not None
            results = self.results(engine)
            content = {
                "settings": self.settings,
                "tags": self.record.tags,
                "metrics": dict(results.metrics),
                "artifacts": [list(artifact) for artifact in results.artifacts],
                "history": self.record.history,
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
