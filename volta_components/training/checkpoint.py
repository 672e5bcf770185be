# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from which a training resumes bit by bit."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.nn.parallel import DistributedDataParallel

from volta_components.distributed import mean_over_processes, process_count, process_rank
from volta_components.errors import InputError
from volta_components.files import atomic_path, remove_partials
from volta_components.training.record import other_settings, plain_settings

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"


def has_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a run that has been saved lies in a folder."""
    return (Path(folder) / CHECKPOINT).exists()


class ResumableCheckpoint:
    """Saves a run so that the same command, started again, resumes it bit for bit.

    MONAI's ``CheckpointSaver`` writes in place, so a run that is killed while saving loses its only checkpoint.
    Ignite's ``Checkpoint`` with ``DiskSaver(atomic=True)`` renames, but removes the older file before it writes the new
    one, and never removes the temporary file of a killed run. Neither knows accumulation windows, compares settings, or
    loads by itself. This handler writes beside and renames, saves only where no gradient is pending, and refuses a
    checkpoint of a run with other settings. Loading is ``weights_only``. The trainer's gradient scaler, which MONAI
    makes when the run starts, is saved as well.

    With an ``interval``, Ctrl-C and a scheduler's SIGTERM lose nothing: the accumulation window is finished and saved
    before the run ends. A second Ctrl-C ends it at once. The loader's workers receive these signals too and must wait:
    see ``volta_components.training.sampling.signals_wait``.

    Args:
        path: the checkpoint file; with None, nothing is saved or loaded.
        objects: what to save, by name: anything with ``state_dict`` and ``load_state_dict``.
        settings: the run's settings by name; they must be the same when it is resumed.
        interval: mini-batches between two checkpoints; a multiple of the accumulation window. 0: ends of epochs only.
        window: mini-batches of an accumulation window.
        handlers: more to save, which is attached as well, before this handler.
        minutes: least time between two checkpoints at ends of epochs; 0: at the end of every epoch. The last epoch
            always has one, because scoring follows it.

    Raises:
        InputError: if the interval is not a multiple of the window, or at the start of a run when the checkpoint
            belongs to other settings or cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        objects: Mapping[str, Any],
        settings: Mapping[str, Any],
        interval: int = 0,
        window: int = 1,
        handlers: Mapping[str, Any] | None = None,
        minutes: float = 0.0,
    ) -> None:
        if interval % window:
            raise InputError(
                f"checkpoint interval {interval} is not a multiple of the {window} accumulated mini-batches"
            )
        self.path = None if path is None else Path(path)
        self.handlers = {name: handler for name, handler in (handlers or {}).items() if handler is not None}
        self.objects = {
            name: item.module if isinstance(item, DistributedDataParallel) else item
            for name, item in {**objects, **self.handlers}.items()
        }
        self.settings = plain_settings(dict(settings))
        self.interval = interval
        self.window = window
        self.minutes = minutes
        self._last_save = time.monotonic()
        self._signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Load at the start; save at intervals and at ends of epochs."""
        for handler in self.handlers.values():
            handler.attach(engine)
        if self.path is None:
            return
        engine.add_event_handler(Events.STARTED, self.load)
        if self.interval:
            engine.add_event_handler(Events.STARTED, self._listen)
            engine.add_event_handler(Events.COMPLETED, self._restore_signals)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._interval_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _listen(self) -> None:
        self._signal = None
        if threading.current_thread() is not threading.main_thread():
            return

        def ask(number: int, _: Any) -> None:
            # torchrun passes a terminal's Ctrl-C on to processes that have had it already.
            if number == signal.SIGINT and process_count() == 1:
                signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            if self._signal is None and not process_rank():
                print("\nstopping once the accumulation window is finished and saved", file=sys.stderr, flush=True)
            self._signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell does for what it starts in the background
                self._before[number] = signal.signal(number, ask)

    def _restore_signals(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _is_asked_to_stop(self, engine: Any) -> bool:
        """Whether any process was: they must stop together, or some would wait for the others."""
        asked = torch.tensor(float(self._signal is not None), device=engine.state.device)
        return bool(mean_over_processes(asked) > 0)

    def _stop(self, engine: Engine) -> None:
        self._restore_signals()
        message = f"saved at mini-batch {engine.state.iteration}; the same command resumes there"
        if self._signal == signal.SIGTERM:
            print(message, file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(message)

    def _interval_completed(self, engine: Engine) -> None:
        length = engine.state.epoch_length
        place = engine.state.iteration % length if length else 0
        # The end of an epoch has its own checkpoint, after what other handlers do there.
        if not place or place % self.window:
            return
        stop = self._is_asked_to_stop(engine)
        if stop or place % self.interval == 0:
            self.save(engine)
        if stop:
            self._stop(engine)

    def _epoch_completed(self, engine: Engine) -> None:
        waited = time.monotonic() - self._last_save
        if waited >= 60 * self.minutes or engine.state.epoch == engine.state.max_epochs:
            self.save(engine)
        if self.interval and engine.state.epoch != engine.state.max_epochs and self._is_asked_to_stop(engine):
            self._stop(engine)

    def save(self, engine: Engine) -> None:
        """Write the checkpoint, atomically, from the first process."""
        if process_rank() or self.path is None:
            return
        state = {name: item.state_dict() for name, item in self.objects.items()}
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        state["engine"] = {
            "iteration": engine.state.iteration,
            "epoch_length": engine.state.epoch_length,
            "max_epochs": engine.state.max_epochs,
        }
        state["settings"] = self.settings
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)
        self._last_save = time.monotonic()

    def load(self, engine: Engine) -> None:
        """Restore a run if there is a checkpoint; remove half-written files of killed runs."""
        assert self.path is not None
        self._last_save = time.monotonic()
        if not process_rank():
            remove_partials(self.path.parent)
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, progress = state["settings"], state["engine"]
        except Exception as error:
            raise InputError(
                f"{self.path}: not a checkpoint of this project ({type(error).__name__}); remove it to start again"
            ) from error
        rows = other_settings(settings, self.settings)
        if rows:
            raise InputError.many(
                f"{self.path} belongs to a run with other settings (name, there, here)",
                rows,
                "Choose another run_name (--run_name NAME), or remove the checkpoint to start again.",
            )
        for name, item in self.objects.items():
            item.load_state_dict(state[name])
        if state.get("scaler"):
            engine.scaler.load_state_dict(state["scaler"])  # type: ignore[attr-defined]
        engine.load_state_dict(progress)
        logger.info("resumed %s at mini-batch %d", self.path, engine.state.iteration)
