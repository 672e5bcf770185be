# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a broken run resumes bit for bit, other settings and damaged files are refused."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
from ignite.engine import Engine, Events
from method_helpers import HIDDEN, PROTOTYPES, assert_equal_states, tiny_run
from monai.transforms import Compose, RandGaussianNoised
from unpickled import Call

from volta_components.errors import InputError
from volta_components.files import partial_prefix
from volta_components.method.collapse import CollapseMonitor
from volta_components.method.koleo import KoLeoLoss
from volta_components.method.losses import GlobalAlignmentLoss, SinkhornTargets
from volta_components.training.checkpoint import ResumableCheckpoint


class Killed(BaseException):
    """Stands for a process that goes away without a word."""


def run_with_checkpoint(
    path: Path,
    settings: dict[str, Any] | None = None,
    kill_at: int | None = None,
    run: bool = True,
    log_interval: int = 1,
) -> SimpleNamespace:
    """Seven volumes, two epochs, windows of two (the last of an epoch holds one), every stateful part in use."""
    parts = tiny_run(
        count=7,
        epochs=2,
        transform=Compose([RandGaussianNoised("image", prob=1.0, std=0.02)]),
        global_loss=GlobalAlignmentLoss(SinkhornTargets(PROTOTYPES, queue_size=6)),
        koleo_loss=KoLeoLoss(HIDDEN, 6),
        learning_rate=lambda step: 1e-3 / (1 + step),
        log_interval=log_interval,
    )
    parts.monitor = CollapseMonitor(queue_size=5, rank_interval=3)
    parts.checkpoint = ResumableCheckpoint(
        path,
        {
            "student": parts.student,
            "teacher": parts.teacher,
            "loss": parts.loss,
            "optimizer": parts.optimizer,
        },
        settings or {"seed": 0, "sizes": (8, 12)},
        window=2,
        handlers={"monitor": parts.monitor, "disabled": None},
    )
    parts.checkpoint.attach(parts.trainer)
    parts.outputs = {}

    def remember(engine: Engine) -> None:
        parts.outputs[engine.state.iteration] = dict(engine.state.output[0])

    def kill(engine: Engine) -> None:
        if engine.state.iteration == kill_at:
            raise Killed

    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, remember)
    parts.trainer.add_event_handler(Events.ITERATION_STARTED, kill)
    if run:
        if kill_at is None:
            parts.trainer.run()
        else:
            with pytest.raises(Killed):
                parts.trainer.run()
            parts.checkpoint.finish()  # at the latest when its process ends
    return parts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The unbroken run; left alone by every test."""
    return run_with_checkpoint(tmp_path_factory.mktemp("whole") / "checkpoint.pt")


@pytest.mark.parametrize(("kill_at", "last_saved"), [((2,), 0), ((4,), 2), ((8,), 7), ((12,), 11), ((6, 14), 13)])
def test_a_broken_run_ends_as_an_unbroken_one_bit_for_bit(
    tmp_path: Path, whole: SimpleNamespace, kill_at: tuple[int, ...], last_saved: int
) -> None:
    """Broken before the first checkpoint, inside a window, between epochs, in the second epoch, and twice."""
    path = tmp_path / "broken.pt"
    for iteration in kill_at:
        torch.manual_seed(iteration)  # a new process has another state of the global generator
        run_with_checkpoint(path, kill_at=iteration)
    assert path.exists() == (kill_at != (2,))
    torch.manual_seed(99)
    rest = run_with_checkpoint(path)
    for name in ("student", "teacher", "loss", "optimizer", "monitor"):
        assert_equal_states(getattr(rest, name).state_dict(), getattr(whole, name).state_dict(), name)
    # Checkpoints lie at multiples of 2 within an epoch of 7, and at its end.
    assert min(rest.outputs) == last_saved + 1
    assert max(rest.outputs) == 14
    for iteration, output in rest.outputs.items():
        for name, value in output.items():
            if name != "volumes_per_second":
                assert value == whole.outputs[iteration][name], (iteration, name)


def test_the_scale_of_float16_gradients_goes_on(tmp_path: Path) -> None:
    """The scale doubles after three good steps and halves after a gradient that is not finite, here the fourth."""

    def run(epochs: int) -> list[float]:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scales: list[float] = []

        def step(engine: Any, factor: float) -> None:
            optimizer.zero_grad()
            engine.scaler.scale((weight * factor).sum()).backward()
            engine.scaler.step(optimizer)
            engine.scaler.update()
            scales.append(engine.scaler.get_scale())

        engine: Any = Engine(step)
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        ResumableCheckpoint(tmp_path / "c.pt", {"optimizer": optimizer}, {"epochs": 2}).attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED(once=epochs), lambda e: e.terminate())
        engine.run([1.0, 1.0, 1.0, float("inf"), 1.0], max_epochs=2)
        return scales

    assert run(1) == [8.0, 8.0, 16.0, 8.0, 8.0]
    # One good step is remembered, so that the second of the new epoch is the third.
    assert run(2) == [8.0, 16.0, 16.0, 8.0, 8.0]


def test_a_finished_run_does_nothing_more(tmp_path: Path, whole: SimpleNamespace) -> None:
    path = shutil.copy(whole.checkpoint.path, tmp_path / "c.pt")
    again = run_with_checkpoint(path)
    assert again.outputs == {}
    assert_equal_states(again.teacher.state_dict(), whole.teacher.state_dict())


def test_half_a_checkpoint_of_a_killed_run_is_removed_at_the_next_start(tmp_path: Path, whole: SimpleNamespace) -> None:
    path = shutil.copy(whole.checkpoint.path, tmp_path / "c.pt")
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / partial_prefix().replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    left.write_bytes(b"half a checkpoint")
    run_with_checkpoint(path)
    assert [item.name for item in tmp_path.iterdir()] == ["c.pt"]  # nothing was left to train, and to save


def test_checkpoints_lie_where_no_gradient_is_pending(tmp_path: Path) -> None:
    parts = run_with_checkpoint(tmp_path / "c.pt", run=False)
    saved: list[tuple[int, int]] = []
    inner = parts.checkpoint.save
    parts.checkpoint.save = lambda engine: (saved.append((engine.state.iteration, engine.state.epoch)), inner(engine))
    parts.trainer.run()
    assert [iteration for iteration, _ in saved] == [2, 4, 6, 7, 9, 11, 13, 14]
    for iteration, _ in saved:
        position, window, _ = parts.trainer.window(iteration - 1)
        assert position == window - 1


def save_settings(path: Path, settings: dict[str, Any]) -> None:
    parts = run_with_checkpoint(path, settings, run=False)
    parts.trainer.state.iteration = 2
    parts.checkpoint.save(parts.trainer)
    parts.checkpoint.finish()


def test_a_checkpoint_is_written_beside_the_training_never_two_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at that time, though the training goes on before the disk is ready."""
    weight = torch.zeros(3)
    module = torch.nn.Module()
    module.register_buffer("weight", weight)
    path, ready, begun = tmp_path / "c.pt", threading.Event(), threading.Event()
    writing: list[int] = []
    inner = torch.save

    def slow(state: Any, target: Path) -> None:
        writing.append(1)
        assert sum(writing) == 1
        begun.set()
        assert ready.wait(60)
        inner(state, target)
        writing.append(-1)

    monkeypatch.setattr(torch, "save", slow)
    engine: Any = SimpleNamespace(state=SimpleNamespace(iteration=1, epoch_length=1, max_epochs=1))
    saver = ResumableCheckpoint(path, {"module": module}, {})
    saver.save(engine)
    weight += 1  # while the first is being written
    assert begun.wait(60)
    assert not path.exists()
    threading.Timer(0.2, ready.set).start()
    saver.save(engine)
    assert torch.equal(torch.load(path)["module"]["weight"], torch.zeros(3))
    saver.finish()
    assert torch.equal(torch.load(path)["module"]["weight"], torch.ones(3))


def test_numbers_on_the_device_are_read_before_a_checkpoint(tmp_path: Path, whole: SimpleNamespace) -> None:
    """Read every 99 mini-batches, a run that breaks ends as one whose numbers are read at once."""
    path = tmp_path / "c.pt"
    run_with_checkpoint(path, kill_at=5, log_interval=99)
    rest = run_with_checkpoint(path, log_interval=99)
    assert min(rest.outputs) == 5
    for name in ("student", "teacher", "loss", "optimizer", "monitor"):
        assert_equal_states(getattr(rest, name).state_dict(), getattr(whole, name).state_dict(), name)


def test_a_run_that_has_diverged_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    parts = run_with_checkpoint(path, run=False, log_interval=99)
    parts.trainer.loss.reconstruction_weight = float("nan")
    with pytest.raises(InputError, match="not finite at mini-batch 2"):
        parts.trainer.run()
    assert not path.exists()


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_settings(path, {"seed": 0, "hidden_size": 32, "sizes": (8, 12), "old": True})
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        run_with_checkpoint(path, {"seed": 0, "hidden_size": 64, "sizes": [8, 12], "new": None})
    message = str(caught.value)
    assert str(path) in message
    assert "hidden_size  32" in message
    assert "64" in message
    assert "old" in message
    assert "seed" not in message
    assert "sizes" not in message  # a list is what a tuple is stored as
    assert "run_name" in message
    assert path.read_bytes() == before


def test_a_key_that_is_absent_differs_from_one_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_settings(path, {"seed": 0})
    with pytest.raises(InputError, match="target_entropy"):
        run_with_checkpoint(path, {"seed": 0, "target_entropy": 0.5})


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "pickle"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, whole: SimpleNamespace, damage: str) -> None:
    path, trap = tmp_path / "c.pt", tmp_path / "trap"
    shutil.copy(whole.checkpoint.path, path)
    if damage == "pickle":
        torch.save({"settings": Call(Path.touch, trap), "engine": {}}, path)
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:5000], "text": b"hello"}[damage])
    with pytest.raises(InputError, match=r"(?s)no checkpoint .*c\.pt  .*(damaged|plain tensors).*\nRemove ") as caught:
        run_with_checkpoint(path)
    assert "weights_only" not in str(caught.value)  # PyTorch's advice is to load without protection
    assert not trap.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    """Otherwise the tests that it stays shut would say nothing."""
    pickle.loads(pickle.dumps(Call(Path.touch, tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("damage", ["a bit", "half of it", "all of it"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    tmp_path: Path, whole: SimpleNamespace, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Broken at 13 of 14 mini-batches, with checkpoints at 13 and 11: resumed from 11, it ends as if never broken."""
    path = tmp_path / "c.pt"
    run_with_checkpoint(path, kill_at=14)
    assert torch.load(path, weights_only=True)["engine"]["iteration"] == 13
    assert torch.load(tmp_path / "c_previous.pt", weights_only=True)["engine"]["iteration"] == 11
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        # In the middle of the largest record, which is some weight or other.
        with zipfile.ZipFile(path) as archive:
            record = max(archive.infolist(), key=lambda entry: entry.file_size)
        content[record.header_offset + 200 + record.file_size // 2] ^= 4
    path.write_bytes({"a bit": content, "half of it": content[: len(content) // 2], "all of it": b""}[damage])
    rest = run_with_checkpoint(path)
    assert min(rest.outputs) == 12
    assert "c_previous.pt resumes at mini-batch 11" in caplog.text
    for name in ("student", "teacher", "loss", "optimizer", "monitor"):
        assert_equal_states(getattr(rest, name).state_dict(), getattr(whole, name).state_dict(), name)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    run_with_checkpoint(path, kill_at=14)
    good = (tmp_path / "c_previous.pt").read_bytes()
    path.write_bytes(b"")
    parts = run_with_checkpoint(path, run=False)
    parts.checkpoint.load(parts.trainer)
    parts.checkpoint.save(parts.trainer)
    parts.checkpoint.finish()
    assert (tmp_path / "c_previous.pt").read_bytes() == good
    (tmp_path / "c_previous.pt").write_bytes(b"")
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        run_with_checkpoint(path)
    assert [line.split()[0] for line in str(caught.value).splitlines()[1:-1]] == [
        str(path),
        f"{tmp_path}/c_previous.pt",
    ]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    parts = run_with_checkpoint(path, run=False)
    parts.checkpoint.save(parts.trainer)
    parts.checkpoint.finish()
    before = path.read_bytes()
    with torch.no_grad():
        parts.student.network.norm.bias[3] = float("nan")
    with pytest.raises(InputError, match=r"diverged: student\.network\.norm\.bias is not finite .*is kept"):
        parts.checkpoint.save(parts.trainer)
    assert path.read_bytes() == before


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that has taken the lock."""
    code = (
        "import sys, time; from pathlib import Path; from volta_components.files import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); lock.take('taken'); print('taken', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    return process


def test_a_second_training_is_kept_out_until_the_first_is_dead(tmp_path: Path) -> None:
    other = hold(tmp_path / ".lock")
    try:
        with pytest.raises(InputError, match=f"process {other.pid}.*another training is writing.*--run_name"):
            run_with_checkpoint(tmp_path / "c.pt")
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / ".lock").exists()
    run_with_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / ".lock").exists()


def test_a_disk_without_room_for_a_checkpoint_is_named_before_the_first_step(
    tmp_path: Path, whole: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a checkpoint takes is known at the start, but for the headers of so small tensors."""
    taken = whole.checkpoint.path.stat().st_size

    def disk_of(free: float) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=int(free))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    disk_of(0.8 * taken)
    with pytest.raises(InputError, match=r"\d MB are free, and a checkpoint takes \d MB; free space"):
        run_with_checkpoint(tmp_path / "a" / "checkpoint.pt")
    disk_of(1.1 * taken)
    run_with_checkpoint(tmp_path / "b" / "checkpoint.pt")
    assert "while one is replaced there are three" in caplog.text
    caplog.clear()
    disk_of(3.0 * taken)
    run_with_checkpoint(tmp_path / "c" / "checkpoint.pt")
    assert "there are three" not in caplog.text
    disk_of(0)
    run_with_checkpoint(tmp_path / "c" / "checkpoint.pt")  # is finished, and writes no more

    disk_of(3.0 * taken)
    run_with_checkpoint(tmp_path / "d" / "checkpoint.pt", kill_at=12)
    disk_of(0.93 * taken)  # less than the checkpoints take that are there
    with pytest.raises(InputError, match="free space"):
        run_with_checkpoint(tmp_path / "d" / "checkpoint.pt")
    disk_of(1.1 * taken)  # for the third one
    run_with_checkpoint(tmp_path / "d" / "checkpoint.pt")
    assert "there are three" not in caplog.text


def test_a_run_whose_folder_is_gone_stops(tmp_path: Path) -> None:
    parts = run_with_checkpoint(tmp_path / "run" / "c.pt", run=False)
    remove = Events.ITERATION_COMPLETED(once=3)
    parts.trainer.add_event_handler(remove, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(InputError, match="run: the folder was removed"):
        parts.trainer.run()
    assert not (tmp_path / "run").exists()


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    parts = run_with_checkpoint(path, run=False)
    parts.trainer.state.iteration = 4
    parts.checkpoint.save(parts.trainer)
    parts.checkpoint.finish()
    before = path.read_bytes()

    def broken_save(state: Any, target: IO[bytes]) -> None:
        target.write(b"half of a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken_save)
    parts.checkpoint.save(parts.trainer)
    with pytest.raises(OSError, match="no space"):
        parts.checkpoint.finish()
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["c.pt"]
