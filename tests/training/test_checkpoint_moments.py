# SPDX-License-Identifier: Apache-2.0
"""When a checkpoint is due, and when a signal ends a run; with a clock of its own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
from ignite.engine import Engine, Events

from volta_components.training import checkpoint
from volta_components.training.checkpoint import ResumableCheckpoint


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The checkpoint's clock: ``now``, in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_ends_of_epochs_have_a_checkpoint_after_so_many_minutes_and_the_last_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    """Epochs of four minutes; a resumed run waits again."""
    saved: list[int] = []

    def run(stop_after: int, minutes: float, name: str) -> list[int]:
        saved.clear()

        def save(state: Any, target: IO[bytes]) -> None:
            saved.append(state["engine"]["iteration"])
            torch.serialization.save(state, target)

        monkeypatch.setattr(torch, "save", save)
        engine = Engine(lambda *_: setattr(clock, "now", clock.now + 240))
        ResumableCheckpoint(tmp_path / name, {}, {}, minutes=minutes).attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED(once=stop_after), lambda e: e.terminate())
        engine.run([0], max_epochs=9)
        return list(saved)

    assert run(9, 0, "each.pt") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert run(5, 10, "some.pt") == [3]
    clock.now += 1e6
    assert run(9, 10, "some.pt") == [6, 9]


def test_within_an_epoch_a_checkpoint_lies_at_the_end_of_the_first_window_after_so_many_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    """Mini-batches of one minute, windows of three, epochs of eleven."""
    saved: list[int] = []
    monkeypatch.setattr(torch, "save", lambda state, target: saved.append(state["engine"]["iteration"]))
    monkeypatch.setattr(checkpoint, "atomic_path", contextlib.nullcontext)
    engine = Engine(lambda *_: setattr(clock, "now", clock.now + 60))
    ResumableCheckpoint(tmp_path / "c.pt", {}, {}, minutes=4, window=3).attach(engine)
    engine.run(range(11), max_epochs=2)
    # 6: the first end of a window after 4 minutes; 11: the end of the epoch; 17 = 11 + 6; 22: the last.
    assert saved == [6, 11, 17, 22]


def test_processes_that_write_nothing_read_numbers_as_seldom_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace
) -> None:
    """Mini-batches of one minute, windows of three, a checkpoint every four minutes; one epoch of eleven."""
    read: dict[int, list[int]] = {0: [], 1: []}
    for rank, iterations in read.items():
        clock.now = 0.0
        monkeypatch.setattr(checkpoint, "process_rank", lambda rank=rank: rank)
        engine: Any = Engine(lambda *_: setattr(clock, "now", clock.now + 60))
        engine.read_numbers = lambda e=engine, seen=iterations: seen.append(e.state.iteration)
        ResumableCheckpoint(tmp_path / "c.pt", {}, {}, minutes=4, window=3).attach(engine)
        engine.run(range(11), max_epochs=1)
        (tmp_path / "c.pt").unlink(missing_ok=True)
    assert read == {0: [6, 11], 1: [6, 11]}


@pytest.mark.parametrize(("signalled_at", "asked", "stopped_at"), [(4, [4, 8], 9), (9, [4, 8, 11], 11)])
def test_processes_agree_to_stop_where_numbers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled_at: int, asked: list[int], stopped_at: int
) -> None:
    """Windows of three in epochs of eleven, numbers read every four mini-batches; the other process got the signal."""
    engine: Any = Engine(lambda *_: None)
    engine.log_interval = 4
    engine.state.device = torch.device("cpu")
    seen: list[int] = []

    def mean(own: torch.Tensor) -> torch.Tensor:
        assert own == 0
        seen.append(engine.state.iteration)
        return torch.tensor(0.5 * (engine.state.iteration > signalled_at))

    monkeypatch.setattr(checkpoint, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint, "mean_over_processes", mean)
    ResumableCheckpoint(tmp_path / "c.pt", {}, {}, minutes=60, window=3).attach(engine)
    with pytest.raises(KeyboardInterrupt, match=f"saved at mini-batch {stopped_at}"):
        engine.run(range(11), max_epochs=2)
    assert seen == asked
