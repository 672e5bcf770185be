# SPDX-License-Identifier: Apache-2.0
"""Schedules at their first, last and boundary steps."""

from __future__ import annotations

import math

import pytest

from volta_components.errors import InputError
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
