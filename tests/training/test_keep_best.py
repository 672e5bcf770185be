# SPDX-License-Identifier: Apache-2.0
"""The best epoch's weights, through kills and resumes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events

from volta_components.errors import InputError
from volta_components.training.checkpoint import ResumableCheckpoint, previous_checkpoint
from volta_components.training.keep_best import KeepBest


def make_evaluator() -> tuple[torch.nn.Linear, Any]:
    """A network of one weight, and what is used of MONAI's evaluator of it."""
    network, evaluator = torch.nn.Linear(1, 1, bias=False), Engine(lambda *_: None)
    evaluator.network, evaluator.state.key_metric_name = network, "dice"  # type: ignore[attr-defined]
    return network, evaluator


def run_epochs(keep: KeepBest, network: torch.nn.Linear, evaluator: Engine, values: list[float | None]) -> list[Any]:
    """Epochs whose weights are the epoch's number and whose metric is given; None is not evaluated.

    Returns what ``keep`` reports at each epoch's end, and whose weights are there.
    """
    engine = Engine(lambda *_: None)
    seen: list[Any] = []

    def evaluate(trainer: Engine) -> None:
        torch.nn.init.constant_(network.weight, trainer.state.epoch)
        value = values[trainer.state.epoch - 1]
        if value is not None:
            evaluator.state.epoch, evaluator.state.metrics = trainer.state.epoch, {"dice": value}

    engine.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
    keep.attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append((e.state.metrics.get("d"), kept(keep))))
    engine.add_event_handler(Events.STARTED, lambda e: engine.load_state_dict({"iteration": keep.epoch, **LENGTHS}))
    engine.run([0], max_epochs=len(values), epoch_length=1)
    return seen


LENGTHS = {"epoch_length": 1, "max_epochs": 4}


def kept(keep: KeepBest) -> list[str]:
    return sorted(path.stem for path in keep.path.parent.glob("best*"))


def test_the_first_of_the_best_epochs_is_kept(tmp_path: Path) -> None:
    network, evaluator = make_evaluator()
    keep = KeepBest(evaluator, tmp_path / "best.pt", report_as="d")
    assert not keep.restore()
    seen = run_epochs(keep, network, evaluator, [0.2, 0.7, None, 0.7])
    # Without checkpoints, the weights of the epoch before are removed when the next one starts.
    assert seen == [(0.2, ["best-1"]), (0.7, ["best-1", "best-2"]), (None, ["best-2"]), (0.7, ["best-2"])]
    assert keep.state_dict() == {"epoch": 2, "value": 0.7, "before": None}
    assert not kept(keep)  # the run is finished


def test_a_kill_before_the_checkpoint_leaves_the_weights_that_the_checkpoint_before_names(tmp_path: Path) -> None:
    network, evaluator = make_evaluator()
    keep = KeepBest(evaluator, tmp_path / "best.pt")
    keep._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(keep, network, evaluator, [0.1, 0.3, None, None])
    checkpoint = keep.state_dict()
    # The weights of a better fifth epoch are written; then the process dies before it has a checkpoint.
    keep._epoch_started(Engine(lambda *_: None))
    evaluator.state.epoch, evaluator.state.metrics = 5, {"dice": 0.9}
    torch.nn.init.constant_(network.weight, 5)
    keep._epoch_completed(SimpleNamespace(state=SimpleNamespace(epoch=5)))  # type: ignore[arg-type]
    assert kept(keep) == ["best-2", "best-5"]

    again = KeepBest(evaluator, tmp_path / "best.pt")
    again.load_state_dict(checkpoint)
    again._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(again, network, evaluator, [0.1, 0.3, 0.2, 0.1])  # this time, none is better
    assert again.epoch == 2 and again.restore() and network.weight.item() == 2
    assert kept(again) == ["best-2"]


def test_between_checkpoints_only_what_can_still_be_needed_is_kept(tmp_path: Path) -> None:
    network, evaluator = make_evaluator()
    keep = KeepBest(evaluator, tmp_path / "best.pt")
    keep._completed = lambda: None  # type: ignore[method-assign]
    inner = keep._epoch_completed

    def with_a_checkpoint_of_the_first_epoch(engine: Engine) -> None:
        inner(engine)
        if engine.state.epoch == 1:
            keep.state_dict()

    keep._epoch_completed = with_a_checkpoint_of_the_first_epoch  # type: ignore[method-assign]
    seen = run_epochs(keep, network, evaluator, [0.1, 0.2, 0.3, None])
    files = [names for _, names in seen]
    assert files == [["best-1"], ["best-1", "best-2"], ["best-1", "best-2", "best-3"], ["best-1", "best-3"]]


def test_the_weights_that_the_checkpoint_before_the_last_names_are_there(tmp_path: Path) -> None:
    """Also after a resume: the last checkpoint may be damaged."""
    network, evaluator = make_evaluator()
    keep = KeepBest(evaluator, tmp_path / "best.pt")
    keep._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(keep, network, evaluator, [0.1, None, None, None])
    first = keep.state_dict()
    keep.load_state_dict(first)
    keep._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(keep, network, evaluator, [None, 0.2, None, None])
    last = keep.state_dict()
    again = KeepBest(evaluator, tmp_path / "best.pt")
    again.load_state_dict(last)
    again._epoch_started(Engine(lambda *_: None))
    assert kept(again) == ["best-1", "best-2"]
    again.load_state_dict(first)
    assert again.restore()
    (tmp_path / "best-1.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"best-1\.pt: the best epoch's weights cannot be used"):
        again.restore()


def test_its_weights_come_back_and_it_goes_on(tmp_path: Path) -> None:
    network, evaluator = make_evaluator()
    keep = KeepBest(evaluator, tmp_path / "best.pt")
    keep._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(keep, network, evaluator, [0.1, 0.6, 0.3, 0.2])
    assert network.weight.item() == 4
    assert keep.restore() and network.weight.item() == 2

    later = KeepBest(evaluator, tmp_path / "best.pt")
    later.load_state_dict(keep.state_dict())
    later._completed = lambda: None  # type: ignore[method-assign]
    run_epochs(later, network, evaluator, [0.9, 0.9, 0.5, 0.4])  # goes on at the third epoch
    assert later.epoch == 2 and later.restore() and network.weight.item() == 2


class Killed(BaseException):
    """Stands for a process that goes away without a word."""


def run_until(folder: Path, values: list[float], kill_at: int | None = None) -> KeepBest:
    """Five epochs with a checkpoint of each, or those before the one at whose start the process is killed."""
    network, evaluator = make_evaluator()
    keep, trainer = KeepBest(evaluator, folder / "best.pt"), Engine(lambda *_: None)
    keep._completed = lambda: None  # type: ignore[method-assign]

    def evaluate(engine: Engine) -> None:
        torch.nn.init.constant_(network.weight, engine.state.epoch)
        evaluator.state.epoch, evaluator.state.metrics = engine.state.epoch, {"dice": values[engine.state.epoch - 1]}

    trainer.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
    checkpoint = ResumableCheckpoint(folder / "checkpoint.pt", {"network": network}, {}, handlers={"best": keep})
    checkpoint.attach(trainer)

    def kill(engine: Engine) -> None:
        if engine.state.epoch == kill_at:
            raise Killed

    trainer.add_event_handler(Events.EPOCH_STARTED, kill)
    trainer.state.device = "cpu"  # type: ignore[attr-defined]
    try:
        trainer.run([0], max_epochs=5)
    except Killed:
        checkpoint.finish()
        assert checkpoint._lock is not None
        checkpoint._lock.release()
    return keep


def test_a_resume_keeps_the_weights_that_the_checkpoint_before_the_last_names(tmp_path: Path) -> None:
    """However often it is resumed: at each start the room that a checkpoint takes is looked at."""
    for _ in range(3):
        keep = run_until(tmp_path, [0.1, 0.2, 0.0, 0.0, 0.0], kill_at=3)
        assert kept(keep) == ["best-1", "best-2"]
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert previous_checkpoint(tmp_path / "checkpoint.pt").is_file()
    keep = run_until(tmp_path, [0.1, 0.05, 0.05, 0.05, 0.05])
    assert keep.epoch == 1 and keep.restore()
