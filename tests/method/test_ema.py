# SPDX-License-Identifier: Apache-2.0
"""The EMA handler against arithmetic in NumPy, and where it stands in a mini-batch."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from method_helpers import flat, tiny_run, tiny_student
from torch import nn

from volta_components.method.ema import TeacherEMAHandler
from volta_components.method.networks import make_teacher


def test_the_teacher_equals_numpy_over_a_run() -> None:
    """Every mini-batch counts, those without an optimiser step too; the student is the one after the step."""
    momenta = [0.9, 0.5, 0.8, 0.99, 0.7]
    asked: list[int] = []

    def momentum(iteration: int) -> float:
        asked.append(iteration)
        return momenta[iteration]

    start = make_teacher(tiny_student(7))
    parts = tiny_run(
        count=5, epochs=1, accumulation_steps=2, teacher=start, learning_rate=lambda _: 0.01, teacher_momentum=momentum
    )
    expected = {name: value.astype(np.float64) for name, value in flat(start).items()}
    students: list[dict[str, np.ndarray]] = []
    numbers: list[float] = []

    def remember(engine: Engine) -> None:
        students.append(flat(parts.plain_student))
        numbers.append(engine.state.output[0]["teacher_momentum"])

    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED, remember)
    parts.trainer.run()
    assert asked == [0, 1, 2, 3, 4]
    assert numbers == momenta
    moved = [
        not np.array_equal(a["network.norm.bias"], b["network.norm.bias"]) for a, b in itertools.pairwise(students)
    ]
    assert moved == [True, False, True, True]  # windows of 2, 2 and 1 mini-batches: steps after the 2nd, 4th and 5th
    for share, student in zip(momenta, students):
        expected = {name: share * value + (1 - share) * student[name] for name, value in expected.items()}
    for name, value in flat(parts.teacher).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, rtol=1e-5, err_msg=name)
    assert int(parts.loss.global_loss.targets.updates) == 5  # as the centres move


def test_the_teacher_after_n_updates_equals_the_closed_form() -> None:
    """t_n = (prod m) t_0 + sum_k (1 - m_k) (prod of later m) s_k, with momentum and student changing at each step."""
    student = tiny_student()
    teacher = make_teacher(student)
    handler = TeacherEMAHandler(teacher, student, lambda _: 1.0)
    start = {name: value.detach().double().clone() for name, value in teacher.named_parameters()}
    momenta = [0.9, 0.5, 0.996, 0.0, 0.99, 1.0, 0.7]
    students = []
    for momentum in momenta:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        students.append({name: value.detach().double().clone() for name, value in student.named_parameters()})
        handler.update(momentum)
    for name, value in teacher.named_parameters():
        expected = math.prod(momenta) * start[name]
        for k, momentum in enumerate(momenta):
            expected = expected + (1 - momentum) * math.prod(momenta[k + 1 :]) * students[k][name]
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)


def test_handlers_of_the_mini_batch_see_the_new_teacher_even_when_they_are_listed_before_it() -> None:
    """A checkpoint written before the teacher has moved would not resume bit for bit."""
    seen: list[dict[str, np.ndarray]] = []
    first = SimpleNamespace(
        attach=lambda engine: engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: seen.append(flat(e.teacher) | {"numbers": e.state.output[0].copy()})
        )
    )
    parts = tiny_run(
        count=1,
        epochs=1,
        accumulation_steps=1,
        learning_rate=lambda _: 0.01,
        teacher_momentum=lambda _: 0.5,
        handlers=[first],
    )
    before = flat(parts.teacher)
    parts.trainer.run()
    after = flat(parts.teacher)
    (now,) = seen
    assert now.pop("numbers")["teacher_momentum"] == 0.5
    assert not np.array_equal(after["network.norm.bias"], before["network.norm.bias"])
    assert all(np.array_equal(value, after[name]) for name, value in now.items())


def run_ignite(student: nn.Module, momentum: float, steps: int) -> nn.Module:
    handler = EMAHandler(student, momentum=1 - momentum)
    engine = Engine(lambda *_: None)
    handler.attach(engine)
    engine.run([0] * steps)
    return handler.ema_model


def run_ours(student: nn.Module, momentum: float, steps: int) -> nn.Module:
    teacher = copy.deepcopy(student)
    handler = TeacherEMAHandler(teacher, student, lambda _: momentum)
    for _ in range(steps):
        handler.update(momentum)
    return teacher


@pytest.mark.parametrize(("run", "stays"), [(run_ours, True), (run_ignite, False)])
def test_the_teacher_of_a_student_that_stands_still(run: Callable[..., nn.Module], stays: bool) -> None:
    """It stays to the bit; the second half is why Ignite's handler is not used, and fails once it could be."""
    student = nn.Linear(8, 8)
    teacher = run(student, 0.9999, 200)
    assert torch.equal(teacher.weight, student.weight) == stays


def test_the_student_may_be_wrapped_and_have_more_than_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    monkeypatch.setattr("volta_components.distributed.DistributedDataParallel", Wrapper)
    teacher, student = make_teacher(tiny_student(7)), tiny_student(0)
    assert len(list(student.parameters())) == len(list(teacher.parameters())) + 4  # the decoder's
    TeacherEMAHandler(teacher, Wrapper(student), lambda _: 0.0).update(0.0)
    theirs = dict(student.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.named_parameters())


def test_networks_that_do_not_fit_are_refused() -> None:
    small, large = nn.Linear(2, 3), nn.Linear(2, 4)
    with pytest.raises(ValueError, match="teacher's parameters weight, bias have no counterpart in the student"):
        TeacherEMAHandler(small, large, lambda _: 0.9)
    with pytest.raises(ValueError, match=r"parameters 0\.weight, 0\.bias have"):
        TeacherEMAHandler(nn.Sequential(small), small, lambda _: 0.9)
