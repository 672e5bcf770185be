# SPDX-License-Identifier: Apache-2.0
"""A finished run is scored once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine

from volta_components.downstream.finish import FinishRun
from volta_components.downstream.results import FoldResults, Results
from volta_components.downstream.splits import Parts
from volta_components.errors import InputError
from volta_components.files import read_json


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
    with pytest.raises(InputError, match=r"other settings(?s:.)*size  \[1, 2\]  \[1, 3\]"):
        run({"size": (1, 3)})
