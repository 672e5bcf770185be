# SPDX-License-Identifier: Apache-2.0
"""The trainer: accumulation windows, clocks, moving averages, frozen layers."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from method_helpers import (
    HIDDEN,
    PATCH,
    PROTOTYPES,
    assert_equal_states,
    assert_same_gradients,
    flat,
    make_views,
    record_gradients,
    tiny_run,
    tiny_student,
    tiny_views,
)
from monai.transforms import Compose, RandGaussianNoised
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from volta_components.errors import InputError
from volta_components.method.air import AirTokens
from volta_components.method.koleo import KoLeoLoss
from volta_components.method.losses import (
    CentredTargets,
    GlobalAlignmentLoss,
    PatchAlignmentLoss,
    SinkhornTargets,
)
from volta_components.method.masking import GroupMask
from volta_components.method.networks import parameter_groups
from volta_components.method.trainer import ReadOut
from volta_components.method.views import CropGeometry
from volta_components.training.sampling import derived_seed
from volta_components.training.schedules import CosineSchedule


def test_windows_of_an_epoch_that_the_window_does_not_divide() -> None:
    """2,002 volumes and windows of 8: 250 whole windows and one of 2."""
    trainer = tiny_run(count=2002, accumulation_steps=8).trainer
    assert trainer.state.epoch_length == 2002
    places = [trainer.window(iteration) for iteration in range(4004)]
    assert places[0] == (0, 8, 0)
    assert places[7] == (7, 8, 0)
    assert places[8] == (0, 8, 1)
    assert places[1999] == (7, 8, 249)
    assert places[2000:2002] == [(0, 2, 250), (1, 2, 250)]
    assert places[2002] == (0, 8, 251)
    assert places[4003] == (1, 2, 501)
    # Each window's mini-batches weigh 1 together, and steps count up without a gap.
    assert sum(1 / length for _, length, _ in places) == pytest.approx(502)
    assert sorted({step for *_, step in places}) == list(range(502))


def loss_of(
    parts: Any, student: nn.Module, teacher: nn.Module, centres: list[torch.Tensor], key: tuple[int, int]
) -> Any:
    """Eq. 6 for one volume, written out with PyTorch's own functions; also the teacher's mean logits."""
    volume = parts.loader.dataset[key]["image"][None]
    views = make_views(parts.views, volume, [key])
    out = student(views.student[:, 0])
    with torch.no_grad():
        taught = teacher(views.teacher[:, 0])
    student_logits = torch.cat([out.globals_.logits, student.local_logits(views.local[:, 0])])
    pairs = []
    for i in range(2):
        target = ((taught.logits[i] - centres[0]) / 0.05).softmax(-1)
        pairs += [
            nn.functional.cross_entropy(student_logits[j] / 0.1, target) for j in range(len(student_logits)) if j != i
        ]
    patch_target = ((taught.patch_logits.rows() - centres[1]) / 0.06).softmax(-1)
    patch = nn.functional.cross_entropy(out.globals_.patch_logits.rows() / 0.1, patch_target)
    rec = torch.stack(
        [
            nn.functional.mse_loss(out.reconstruction[v][views.masked[v, 0]], views.image[v, 0][views.masked[v, 0]])
            for v in range(2)
        ]
    ).mean()
    means = [taught.logits.mean(0), taught.patch_logits.rows().mean(0)]
    return torch.stack(pairs).mean(), patch, rec, means


@pytest.mark.parametrize("views_together", [True, False])
def test_gradients_and_losses_equal_those_computed_by_hand(views_together: bool) -> None:
    """Five volumes, windows of three: the last window is averaged over the two that it holds."""
    parts = tiny_run(
        count=5,
        epochs=1,
        accumulation_steps=3,
        learning_rate=lambda step: 0.0,
        teacher_momentum=lambda step: 1.0,
        teacher_temperature=lambda step: 0.05,
        patch_teacher_temperature=lambda step: 0.06,
        reconstruction_weight=10.0,
        clip_norm=0.0,
        frozen_last_layer_epochs=0,
        views_together=views_together,
    )
    student, teacher = copy.deepcopy(parts.plain_student), copy.deepcopy(parts.teacher)
    gradients = record_gradients(parts.optimizer, parts.plain_student)
    outputs: list[dict[str, float]] = []
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.extend(e.state.output))
    parts.trainer.run()

    order = parts.sampler.order(1)
    centres = [torch.zeros(16), torch.zeros(16)]
    single: list[dict[str, torch.Tensor]] = []
    for position, index in enumerate(order):
        student.zero_grad()
        loss_global, patch, rec, means = loss_of(parts, student, teacher, centres, (1, int(index)))
        loss = loss_global + patch + 10.0 * rec
        loss.backward()
        single.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        for name, value in (("global", loss_global), ("patch", patch), ("reconstruction", rec)):
            assert outputs[position][f"loss_{name}"] == pytest.approx(value.item(), rel=1e-5)
        assert outputs[position]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        # Centres move at every mini-batch, not at every optimiser step.
        centres = [mean if position == 0 else 0.9 * old + 0.1 * mean for old, mean in zip(centres, means)]
    for module, centre in ((parts.loss.global_loss, centres[0]), (parts.loss.patch_loss, centres[1])):
        torch.testing.assert_close(module.targets.centre, centre, atol=1e-6, rtol=1e-5)
    assert len(gradients) == 2
    for window, members in zip(gradients, ([0, 1, 2], [3, 4])):
        means = {name: sum(single[i][name] for i in members) / len(members) for name in single[0]}
        assert_same_gradients(window, means)


@pytest.mark.parametrize("options", [{}, {"views_together": False}, {"koleo_loss": KoLeoLoss(HIDDEN)}])
def test_what_a_graph_records_is_the_same_step(options: dict[str, Any]) -> None:
    """Its numbers are tensors, and gradients stay where they are; test_gpu.py records and starts it on a GPU."""

    def run_of(recorded: bool) -> tuple[list[dict[str, float]], dict[str, Any]]:
        parts = tiny_run(count=8, epochs=2, accumulation_steps=3, **copy.deepcopy(options))
        trainer, outputs = parts.trainer, []
        if recorded:
            trainer._graphed = lambda views, numbers: trainer._graphed_learn(*views, *map(torch.tensor, numbers))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.extend(engine.state.output))
        trainer.run()
        return outputs, parts.teacher.state_dict()

    (outputs, weights), (others, other_weights) = run_of(False), run_of(True)
    assert len(outputs) == 16
    for one, other in zip(outputs, others, strict=True):
        assert {**other, "volumes_per_second": 0} == pytest.approx({**one, "volumes_per_second": 0}, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_graph_is_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(InputError, match="cuda_graph: it needs a single process with a GPU"):
        tiny_run(count=2, epochs=1, cuda_graph=True)


def test_a_wrapped_student_is_not_recorded_though_its_process_is_alone(one_process: None) -> None:
    """As ``torchrun --nproc_per_node 1`` leaves it."""
    parts, gpu = tiny_run(count=2, epochs=1), torch.device("cuda")
    assert parts.trainer._can_be_graphed(gpu)
    parts.trainer.student = DistributedDataParallel(parts.student)
    assert not parts.trainer._can_be_graphed(gpu)


def test_dropped_paths_follow_from_seed_and_mini_batch_alone() -> None:
    """What else drew random numbers in the process, before it was killed or since, changes nothing."""

    def student_of(noise: int, rate: float) -> dict[str, torch.Tensor]:
        parts = tiny_run(count=3, drop_path_rate=rate)
        torch.manual_seed(noise)
        parts.trainer.run()
        return parts.student.state_dict()

    one, other = student_of(1, 0.5), student_of(2, 0.5)
    assert_equal_states(one, other)
    assert any(not torch.equal(value, one[name]) for name, value in student_of(1, 0.0).items())


def test_dropped_paths_do_not_go_with_air() -> None:
    with pytest.raises(InputError, match="drop_path_rate does not go with views#air"):
        tiny_run(drop_path_rate=0.1, views=tiny_views(air=AirTokens(PATCH, 0.3)))
    with pytest.raises(InputError, match=r"drop_path_rate 1.5 is not within \[0, 1\)"):
        tiny_run(drop_path_rate=1.5)


@pytest.mark.parametrize("targets", [CentredTargets, SinkhornTargets])
@pytest.mark.parametrize("token_centre", [None, 0.9])
def test_one_view_after_the_other_gives_the_same_run(targets: Any, token_centre: float | None) -> None:
    """Gradients, losses and statistics, of mini-batches of two volumes, whatever makes the targets."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    gradients_of = []
    for together, outputs in found.items():
        parts = tiny_run(
            count=6,
            epochs=1,
            batch_size=2,
            views_together=together,
            global_loss=GlobalAlignmentLoss(targets(PROTOTYPES)),
            patch_loss=PatchAlignmentLoss(targets(PROTOTYPES), token_centre_momentum=token_centre),
            reconstruction_weight=1.0,
            frozen_last_layer_epochs=0,
        )
        parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e, o=outputs: o.extend(e.state.output))
        gradients = record_gradients(parts.optimizer, parts.plain_student)
        parts.trainer.run()
        gradients_of.append(gradients[0])
    for mine, theirs in zip(found[True], found[False], strict=True):
        for name in mine.keys() - {"volumes_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    for name, value in gradients_of[0].items():
        torch.testing.assert_close(gradients_of[1][name], value, atol=2e-6, rtol=1e-3, msg=name)


def test_koleo_sees_both_views_together() -> None:
    assert tiny_run(koleo_loss=KoLeoLoss(HIDDEN, 8), views_together=False).trainer.views_together


def test_learning_rate_is_set_at_every_optimiser_step() -> None:
    schedule = {0: 0.3, 1: 0.1, 2: 0.05, 3: 0.2}
    parts = tiny_run(count=3, epochs=2, accumulation_steps=2, learning_rate=lambda step: schedule[step])
    used: list[list[float]] = []
    parts.optimizer.register_step_pre_hook(lambda *_: used.append([g["lr"] for g in parts.optimizer.param_groups]))
    parts.trainer.run()
    assert used == [[0.3, 0.3], [0.1, 0.1], [0.05, 0.05], [0.2, 0.2]]


def test_last_layers_stand_still_in_the_first_epoch() -> None:
    parts = tiny_run(count=4, epochs=2, accumulation_steps=2, learning_rate=lambda _: 1e-2)
    states = [flat(parts.plain_student)]
    parts.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: states.append(flat(parts.plain_student)))
    parts.trainer.run()
    frozen = [name for name in states[0] if name.startswith(("head.last_layer", "head.patch_last_layer"))]
    assert len(frozen) == 4
    for name in states[0]:
        if "norm_cross_attn" in name or name.endswith("original0"):  # never trained
            assert np.array_equal(states[0][name], states[2][name]), name
        else:
            assert np.array_equal(states[0][name], states[1][name]) == (name in frozen), name
            assert not np.array_equal(states[1][name], states[2][name]), name


def test_clipping() -> None:
    norms = {}
    for limit in (0.0, 0.01):
        parts = tiny_run(count=2, epochs=1, clip_norm=limit)
        gradients = record_gradients(parts.optimizer, parts.plain_student)
        outputs: list[dict[str, float]] = []
        parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e, o=outputs: o.extend(e.state.output))
        parts.trainer.run()
        norms[limit] = math.sqrt(sum(float(g.double().square().sum()) for g in gradients[0].values()))
        assert "gradient_norm" not in outputs[0]
        reported = outputs[1]["gradient_norm"]
    assert norms[0.0] > 0.1
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)
    assert reported == pytest.approx(norms[0.0], rel=1e-5)  # what is reported is the norm before clipping


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    parts = tiny_run(count=2, epochs=1, reconstruction_weight=float("nan"))
    before = flat(parts.plain_student)
    with pytest.raises(InputError, match="not finite at mini-batch 2; lower the learning rate"):
        parts.trainer.run()
    after = flat(parts.plain_student)
    assert all(np.array_equal(value, after[name]) for name, value in before.items())


@pytest.fixture
def _meta_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device ``meta`` has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def nothing_waits(**changes: Any) -> int:
    """A whole step, views to teacher, on a device that holds no numbers: whatever looks at one there fails."""
    parts = tiny_run(count=4, epochs=1, accumulation_steps=2, log_interval=99, run_on="meta", **changes)
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda e: e.terminate())
    parts.trainer.run()
    return parts.trainer.state.iteration


@pytest.mark.usefixtures("_meta_autocast")
@pytest.mark.parametrize("targets", [CentredTargets, SinkhornTargets])
def test_nothing_waits_for_the_device_between_two_readings(targets: Any) -> None:
    terms = {
        "global_loss": GlobalAlignmentLoss(targets(PROTOTYPES)),
        "patch_loss": PatchAlignmentLoss(targets(PROTOTYPES)),
        "koleo_loss": KoLeoLoss(HIDDEN, 8),
    }
    assert nothing_waits(**terms) == 3
    assert nothing_waits(**{**terms, "koleo_loss": None}, views_together=False) == 3


@pytest.mark.usefixtures("_meta_autocast")
def test_nothing_waits_where_tokens_of_air_take_no_part() -> None:
    class HalfAir:
        def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
            return {**item, "image": item["image"] * (torch.arange(14) < 4)}

    views = tiny_views(air=AirTokens(PATCH))
    assert nothing_waits(views=views, transform=Compose([HalfAir()])) == 3


@pytest.mark.usefixtures("_meta_autocast")
def test_the_device_without_numbers_refuses_to_be_waited_for() -> None:
    """Each of these would make a GPU wait; the test above could not fail otherwise."""
    waits: list[Callable[[torch.Tensor], Any]] = [
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ]
    for wait in waits:
        parts = tiny_run(count=2, epochs=1, log_interval=99, run_on="meta")
        inner = parts.loss.reconstruction_loss.forward
        parts.loss.reconstruction_loss.forward = lambda a, *rest, i=inner, w=wait: (w(a), i(a, *rest))[1]
        with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
            parts.trainer.run()


def test_numbers_are_read_at_intervals_and_at_the_end_of_an_epoch() -> None:
    """Seven mini-batches, every three: the same numbers as when each is read by itself."""
    each, some = (tiny_run(count=7, epochs=1, log_interval=interval) for interval in (1, 3))
    found: dict[int, list[Any]] = {1: [], 3: []}
    sizes: list[int] = []
    for interval, parts in ((1, each), (3, some)):

        def remember(engine: Any, interval: int = interval) -> None:
            found[interval] += [dict(numbers) for numbers in engine.state.numbers]
            found[interval] += engine.state.summaries
            if interval == 3:
                sizes.append(len(engine.state.numbers))

        parts.trainer.add_event_handler(ReadOut.NUMBERS_READ, remember)
        parts.trainer.run()
    assert sizes == [3, 3, 1]
    numbers = {interval: [x for x in own if isinstance(x, dict)] for interval, own in found.items()}
    assert len(numbers[1]) == len(numbers[3]) == 7
    for mine, theirs in zip(numbers[1], numbers[3], strict=True):
        assert all(isinstance(value, (int, float)) for value in theirs.values())
        assert {**mine, "volumes_per_second": 0} == {**theirs, "volumes_per_second": 0}
    rows = {interval: [x for x in own if isinstance(x, torch.Tensor)] for interval, own in found.items()}
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(rows[1], rows[3], strict=True))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers() -> None:
    outputs = {}
    for compiled in (False, True):
        parts = tiny_run(count=2, epochs=1, compile_blocks=compiled)
        names = list(parts.plain_student.state_dict())
        parts.trainer.run()
        assert list(parts.plain_student.state_dict()) == names
        outputs[compiled] = parts.trainer.state.output[0]
    assert outputs[True]["loss"] == pytest.approx(outputs[False]["loss"], rel=1e-4)
    assert outputs[True]["gradient_norm"] == pytest.approx(outputs[False]["gradient_norm"], rel=1e-3)


def test_two_runs_are_bit_identical() -> None:
    first, second, other = tiny_run(), tiny_run(), tiny_run(seed=1)
    first.trainer.run()
    torch.manual_seed(77)  # nothing may hang on the global generator
    second.trainer.run()
    other.trainer.run()
    for module in ("plain_student", "teacher", "loss"):
        assert_equal_states(getattr(first, module).state_dict(), getattr(second, module).state_dict())
    assert not np.array_equal(flat(first.teacher)["network.norm.bias"], flat(other.teacher)["network.norm.bias"])


def test_samples_and_keys_reach_the_views() -> None:
    parts = tiny_run(count=5, epochs=2, batch_size=2, accumulation_steps=1)
    seen: list[int] = []
    inner = parts.trainer.views
    parts.trainer.views = lambda image, plan: (seen.extend(plan.seed.tolist()), inner(image, plan))[1]
    parts.trainer.run()
    keys = [(epoch, int(index)) for epoch in (1, 2) for index in parts.sampler.order(epoch)]
    assert seen == [derived_seed(0, "views", *key) for key in keys]


def test_workers_change_nothing() -> None:
    """Persistent workers fetch ahead; they must still begin every epoch with its own order."""
    transform = Compose([RandGaussianNoised("image", prob=1.0, std=0.02)])
    alone, helped = (tiny_run(count=4, transform=transform, num_workers=workers) for workers in (0, 2))
    alone.trainer.run()
    helped.trainer.run()
    expected = flat(alone.plain_student)
    assert all(np.array_equal(value, expected[name]) for name, value in flat(helped.plain_student).items())


def test_koleo_is_added_with_its_weight() -> None:
    outputs: list[dict[str, float]] = []
    parts = tiny_run(count=3, epochs=1, koleo_loss=KoLeoLoss(32, 8), koleo_weight=0.25, reconstruction_weight=3.0)
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.extend(e.state.output))
    parts.trainer.run()
    for output in outputs:
        terms = output["loss_global"] + output["loss_patch"] + 3 * output["loss_reconstruction"]
        assert output["loss"] == pytest.approx(terms + 0.25 * output["loss_koleo"], rel=1e-5)
    assert outputs[0]["loss_koleo"] == 0.0  # no neighbour yet
    assert outputs[1]["loss_koleo"] != 0.0
    assert int(parts.loss.koleo_loss.filled) == 6


def test_mixed_precision_on_the_cpu_is_close_to_single_precision() -> None:
    losses, dtypes = {}, {}
    for amp in (False, True):
        parts = tiny_run(count=1, epochs=1, accumulation_steps=1, amp=amp)
        seen: list[torch.dtype] = []
        parts.plain_student.network.blocks[0].mlp.linear1.register_forward_hook(
            lambda module, args, result, seen=seen: seen.append(result.dtype)
        )
        parts.trainer.run()
        losses[amp], dtypes[amp] = parts.trainer.state.output[0]["loss"], seen[0]
        assert all(p.dtype == torch.float32 for p in parts.plain_student.parameters())
    assert dtypes == {False: torch.float32, True: torch.bfloat16}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.parametrize("first", [0.04, 0.0])
def test_weight_decay_follows_its_schedule(first: float) -> None:
    seen: list[tuple[float, ...]] = []
    student = tiny_student()
    optimizer = torch.optim.AdamW(parameter_groups(student, first), lr=0.0)
    parts = tiny_run(
        count=4, epochs=2, weight_decay=CosineSchedule(first, 0.4, 4), student=student, optimizer=optimizer
    )
    inner = parts.optimizer.step
    parts.optimizer.step = lambda: (
        seen.append(tuple(group["weight_decay"] for group in parts.optimizer.param_groups)),
        inner(),
    )
    parts.trainer.run()
    expected = [0.4 - (0.4 - first) * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(4)]
    assert [decay for decay, _ in seen] == pytest.approx(expected)
    assert {exempt for _, exempt in seen} == {0.0}


def test_summaries_are_of_one_view_of_each_volume() -> None:
    """What the monitor's rank is taken over: two views of a volume would count twice."""
    parts = tiny_run(count=4, epochs=1, batch_size=2, accumulation_steps=1)
    seen: list[torch.Tensor] = []
    inner = parts.teacher.forward
    parts.teacher.forward = lambda crops, *places: (seen.append(inner(crops).summary), inner(crops, *places))[1]
    summaries: list[torch.Tensor] = []
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: summaries.extend(e.state.summaries))
    parts.trainer.run()
    assert [tuple(rows.shape) for rows in summaries] == [(2, 32), (2, 32)]
    assert all(torch.equal(rows, both[:2]) for rows, both in zip(summaries, seen, strict=True))


def test_waiting_for_data_counts_in_the_throughput() -> None:
    class Slow:
        def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
            time.sleep(0.25)
            return item

    rates: list[float] = []
    parts = tiny_run(count=2, epochs=1, transform=Compose([Slow()]))
    parts.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: rates.append(e.state.output[0]["volumes_per_second"])
    )
    parts.trainer.run()
    assert len(rates) == 2
    assert all(0 < rate < 4 for rate in rates)


def test_no_local_crops() -> None:
    parts = tiny_run(count=2, epochs=1, views=tiny_views(num_local=0))
    parts.trainer.run()
    assert math.isfinite(parts.trainer.state.output[0]["loss"])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"no TeacherEMAHandler .* add it to train#handlers"):
        tiny_run(train_handlers=[])
    with pytest.raises(InputError, match="accumulation_steps 0 is not a positive number"):
        tiny_run(accumulation_steps=0)
    with pytest.raises(InputError, match="log_interval 0 is not a positive number"):
        tiny_run(log_interval=0)
    with pytest.raises(InputError, match="amp_dtype float16: its gradients would need scaling"):
        tiny_run(amp=True, amp_dtype=torch.float16)
    with pytest.raises(InputError, match=r"local_size: image size \(8, 8, 6\) cannot be cut"):
        tiny_run(views=tiny_views(local_geometry=CropGeometry((8, 8, 6))))
    with pytest.raises(InputError, match="set a smaller mask_cell"):
        tiny_run(views=tiny_views(mask=GroupMask(cell=8)))
