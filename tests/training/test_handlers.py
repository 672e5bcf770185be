# SPDX-License-Identifier: Apache-2.0
"""Handlers: resuming bit for bit, watching for collapse, recording, pictures, export."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from matplotlib.image import imread
from method_helpers import HIDDEN, IMAGE, PROTOTYPES, flat, tiny_run
from monai.handlers import MLFlowHandler
from monai.transforms import Compose, RandGaussianNoised

from volta_components import __version__
from volta_components.errors import InputError
from volta_components.files import partial_prefix
from volta_components.method import monitoring
from volta_components.method.collapse import CollapseError, CollapseMonitor, effective_rank
from volta_components.method.export import EncoderExport
from volta_components.method.losses import GlobalAlignmentLoss, KoLeoLoss, SinkhornTargets
from volta_components.method.masking import GroupMask
from volta_components.method.monitoring import ReconstructionCheck, ReconstructionPicture
from volta_components.method.weights import load_encoder
from volta_components.training import checkpoint, tracking
from volta_components.training.checkpoint import ResumableCheckpoint
from volta_components.training.record import code_version, patient_key, provenance
from volta_components.training.tracking import TrainingRecord, find_mlflow_handler


class Killed(BaseException):
    """Stands for a process that goes away without a word."""


def run_with_checkpoint(
    path: Path, settings: dict[str, Any] | None = None, kill_at: int | None = None, interval: int = 2, run: bool = True
) -> SimpleNamespace:
    """Seven volumes, two epochs, windows of two (the last of an epoch holds one), every stateful part in use."""
    parts = tiny_run(
        count=7,
        epochs=2,
        transform=Compose([RandGaussianNoised("image", prob=1.0, std=0.02)]),
        global_loss=GlobalAlignmentLoss(SinkhornTargets(PROTOTYPES, queue_size=6)),
        koleo_loss=KoLeoLoss(HIDDEN, 6),
        learning_rate=lambda step: 1e-3 / (1 + step),
    )
    parts.monitor = CollapseMonitor(queue_size=5, rank_interval=3)
    parts.checkpoint = ResumableCheckpoint(
        path,
        {
            "student": parts.student,
            "teacher": parts.teacher,
            "loss": parts.loss,
            "optimizer": parts.optimizer,
            "monitor": parts.monitor,
        },
        settings or {"seed": 0, "sizes": (8, 12)},
        interval=interval,
        window=2,
    )
    parts.monitor.attach(parts.trainer)
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
    return parts


def assert_equal_states(mine: Any, theirs: Any, name: str = "") -> None:
    assert type(mine) is type(theirs), name
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs), name
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), name
        for key in mine:
            assert_equal_states(mine[key], theirs[key], f"{name}/{key}")
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs), name
        for i, (a, b) in enumerate(zip(mine, theirs)):
            assert_equal_states(a, b, f"{name}/{i}")
    else:
        assert mine == theirs, name


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
    assert [item.name for item in tmp_path.iterdir()] == ["c.pt"]


def test_checkpoints_lie_where_no_gradient_is_pending(tmp_path: Path) -> None:
    parts = run_with_checkpoint(tmp_path / "c.pt", run=False)
    saved: list[tuple[int, int]] = []
    inner = parts.checkpoint.save
    parts.checkpoint.save = lambda engine: (saved.append((engine.state.iteration, engine.state.epoch)), inner(engine))
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, parts.checkpoint._interval_completed)
    parts.trainer.run()
    for iteration, _ in saved:
        position, window, _ = parts.trainer.window(iteration - 1)
        assert position == window - 1
    with pytest.raises(InputError, match="interval 3 is not a multiple of the 2"):
        ResumableCheckpoint(tmp_path / "c.pt", {}, {}, interval=3, window=2)


def save_settings(path: Path, settings: dict[str, Any]) -> None:
    parts = run_with_checkpoint(path, settings, run=False)
    parts.trainer.state.iteration = 2
    parts.checkpoint.save(parts.trainer)


def test_ends_of_epochs_have_a_checkpoint_after_so_many_minutes_and_the_last_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of four minutes; a run that goes on waits anew."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock.now))
    saved: list[int] = []

    def run(stop_after: int, minutes: float, name: str) -> list[int]:
        saved.clear()

        def save(state: Any, target: Path) -> None:
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
        torch.save({"settings": Trap(trap), "engine": {}}, path)
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:5000], "text": b"hello"}[damage])
    with pytest.raises(InputError, match=r"c\.pt: not a checkpoint of this project .*remove it") as caught:
        run_with_checkpoint(path)
    assert "weights_only" not in str(caught.value)  # PyTorch's advice is to load without protection
    assert not trap.exists()


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_the_trap_works(tmp_path: Path) -> None:
    """Otherwise the tests that it stays shut would say nothing."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    parts = run_with_checkpoint(path, run=False)
    parts.trainer.state.iteration = 4
    parts.checkpoint.save(parts.trainer)
    before = path.read_bytes()

    def broken_save(state: Any, target: Path) -> None:
        Path(target).write_bytes(b"half of a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken_save)
    with pytest.raises(OSError, match="no space"):
        parts.checkpoint.save(parts.trainer)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["c.pt"]


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
        engine.state.summaries = summaries(batch)
        values = entropies(batch)
        told = predicted(batch)
        outputs[batch] = {
            **{"global_teacher_entropy": values[0], "patch_teacher_entropy": values[1]},
            **{"global_predicted": told[0], "patch_predicted": told[1]},
        }
        return [outputs[batch]]

    engine = Engine(step)
    monitor.attach(engine)
    engine.state.iteration = first
    engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "iteration", first))
    engine.run(range(first + 1, first + iterations + 1), max_epochs=1)
    return outputs


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


@pytest.mark.parametrize("branch", ["global", "patch"])
def test_targets_of_noise_stop_the_run(branch: str) -> None:
    """The entropy is as wanted all the while; it passes by zero without the run being stopped."""
    dead = (lambda i: (0.0, 0.5)) if branch == "global" else (lambda i: (0.05, -0.01))
    with pytest.raises(CollapseError, match=f"{branch} branch: the student tells nothing of the teacher's targets"):
        watched(quick_monitor(), 200, predicted=dead)
    watched(quick_monitor(), 200, predicted=lambda i: (0.1 * (i % 2) - 0.04, 0.5))


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


class FakeClient:
    def __init__(self, params: dict[str, str]) -> None:
        self.params, self.tags = params, {}
        self.artifacts: list[tuple[str, str]] = []

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=self.params))

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        self.tags[name] = value

    def log_artifact(self, run_id: str, path: str, folder: str) -> None:
        self.artifacts.append((Path(path).name, folder))


class FakeMLFlow:
    """What the handlers use of MONAI's handler."""

    def __init__(self, params: dict[str, str]) -> None:
        self.cur_run = SimpleNamespace(info=SimpleNamespace(run_id="7"))
        self.client = FakeClient(params)
        self.params: list[dict[str, Any]] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def _log_params(self, params: dict[str, Any]) -> None:
        self.params.append(params)

    def _log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.metrics[step] = numbers


def test_the_record_averages_over_mini_batches_and_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLFlow({"seed": "3"})
    monkeypatch.setattr(tracking, "find_mlflow_handler", lambda engine: fake)
    engine = Engine(lambda e, b: [{"loss": float(b**2), **({"learning_rate": float(b)} if b % 2 == 0 else {})}])
    engine.state.device = torch.device("cpu")
    TrainingRecord({"seed": 3, "size": (8, 12)}, interval=3, tags={"datalist_hash": "abc"}).attach(engine)
    engine.run(range(1, 6), max_epochs=2)
    assert engine.state.metrics == {"loss": 55 / 5, "learning_rate": 3.0}
    # Mini-batches 1..5 and 1..5 again, three by three; a number that some lack is averaged over those that have it.
    assert fake.metrics[3] == pytest.approx({"loss": (1 + 4 + 9) / 3, "learning_rate": 2.0})
    assert fake.metrics[6] == pytest.approx({"loss": (16 + 25 + 1) / 3, "learning_rate": 4.0})
    assert fake.metrics[9] == pytest.approx({"loss": (4 + 9 + 16) / 3, "learning_rate": 3.0})
    assert fake.params == [{"size": [8, 12]}]  # once; not what a resumed run has already
    assert fake.client.tags == {"code_version": code_version(), "datalist_hash": "abc"}


def test_means_over_processes_are_taken_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL, unlike gloo, reduces nothing that lies on the CPU."""
    seen: list[str] = []
    monkeypatch.setattr(tracking, "mean_over_processes", lambda x: seen.append(x.device.type) or torch.zeros(x.shape))
    engine: Any = Engine(lambda e, b: [{"loss": 1.0}])
    engine.state.device = torch.device("meta")
    TrainingRecord({}, interval=1).attach(engine)
    engine.run([0])
    assert seen == ["meta", "meta"]  # the mini-batch's, and the epoch's


def test_the_mlflow_handler_is_found_once_it_has_a_run() -> None:
    engine = Engine(lambda e, b: None)
    assert find_mlflow_handler(engine) is None
    tracker = MLFlowHandler.__new__(MLFlowHandler)
    tracker.cur_run = None
    engine.add_event_handler(Events.ITERATION_COMPLETED, tracker.iteration_completed)
    assert find_mlflow_handler(engine) is None
    tracker.cur_run = object()
    assert find_mlflow_handler(engine) is tracker


def test_pictures_are_drawn_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLFlow({})
    plain, drawn = (tiny_run(count=2, epochs=5) for _ in range(2))
    plain.trainer.run()
    monkeypatch.setattr(monitoring, "find_mlflow_handler", lambda engine: fake)
    network = drawn.plain_student.network
    ReconstructionPicture(tmp_path, drawn.loader.dataset[0], network, drawn.views, interval=3).attach(drawn.trainer)
    drawn.trainer.run()
    names = [f"reconstruction_{epoch:04d}.png" for epoch in (1, 3, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert fake.client.artifacts == [(name, "pictures") for name in names]
    picture = imread(tmp_path / names[0])
    assert picture.shape[0] > 100
    assert picture[..., 0].std() > 0.05
    assert_equal_states(drawn.teacher.state_dict(), plain.teacher.state_dict())


class StubNetwork:
    """Gives back what it was shown (masked with zeros), or a constant."""

    def __init__(self, constant: float | None) -> None:
        self.constant = constant

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def token_grid(self, image: torch.Tensor) -> tuple[int, ...]:
        return ()

    def decode(self, tokens: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        return tokens if self.constant is None else torch.full_like(tokens, self.constant)


# Errors of the mean volume are 0 and 0.4 squared: a constant 0.5 is better on the second volume only.
@pytest.mark.parametrize(
    ("constant", "expected", "better"), [(0.5, (0.1**2 + 0.3**2) / 2, 0.5), (None, (0.4**2 + 0.8**2) / 2, 0.0)]
)
def test_held_out_errors_over_masked_voxels(
    tmp_path: Path, constant: float | None, expected: float, better: float
) -> None:
    def items(*values: float) -> list[dict[str, torch.Tensor]]:
        return [{"image": torch.full((1, *IMAGE), value)} for value in values]

    engine: Any = Engine(lambda e, b: None)
    engine.state.device = torch.device("cpu")
    network: Any = StubNetwork(constant)
    mask = GroupMask(cell=1, noise_share=0.0)
    check = ReconstructionCheck(
        tmp_path / "check.json", items(0.4, 0.8, 0.0), items(0.2, 0.6, 1.0), network, mask, interval=2, limit=2
    )
    check.attach(engine)
    seen: list[Any] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(e.state.metrics.get("validation_mean_view")))
    engine.run([0], max_epochs=3)
    assert engine.state.metrics["validation_reconstruction"] == pytest.approx(expected, rel=1e-5)
    # The mean of the first two training volumes is 0.4.
    assert engine.state.metrics["validation_mean_view"] == pytest.approx((0.0**2 + 0.4**2) / 2, rel=1e-5)
    assert [value is None for value in seen] == [True, False, False]
    content = json.loads((tmp_path / "check.json").read_text())
    assert content["epoch"] == 3
    assert content["volumes"] == 2
    assert content["reconstruction"] == pytest.approx(expected, rel=1e-5)
    assert content["share_better"] == engine.state.metrics["validation_share_better"] == better


def test_the_export_at_the_end_of_a_run(tmp_path: Path) -> None:
    parts = tiny_run(count=2, epochs=2)
    path = tmp_path / "models" / "encoder.safetensors"
    networks = {"teacher": parts.teacher.network, "student": parts.plain_student.network}
    EncoderExport(path, networks, "teacher", provenance({"seed": 0}, "abc", [])).attach(parts.trainer)
    with pytest.raises(InputError, match="export 'Teacher': choose teacher or student"):
        EncoderExport(path, networks, "Teacher", {})
    parts.trainer.run()
    network = load_encoder(path)
    mine, theirs = flat(network), flat(parts.teacher.network)
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(value, theirs[name]) for name, value in mine.items())
    record = json.loads(path.with_suffix(".json").read_text())["provenance"]
    assert (record["epochs"], record["iterations"], record["datalist_hash"]) == (2, 4, "abc")
    assert record["settings"] == {"seed": 0}
    assert record["exported"] == "teacher"
    assert record["torch_version"] == torch.__version__


def test_provenance_tells_whom_an_encoder_has_seen_without_their_names() -> None:
    items = [{"patient_id": name, "session": str(i)} for i, name in enumerate(["sub-0002", "sub-0001", "sub-0002"])]
    record = provenance({"seed": 0}, "abc", iter(items), "phantom")
    assert (record["volumes"], record["cohort"]) == (3, "phantom")
    assert record["patient_ids"] == sorted({patient_key("sub-0001"), patient_key("sub-0002")})
    assert len(record["patient_ids"]) == 2
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in record["patient_ids"])
    assert "sub-0001" not in json.dumps(record)


def test_the_version_of_the_code_is_known() -> None:
    assert code_version().startswith(__version__)
