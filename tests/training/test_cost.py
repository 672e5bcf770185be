# SPDX-License-Identifier: Apache-2.0
"""What a training took, over all parts of a run that was broken off."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from volta_components.training import cost as module
from volta_components.training.checkpoint import ResumableCheckpoint
from volta_components.training.cost import cost_metrics, start_clock, time_and_memory, training_cost


def test_without_a_clock_nothing_is_said() -> None:
    engine = Engine(lambda engine, batch: None)
    assert training_cost(engine) == {}
    assert cost_metrics({}) == {}


def test_hours_add_up_over_a_resume_without_the_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each epoch takes half an hour, the pause between the parts a day; memory is the larger of both parts.

    Each part is trained by another version of the code, which the second part says.
    """
    clock, memory = [1000.0], [3 * 2**20]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Usage:
        @property
        def ru_maxrss(self) -> int:
            return memory[0]

    monkeypatch.setattr(resource, "getrusage", lambda who: Usage())

    def part(stop_after: int, version: str) -> dict[str, Any]:
        def step(engine: Engine, batch: object) -> None:
            clock[0] += 1800

        monkeypatch.setattr(module, "code_version", lambda: version)
        engine = Engine(step)
        found: dict[str, Any] = {}
        ResumableCheckpoint(tmp_path / "checkpoint.pt", {}, {}).attach(engine)
        engine.add_event_handler(Events.COMPLETED, lambda: found.update(time_and_memory(engine)))

        @engine.on(Events.EPOCH_COMPLETED(once=stop_after))
        def _break_off() -> None:
            if stop_after < 4:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            engine.run([0], max_epochs=4)
        return found

    assert part(stop_after=3, version="1+aaa") == {}
    assert "trained by code" not in caplog.text
    clock[0] += 24 * 3600
    memory[0] = 2**20
    assert part(stop_after=4, version="1+bbb") == {
        "hours": pytest.approx(2.0),
        "peak_memory_gib": 3.0,
        "code_versions": ["1+aaa", "1+bbb"],
    }
    assert "was trained with code 1+aaa and resumes with 1+bbb" in caplog.text


def test_memory_is_that_of_the_run_s_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device=None: 2**30 * (1 + torch.device(device).index)
    )
    engine: Any = Engine(lambda engine, batch: None)
    start_clock(engine, {})
    engine.state.device = "cuda:1"
    assert time_and_memory(engine)["peak_memory_gib"] == 2.0


def test_mlflow_gets_the_numbers(tmp_path: Path) -> None:
    cost = {"hours": 0.5, "peak_memory_gib": float(np.float64(2.0)), "hardware": "NVIDIA H100"}
    assert cost_metrics(cost) == {"cost/hours": 0.5, "cost/peak_memory_gib": 2.0}
