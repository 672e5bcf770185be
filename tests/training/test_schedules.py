# SPDX-License-Identifier: Apache-2.0
"""Schedules at their first, last and boundary steps, and the teacher's moving average in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from method_helpers import tiny_student

from volta_components.errors import InputError
from volta_components.method.networks import make_teacher
from volta_components.training.schedules import CosineSchedule, LinearSchedule


def test_learning_rate_of_the_paper() -> None:
    """300 epochs of 251 optimiser steps (2,002 volumes, windows of 8), 10 epochs of warm-up, 5e-4 to 1e-6."""
    per_epoch = math.ceil(2002 / 8)
    warm, total = 10 * per_epoch, 300 * per_epoch
    rate = CosineSchedule(5e-4, 1e-6, total, warm)
    assert rate(0) == 0.0
    assert rate(1) == pytest.approx(5e-4 / 2510, rel=1e-12)
    assert rate(warm // 2) == pytest.approx(2.5e-4, rel=1e-12)
    assert rate(warm - 1) == pytest.approx(5e-4 * 2509 / 2510, rel=1e-12)
    assert rate(warm) == pytest.approx(5e-4, rel=1e-12)
    assert rate(total - 1) == pytest.approx(1e-6, rel=1e-9)
    assert rate(total + 100) == pytest.approx(1e-6, rel=1e-9)
    # Halfway through the cosine: the mean of both ends.
    assert CosineSchedule(5e-4, 1e-6, 111, 10)(60) == pytest.approx((5e-4 + 1e-6) / 2, rel=1e-12)
    # A quarter of the way: (1 + cos 45 degrees) / 2.
    assert CosineSchedule(1.0, 0.0, 111, 10)(35) == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-12)


def test_teacher_momentum_rises_by_cosine() -> None:
    momentum = CosineSchedule(0.996, 1.0, 1001)
    assert momentum(0) == pytest.approx(0.996, abs=1e-15)
    assert momentum(250) == pytest.approx(1.0 - 0.004 * (1 + math.cos(math.pi / 4)) / 2, abs=1e-12)
    assert momentum(500) == pytest.approx(0.998, abs=1e-12)
    assert momentum(1000) == 1.0
    values = [momentum(step) for step in range(1001)]
    assert values == sorted(values)


def test_warm_up_may_start_above_zero() -> None:
    rate = CosineSchedule(1.0, 0.0, 20, 4, warmup_start=0.2)
    assert [rate(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_degenerate_lengths() -> None:
    assert CosineSchedule(3.0, 1.0, 1)(0) == 1.0
    assert CosineSchedule(3.0, 1.0, 5, 5)(4) == pytest.approx(2.4)  # nothing but warm-up
    with pytest.raises(InputError, match="warm-up of 10 steps in a run of 5 never reaches 3: choose fewer warmup_epo"):
        CosineSchedule(3.0, 1.0, 5, 10)
    assert LinearSchedule(0.04, 0.07, 0)(0) == 0.07


def test_teacher_temperature() -> None:
    temperature = LinearSchedule(0.04, 0.07, 30)
    assert temperature(0) == 0.04
    assert temperature(10) == pytest.approx(0.05, rel=1e-12)
    assert temperature(29) == pytest.approx(0.069, rel=1e-12)
    assert temperature(30) == pytest.approx(0.07, rel=1e-12)
    assert temperature(1000) == pytest.approx(0.07, rel=1e-12)


def test_teacher_after_n_updates_equals_the_closed_form() -> None:
    """t_n = (prod m) t_0 + sum_k (1 - m_k) (prod of later m) s_k, with momentum and student changing at each step."""
    student = tiny_student()
    teacher = make_teacher(student)
    start = {name: value.detach().double().clone() for name, value in teacher.named_parameters()}
    momenta = [0.9, 0.5, 0.996, 0.0, 0.99, 1.0, 0.7]
    students = []
    for momentum in momenta:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        students.append({name: value.detach().double().clone() for name, value in student.named_parameters()})
        teacher.update(student, momentum)
    for name, value in teacher.named_parameters():
        expected = math.prod(momenta) * start[name]
        for k, momentum in enumerate(momenta):
            expected = expected + (1 - momentum) * math.prod(momenta[k + 1 :]) * students[k][name]
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_new_teacher_is_the_student() -> None:
    student = tiny_student()
    teacher = make_teacher(student)
    other = tiny_student(seed=9)
    mine = dict(student.named_parameters())
    assert all(torch.equal(value, mine[name]) for name, value in teacher.named_parameters())
    teacher.copy_from(other)
    theirs = dict(other.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.named_parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(name.startswith("network.conv3d") for name in teacher.state_dict())
