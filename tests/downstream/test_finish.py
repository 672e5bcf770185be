# SPDX-License-Identifier: Apache-2.0
"""A finished run is scored once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from mlflow import MlflowClient
from monai.handlers import MLFlowHandler

from volta_components.downstream.finish import FinishRun
from volta_components.downstream.results import FoldResults, Results
from volta_components.downstream.splits import Parts
from volta_components.downstream.start import load_model
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.method.weights import keep_other_weights
from volta_components.training.stores import prepare_store


def test_a_finished_run_is_scored_once_and_not_trained_again(tmp_path):
    calls: list[int] = []

    class OneNumber(FoldResults):
        def __call__(self, engine: Engine) -> Results:
            calls.append(engine.state.epoch)
            (self.folder / "table.csv").write_text("x")
            return Results({"auroc": 0.5}, [("table.csv", "predictions")], {"more": 1})

    results = OneNumber(parts=Parts([], [], []), scoring=None, output_dir=tmp_path)

    def run(settings: dict[str, Any]) -> int:
        steps: list[float] = []

        def step(engine: Engine, batch: float) -> dict[str, torch.Tensor]:
            steps.append(batch)
            return {"loss": torch.tensor(batch)}

        engine: Any = Engine(step)
        engine.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        FinishRun(settings, {"fold": "0"}, results=results).attach(engine)
        engine.run([0.0, 0.0], max_epochs=3)
        return len(steps)

    (tmp_path / "checkpoint.pt").write_text("x")
    assert run({"size": (1, 2)}) == 6
    assert not (tmp_path / "checkpoint.pt").exists()
    content = read_json(tmp_path / "result.json")
    assert content["metrics"] == {"auroc": 0.5} and content["more"] == 1 and content["tags"] == {"fold": "0"}
    assert [row["epoch"] for row in content["history"]] == [1, 2, 3]
    assert run({"size": (1, 2)}) == 0
    assert calls == [3]
    with pytest.raises(
        InputError, match=r"other settings(?s:.)*size  \[1, 2\]  \[1, 3\](?s:.)*--run_name NAME; --suffix"
    ):
        run({"size": (1, 3)})


def test_models_of_two_runs_are_both_kept_and_a_finished_run_knows_its_own(tmp_path, caplog):
    model = tmp_path / "models" / "model.pt"

    class OneModel(FoldResults):
        def __call__(self, engine: Engine) -> Results:
            self.keep({})
            return Results({}, [])

    def run(fold: int) -> None:
        engine: Any = Engine(lambda engine, batch: {"loss": torch.tensor(batch)})
        engine.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scoring: Any = SimpleNamespace(network=torch.nn.Linear(1, 1))
        results = OneModel(
            parts=Parts([], [], []),
            scoring=scoring,
            output_dir=tmp_path / str(fold),
            model_path=model,
            record={"provenance": {"settings": {"fold": fold}}},
        )
        caplog.clear()
        FinishRun({"fold": fold}, {}, results=results).attach(engine)
        engine.run([0.0], max_epochs=1)

    run(0)
    run(0)
    assert "another run" not in caplog.text and len(list(model.parent.iterdir())) == 2
    first = model.read_bytes()
    run(1)
    (kept,) = model.parent.glob("model_*.pt")
    assert kept.read_bytes() == first and f"kept as {kept}" in caplog.text
    assert load_model(torch.nn.Linear(1, 1), kept)["provenance"]["settings"] == {"fold": 0}
    run(0)
    assert f"{model} has the model of another run; this run's is {kept}" in caplog.text
    kept.unlink()
    run(0)
    assert "to have this run's again, remove the folder and start again, or train it under another name" in caplog.text
    model.unlink()
    run(1)
    assert f"{model} is missing; to have this run's again" in caplog.text


def test_a_run_that_was_finished_without_tracking_is_logged_once(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which MONAI's handler prefers

    class OneNumber(FoldResults):
        def __call__(self, engine: Engine) -> Results:
            return Results({"auroc": 0.5}, [])

    uri = f"sqlite:///{tmp_path}/mlruns.db"
    prepare_store(uri)
    client = MlflowClient(uri)

    def run(is_tracked: bool) -> list[Any]:
        engine: Any = Engine(lambda engine, batch: {"loss": torch.tensor(batch)})
        engine.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        results = OneNumber(parts=Parts([], [], []), scoring=None, output_dir=tmp_path / "run")
        FinishRun({"seed": 0}, {"fold": "0"}, results=results).attach(engine)
        if is_tracked:
            handler = MLFlowHandler(uri, experiment_name="some", run_name="a", close_on_complete=True)
            handler.iteration_log = False
            handler.attach(engine)
        engine.run([0.0], max_epochs=1)
        experiment = client.get_experiment_by_name("some")
        return client.search_runs([experiment.experiment_id], "tags.finished = 'true'") if experiment else []

    assert run(is_tracked=False) == []
    [first] = run(is_tracked=True)
    assert first.data.metrics["score/auroc"] == 0.5
    [again] = run(is_tracked=True)
    assert read_json(tmp_path / "run" / "result.json")["mlflow_run_id"] == again.info.run_id == first.info.run_id


def test_a_kept_record_is_never_written_over(tmp_path):
    """Two runs whose weights are the same, such as of a learning rate that changes nothing."""
    path = tmp_path / "model.pt"
    for fold in (0, 1, 2, 0):
        record = {"provenance": {"settings": {"fold": fold}}}
        keep_other_weights(path, record)
        path.write_bytes(b"weights")
        write_json(path.with_suffix(".json"), record)
    kept = [read_json(place)["provenance"]["settings"]["fold"] for place in tmp_path.glob("model_*.json")]
    assert sorted(kept) == [0, 1, 2]
    assert len(list(tmp_path.glob("model_*.pt"))) == 3
