# SPDX-License-Identifier: Apache-2.0
"""The collapse monitor: what stops a run, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from volta_components.method.collapse import CollapseError, CollapseMonitor, effective_rank
from volta_components.method.trainer import ReadOut


def watched(
    monitor: CollapseMonitor,
    iterations: int,
    entropies: Callable[[int], tuple[float, float]] = lambda i: (0.6, 0.7),
    summaries: Callable[[int], torch.Tensor] = lambda i: torch.randn(2, 8),
    first: int = 0,
    predicted: Callable[[int], tuple[float, float]] = lambda i: (0.05, 0.5),
) -> dict[int, dict[str, float]]:
    """Feed a monitor as a trainer would; the outputs by mini-batch."""
    outputs: dict[int, dict[str, float]] = {}

    def step(engine: Any, batch: int) -> list[dict[str, float]]:
        engine.state.summaries = [summaries(batch)]
        values = entropies(batch)
        told = predicted(batch)
        outputs[batch] = {
            **{"global_teacher_entropy": values[0], "patch_teacher_entropy": values[1]},
            **{"global_predicted": told[0], "patch_predicted": told[1]},
        }
        engine.state.numbers = [outputs[batch]]
        engine.fire_event(ReadOut.NUMBERS_READ)
        return [outputs[batch]]

    engine = Engine(step)
    engine.register_events(*ReadOut)
    monitor.attach(engine)
    engine.state.iteration = first
    engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "iteration", first))
    engine.run(range(first + 1, first + iterations + 1), max_epochs=1)
    return outputs


@pytest.mark.parametrize("patience", [0, 1])
def test_without_patience_only_a_collapse_ends_a_run(patience: int, caplog: pytest.LogCaptureFixture) -> None:
    watched(quick_monitor(patience=patience), 40)
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    with pytest.raises(CollapseError, match="collapsed for 1 mini-batches, at mini-batch 21: global branch"):
        watched(quick_monitor(patience=patience), 40, lambda i: (1.0, 0.7))


def quick_monitor(**changes: Any) -> CollapseMonitor:
    return CollapseMonitor(**{"patience": 10, "grace": 20, "smoothing": 0.5, "rank_interval": 4, **changes})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1.0, 0.7), "global branch: the teacher's output is uniform"),
        ((0.6, 0.999), "patch branch: the teacher's output is uniform"),
        ((0.001, 0.7), "global branch: the teacher's output is a point"),
        ((0.6, 0.0), "patch branch: the teacher's output is a point"),
    ],
)
def test_a_lasting_collapse_stops_the_run(values: tuple[float, float], words: str) -> None:
    with pytest.raises(CollapseError) as caught:
        watched(quick_monitor(), 200, lambda i: values)
    message = str(caught.value)
    assert words in message
    assert "at mini-batch 30" in message  # after 20 of grace, 10 of patience
    assert "sinkhorn" in message
    assert "koleo" in message


def test_targets_of_noise_stop_the_run() -> None:
    """The entropy is as wanted all the while; it passes by zero without the run being stopped."""
    with pytest.raises(CollapseError, match="global branch: the student predicts nothing of the teacher's targets"):
        watched(quick_monitor(), 200, predicted=lambda i: (0.0, 0.5))
    watched(quick_monitor(), 200, predicted=lambda i: (0.1 * (i % 2) - 0.04, 0.5))


def test_tokens_that_know_their_position_alone_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watched(quick_monitor(), 200, predicted=lambda i: (0.05, 0.0))
    assert caplog.text.count("tokens know where they lie, and nothing of this volume") == 1
    assert "token_centre.json" in caplog.text


def test_equal_embeddings_stop_the_run() -> None:
    with pytest.raises(CollapseError, match="summaries: every volume has the same"):
        watched(quick_monitor(), 200, summaries=lambda i: torch.full((2, 8), 0.3))


def test_a_healthy_run_goes_on() -> None:
    outputs = watched(quick_monitor(), 200, lambda i: (0.3 + 0.6 * (i % 2), 0.97))
    assert len(outputs) == 200
    assert 4 < outputs[200]["effective_rank"] <= 8


def test_a_passing_collapse_does_not_stop_the_run() -> None:
    """Nine bad mini-batches, then a good stretch, again and again."""
    # After a value of 0.6 the mean over (smoothing 0.5) needs 7 values of 1 to get over 0.995.
    watched(quick_monitor(), 300, lambda i: (0.6 if i % 20 > 14 else 1.0, 0.7))
    with pytest.raises(CollapseError):
        watched(quick_monitor(), 300, lambda i: (0.6 if i % 20 > 18 else 1.0, 0.7))


def test_the_monitor_goes_on_where_it_was() -> None:
    first = quick_monitor()
    watched(first, 25, lambda i: (1.0, 0.7))
    second = quick_monitor()
    second.load_state_dict(first.state_dict())
    with pytest.raises(CollapseError, match="at mini-batch 30"):
        watched(second, 50, lambda i: (1.0, 0.7), first=25)
    fresh = quick_monitor()
    fresh.load_state_dict(quick_monitor().state_dict())  # nothing seen yet
    assert len(fresh.queue) == 0


def test_effective_rank_equals_numpy(rng: np.random.Generator) -> None:
    rows = rng.normal(size=(40, 6)) * np.array([5, 3, 1, 0.5, 0.1, 0.01]) + 7
    values = np.linalg.eigvalsh(np.cov(rows.T))
    shares = values / values.sum()
    assert effective_rank(torch.tensor(rows)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    square = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert effective_rank(square + 100) == pytest.approx(2.0, abs=1e-4)
    line = torch.linspace(0, 1, 9)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.full((9, 4), 0.123)) == 1.0
