# SPDX-License-Identifier: Apache-2.0
"""The EMA handler: the teacher follows the student (paper, section II-B, knowledge distillation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from volta_components.distributed import unwrapped


class TeacherEMAHandler:
    """Moves the teacher towards the student at every mini-batch, by an exponential moving average (EMA).

    ``teacher = m * teacher + (1 - m) * student`` for every parameter of the teacher, with the momentum ``m`` of the
    mini-batch. Buffers stay as they are: neither network has any.

    It runs at ``IterationEvents.MODEL_COMPLETED``, which the trainer fires after the optimiser's step. Handlers of
    ``ITERATION_COMPLETED`` (record, collapse monitor, checkpoint) therefore see the new teacher, wherever this one
    is in the list of handlers. It adds ``teacher_momentum`` to the trainer's numbers. It has no state of its own:
    the momentum follows from the mini-batch, and the teacher is saved as a module.

    Ignite's ``EMAHandler`` cannot do this job. It makes the teacher itself, as a copy of the whole student, and pairs
    parameters by position, so that a teacher without decoder is not possible. Its momentum is a constant after a linear
    warm-up; a cosine needs a second handler, whose counter has to be saved as well. And it multiplies by ``m`` and
    ``1 - m``, which float32 rounds separately: when ``m`` is near 1, they no longer sum to 1, and the teacher of a
    student that stands still moves.

    Args:
        teacher: follows; its parameters are changed in place.
        student: is followed; with or without its ``DistributedDataParallel`` wrapper. It may have more parameters than
            the teacher, such as those of a decoder.
        momentum: ``m`` of a mini-batch, counted from 0, in [0, 1].

    Raises:
        ValueError: if the teacher has a parameter that the student lacks, or that has another shape there.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, momentum: Callable[[int], float]) -> None:
        theirs = dict(unwrapped(student).named_parameters())
        mine = dict(teacher.named_parameters())
        strangers = [name for name, p in mine.items() if name not in theirs or theirs[name].shape != p.shape]
        if strangers:
            raise ValueError(f"the teacher's parameters {', '.join(strangers)} have no counterpart in the student")
        self.momentum = momentum
        self._teacher: list[Tensor] = list(mine.values())
        self._student: list[Tensor] = [theirs[name] for name in mine]

    def attach(self, engine: Engine) -> None:
        """Follow after every mini-batch."""
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._model_completed)

    def _model_completed(self, engine: Any) -> None:
        momentum = self.momentum(engine.state.iteration - 1)
        self.update(momentum)
        engine.state.output[0]["teacher_momentum"] = momentum

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Take one step towards the student; a momentum of 1 leaves the teacher as it is, 0 makes it equal."""
        torch._foreach_lerp_(self._teacher, self._student, 1.0 - momentum)
