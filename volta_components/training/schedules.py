# SPDX-License-Identifier: Apache-2.0
"""Schedules as pure functions of a step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from volta_components.errors import InputError


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from 0, then a cosine from ``start`` to ``end``.

    With warm-up ``w`` and last step ``T - 1``: step ``t < w`` gives ``start * t / w``; a later one
    ``end + (start - end) * (1 + cos(pi * (t - w) / (T - 1 - w))) / 2``, so that the last step has ``end``.
    MONAI's ``WarmupCosineSchedule`` serves learning rates only, clips at the end value instead of reaching it, and
    keeps a counter that must be saved; this one also serves the teacher's momentum.

    Attributes:
        start: value after the warm-up.
        end: value at the last step.
        total_steps: steps of the whole run, ``T``.
        warmup_steps: steps of warm-up, ``w``.

    Raises:
        InputError: if the warm-up is longer than the run.
    """

    start: float
    end: float
    total_steps: int
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps > self.total_steps:
            raise InputError(
                f"a warm-up of {self.warmup_steps} steps in a run of {self.total_steps} never reaches {self.start:g}: "
                "choose fewer warmup_epochs or more epochs"
            )

    def __call__(self, step: int) -> float:
        """Value at ``step``, counted from 0; steps beyond the run have the end value."""
        if step < self.warmup_steps:
            return self.start * step / self.warmup_steps
        span = self.total_steps - 1 - self.warmup_steps
        share = min(1.0, (step - self.warmup_steps) / span) if span > 0 else 1.0
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * share)) / 2.0


@dataclass(frozen=True)
class LinearSchedule:
    """Linear from ``start`` to ``end`` over the first ``steps`` steps, then constant.

    Attributes:
        start: value at step 0.
        end: value from step ``steps`` on.
        steps: length of the ramp.
    """

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """Value at ``step``, counted from 0."""
        share = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        return self.start + (self.end - self.start) * share
