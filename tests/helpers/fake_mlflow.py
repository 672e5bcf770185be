# SPDX-License-Identifier: Apache-2.0
"""What the handlers use of MONAI's MLflow handler, without a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any


class FakeClient:
    def __init__(self, params: dict[str, str]) -> None:
        self.params, self.tags = params, {}
        self.artifacts: list[tuple[str, str]] = []
        self.experiment_tags: dict[str, str] = {}
        self.inputs: list[Any] = []

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=self.params))

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        self.tags[name] = value

    def set_experiment_tag(self, experiment_id: str, name: str, value: str) -> None:
        self.experiment_tags[name] = value

    def log_inputs(self, run_id: str, datasets: list[Any]) -> None:
        self.inputs += datasets

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        self.artifacts.append((Path(path).name, folder))


class FakeMLFlow:
    """What the handlers use of MONAI's handler."""

    artifacts = ()

    def __init__(self, params: dict[str, str]) -> None:
        self.cur_run = SimpleNamespace(info=SimpleNamespace(run_id="7", experiment_id="1"))
        self.client = FakeClient(params)
        self.params: list[dict[str, Any]] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def _log_params(self, params: dict[str, Any]) -> None:
        self.params.append(params)

    def _log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.metrics[step] = numbers
