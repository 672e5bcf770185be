# SPDX-License-Identifier: Apache-2.0
"""Keeps the model of the best epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import distributed as dist
from torch import nn

from volta_components.distributed import process_count, process_rank
from volta_components.errors import InputError
from volta_components.files import atomic_path
from volta_components.training.archive import DamagedArchiveError, read_archive, write_archive


@dataclass(eq=False)
class KeepBest:
    """Keeps the weights of the epoch with the highest value of an evaluator's metric.

    A run that is killed, even while saving, must find the weights that its checkpoint names. MONAI's
    ``CheckpointSaver`` with ``save_key_metric`` writes in place and forgets the best value. Ignite's ``Checkpoint``
    with ``DiskSaver(atomic=True)`` removes the older best file before it writes the new one, although the last
    checkpoint still names the older. This handler removes a file only when neither of the last two checkpoints needs
    it, and all of them when the run is finished.

    Put it after ``FinishRun``.

    Attributes:
        evaluator: the evaluator. Its network's weights are kept, by its key metric; of several equal epochs the first
            counts.
        path: file of the weights; the epoch is added to its name.
        interval: epochs between two runs of the evaluator; 0 leaves them to a ``ValidationHandler``.
        report_as: also put the value into the trainer's metrics of that epoch, under this name.
    """

    evaluator: Any
    path: str | os.PathLike[str]
    interval: int = 0
    report_as: str | None = None

    def __post_init__(self) -> None:
        self.network: nn.Module = self.evaluator.network
        self.epoch = 0
        self.value = -math.inf
        self._in_checkpoint: int | None = None
        self._in_previous: int | None = None

    def attach(self, engine: Engine) -> None:
        """Look at every epoch's end."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and value of the best, for a checkpoint: two more calls, and what this one names may be removed."""
        self._in_previous, self._in_checkpoint = self._in_checkpoint, self.epoch
        return {"epoch": self.epoch, "value": self.value, "before": self._in_previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.epoch, self.value = int(state["epoch"]), float(state["value"])
        self._in_checkpoint, self._in_previous = self.epoch, state.get("before")

    def _file(self, epoch: int | str) -> Path:
        """The weights of an epoch; ``*`` is a pattern for all of them."""
        path = Path(self.path)
        return path.with_name(f"{path.stem}-{epoch}{path.suffix}")

    def _epoch_started(self, engine: Engine) -> None:
        if self.report_as is not None:
            engine.state.metrics.pop(self.report_as, None)
        # Until a checkpoint names the new best epoch, a run that is killed resumes with the older one.
        self._remove(but=(self.epoch, self._in_checkpoint, self._in_previous))

    def _epoch_completed(self, engine: Engine) -> None:
        if self.interval and engine.state.epoch % self.interval == 0:
            self.evaluator.run(engine.state.epoch)
        state = self.evaluator.state
        if state.epoch != engine.state.epoch or state.key_metric_name not in state.metrics:
            return
        value = float(state.metrics[state.key_metric_name])
        if self.report_as is not None:
            engine.state.metrics[self.report_as] = value
        if value > self.value:
            self.epoch, self.value = engine.state.epoch, value
            if process_rank() == 0:
                with atomic_path(self._file(self.epoch)) as temporary:
                    write_archive(self.network.state_dict(), temporary)

    def _completed(self) -> None:
        self._remove()

    def _remove(self, but: Iterable[int | None] = ()) -> None:
        """Remove kept weights of all epochs but some."""
        if process_rank() == 0:
            kept = {self._file(epoch) for epoch in but if epoch is not None}
            for path in {*Path(self.path).parent.glob(self._file("*").name)} - kept:
                path.unlink(missing_ok=True)

    def restore(self) -> bool:
        """Put the best epoch's weights into the network; False if no epoch was evaluated.

        Raises:
            InputError: if their file is gone or damaged.
        """
        if self.epoch == 0:
            return False
        if process_count() > 1:
            dist.barrier()
        path = self._file(self.epoch)
        try:
            self.network.load_state_dict(read_archive(path))
        except (DamagedArchiveError, OSError) as error:
            remedy = f"remove {path.parent} to train again"
            raise InputError(f"{path}: the best epoch's weights cannot be used ({error}); {remedy}") from error
        return True
