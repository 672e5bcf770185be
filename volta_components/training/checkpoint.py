# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from which a training resumes; on a CPU, bit by bit."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.optim import Optimizer

from volta_components.distributed import mean_over_processes, process_count, process_rank, unwrapped
from volta_components.errors import InputError
from volta_components.files import FolderLock, atomic_path, free_bytes, keep_copy, remove_partials
from volta_components.training.archive import DamagedArchiveError, read_archive, write_archive
from volta_components.training.cost import code_versions, start_clock, time_and_memory
from volta_components.training.record import check_settings, plain_settings
from volta_components.training.stamps import check_stamps, make_stamps

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "_previous"  # added to the name of the checkpoint before the last


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the last is kept."""
    return path.with_stem(f"{path.stem}{PREVIOUS}")


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run that needs them no longer."""
    for path in (folder / CHECKPOINT, previous_checkpoint(folder / CHECKPOINT)):
        path.unlink(missing_ok=True)


class ResumableCheckpoint:
    """Saves a run so that the same command, started again, resumes it; on a CPU, bit for bit.

    On a GPU a resumed run has the same samples, masks and schedules as an unbroken one. Its weights differ by rounding,
    as those of any two runs there: attention's gradient is added up in another order in each (not measured).

    MONAI's ``CheckpointSaver`` writes in place, so a run that is killed while saving loses its only checkpoint.
    Ignite's ``Checkpoint`` with ``DiskSaver(atomic=True)`` renames, but removes the older file before it writes the new
    one, and never removes the temporary file of a killed run. Neither knows accumulation windows, compares settings, or
    loads by itself. This handler writes beside and renames, saves only where no gradient is pending, and refuses a
    checkpoint of a run with other settings. Loading is ``weights_only``, after comparing checksums. The trainer's
    gradient scaler, which MONAI makes when the run starts, is saved as well.

    The checkpoint before the last stays beside it; it is used, with a message, if the last one is damaged. Weights that
    are not finite are not saved. A lock keeps a second training out of the folder. Sizes and times of the files that
    are trained on are saved too: files that were exchanged before a resume are refused, see ``check_stamps``.

    It is written beside the training, from a copy in the host's memory, never two at a time: a run that is killed loses
    the last ``minutes`` and the seconds of writing. What numbers the trainer has not read from the device yet
    (``read_numbers``) are read first, so that a run that has diverged is not saved.

    With a ``window``, Ctrl-C and a scheduler's SIGTERM lose nothing: the accumulation window is finished and saved
    before the run ends; several processes agree on it when they next read their numbers (``log_interval``). A second
    Ctrl-C ends it at once. The loader's workers receive these signals too and must wait:
    see ``volta_components.training.sampling.signals_wait``.

    Args:
        path: the checkpoint file; with None, nothing is saved or loaded.
        objects: what to save, by name: anything with ``state_dict`` and ``load_state_dict``.
        settings: the run's settings by name; they must be the same when it is resumed.
        window: mini-batches of an accumulation window: a checkpoint may lie at the end of each. 0: ends of epochs only.
        handlers: more to save, which is attached as well, before this handler.
        minutes: least time between two checkpoints; 0: wherever one may lie. The end of the last epoch always has one,
            because scoring follows it.

    Raises:
        InputError: at the start of a run when another one is writing into the folder, its disk has no room for a
            checkpoint, the checkpoint belongs to other settings or no longer fits the volumes, or both checkpoints are
            damaged; and when weights that are not finite would be saved, or the folder is gone.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        objects: Mapping[str, Any],
        settings: Mapping[str, Any],
        window: int = 0,
        handlers: Mapping[str, Any] | None = None,
        minutes: float = 0.0,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.handlers = {name: handler for name, handler in (handlers or {}).items() if handler is not None}
        self.objects = {name: unwrapped(item) for name, item in {**objects, **self.handlers}.items()}
        self.settings = plain_settings(dict(settings))
        self.window = window
        self.minutes = minutes
        self._last_save = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._signal: int | None = None
        self._all_stop = False
        self._before: dict[signal.Signals, Any] = {}
        self._lock: FolderLock | None = None
        self._stamps = torch.empty(0, 2, dtype=torch.int64)
        self._last_is_whole = True

    def attach(self, engine: Engine) -> None:
        """Load at the start; save at ends of windows and of epochs."""
        for handler in self.handlers.values():
            handler.attach(engine)
        if self.path is None:
            return
        engine.add_event_handler(Events.STARTED, self.load)
        if self.window:
            engine.add_event_handler(Events.STARTED, self._listen)
            engine.add_event_handler(Events.COMPLETED, self._restore_signals)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _listen(self) -> None:
        self._signal, self._all_stop = None, False
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

    def _is_asked_to_stop(self, engine: Any, ask: bool) -> bool:
        """Whether any process was: they must stop together, or some would wait for the others.

        Several processes only know what they found when they were last told to ``ask``, which waits for the device.
        """
        if process_count() == 1:
            return self._signal is not None
        if ask:
            asked = torch.tensor(float(self._signal is not None), device=engine.state.device)
            self._all_stop = bool(mean_over_processes(asked) > 0)
        return self._all_stop

    def _stop(self, engine: Engine) -> None:
        self.finish()
        self._restore_signals()
        message = f"saved at mini-batch {engine.state.iteration}; the same command resumes there"
        if self._signal == signal.SIGTERM:
            print(message, file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(message)

    def _iteration_completed(self, engine: Any) -> None:
        length = engine.state.epoch_length
        place = engine.state.iteration % length if length else 0
        # The end of an epoch has its own checkpoint, after what other handlers do there.
        if not place:
            return
        # The trainer has just read its numbers: nothing more is waited for. A window may end elsewhere.
        stop = self._is_asked_to_stop(engine, ask=engine.state.iteration % getattr(engine, "log_interval", 1) == 0)
        if place % self.window == 0:
            self._save_if_due(engine, stop)

    def _epoch_completed(self, engine: Engine) -> None:
        if engine.state.epoch == engine.state.max_epochs:
            self.save(engine)
            self.finish()
        else:
            self._save_if_due(engine, bool(self.window) and self._is_asked_to_stop(engine, ask=True))

    def _save_if_due(self, engine: Engine, stop: bool) -> None:
        if stop or time.monotonic() - self._last_save >= 60 * self.minutes:
            self.save(engine)
        if stop:
            self._stop(engine)

    def _completed(self) -> None:
        self.finish()
        if self._lock is not None:
            self._lock.release()

    def save(self, engine: Engine) -> None:
        """Begin to write the checkpoint, atomically, from the first process; ``finish`` waits until it is there."""
        # In every process: one that was due for ever would read numbers at the end of each window.
        self._last_save = time.monotonic()
        if hasattr(engine, "read_numbers"):
            engine.read_numbers()
        if process_rank() or self.path is None:
            return
        if self._lock is not None and not self._lock.is_held():
            raise InputError(
                f"{self.path.parent}: the folder was removed or replaced while the run was writing into it; put it "
                "back, or start the same command again for a new run"
            )
        state = on_host({name: item.state_dict() for name, item in self.objects.items()})
        wrong = [name for name, value in tensors_of(state) if value.is_floating_point() and not value.isfinite().all()]
        if wrong:
            is_kept = f"{self.path} was written before and is kept"
            raise InputError(
                f"the training has diverged: {wrong[0]} is not finite at mini-batch {engine.state.iteration}; "
                f"{is_kept if self.path.exists() else 'no checkpoint was written before'}. Lower the learning rate"
            )
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        state["engine"] = {
            "iteration": engine.state.iteration,
            "epoch_length": engine.state.epoch_length,
            "max_epochs": engine.state.max_epochs,
        }
        state["settings"] = self.settings
        state["stamps"] = self._stamps
        state["cost"] = time_and_memory(engine)
        self.finish()
        self._writing = self._thread.submit(self._write, state)

    def _write(self, state: Mapping[str, Any]) -> None:
        assert self.path is not None
        with atomic_path(self.path) as temporary:
            write_archive(state, temporary)
            if self._last_is_whole and self.path.exists():
                keep_copy(self.path, previous_checkpoint(self.path))
        self._last_is_whole = True

    def finish(self) -> None:
        """Wait until the checkpoint is written, if one is being written; raise what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load(self, engine: Engine) -> None:
        """Take the folder's lock; restore a run if there is a checkpoint; remove half-written files of killed runs."""
        assert self.path is not None
        self._last_save = time.monotonic()
        start_clock(engine, {})
        if not process_rank():
            self._lock = FolderLock(self.path.with_name(".lock"))
            self._lock.take("another training is writing into this folder; wait for its end, or give --run_name NAME")
            remove_partials(*(path for path in (self.path.parent, *self.path.parent.iterdir()) if path.is_dir()))
        items = getattr(getattr(engine.state.dataloader, "dataset", None), "data", None) or ()
        self._stamps = make_stamps(items)
        if self.path.exists():
            self._restore(engine, items)
        if not process_rank() and engine.state.epoch != engine.state.max_epochs:
            self._check_space()

    def _restore(self, engine: Engine, items: Sequence[Any]) -> None:
        assert self.path is not None
        state = self._read()
        reason = f"{self.path} belongs to a run with other settings (name, there, here)"
        check_settings(state["settings"], self.settings, reason, "the checkpoint")
        check_stamps(self.path, items, state.get("stamps"), self._stamps)
        for name, item in self.objects.items():
            item.load_state_dict(state[name])
        if state.get("scaler"):
            engine.scaler.load_state_dict(state["scaler"])  # type: ignore[attr-defined]
        engine.load_state_dict(state["engine"])
        start_clock(engine, state.get("cost", {}))
        logger.info("resumed %s at mini-batch %d", self.path, engine.state.iteration)
        *earlier, now = code_versions(engine)
        if earlier:
            logger.warning(
                "%s was trained with code %s and resumes with %s; a run with only one of them may give different "
                "numbers",
                *(self.path, ", ".join(earlier), now),
            )

    def _check_space(self) -> None:
        """Before the long work: does a checkpoint fit, and do the three that there are while one is replaced?"""
        assert self.path is not None
        there = [path.stat().st_size for path in (self.path, previous_checkpoint(self.path)) if path.exists()]
        # Handlers are small, and ``KeepBest`` takes each request for its state as a checkpoint's.
        large = [item for name, item in self.objects.items() if name not in self.handlers]
        size = max([_bytes(large), *there])
        free = free_bytes(self.path.parent)
        facts = f"{self.path.parent}: {free / 1e6:,.0f} MB are free, and a checkpoint takes {size / 1e6:,.0f} MB"
        if free < size:
            raise InputError(f"{facts}; free space, or give another place (--output_dir DIR)")
        if free < (3 - len(there)) * size:
            logger.warning("%s; while one is replaced there are three", facts)

    def _read(self) -> dict[str, Any]:
        """The last checkpoint; if it is damaged, the one before."""
        assert self.path is not None
        rows = []
        for path in (self.path, previous_checkpoint(self.path)):
            if not path.exists():
                continue
            try:
                state = read_archive(path)
            except (DamagedArchiveError, OSError) as error:
                rows.append((str(path), str(error)))
                continue
            if not isinstance(state, dict) or not {"settings", "engine", *self.objects} <= state.keys():
                rows.append((str(path), "not a checkpoint of this project"))
                continue
            if rows:
                self._last_is_whole = False
                place = state["engine"]["iteration"]
                message = f"{self.path} cannot be used ({rows[0][1]}); {path.name} resumes at mini-batch {place}"
                logger.warning("%s", message)
            return state
        raise InputError.many(
            "no checkpoint of this run can be used", rows, "Remove what is listed to start the run again."
        )


def tensors_of(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in mappings and sequences within each other, by dotted name."""
    if isinstance(state, Tensor):
        yield name, state
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    for key, value in state.items() if isinstance(state, Mapping) else ():
        yield from tensors_of(value, f"{name}.{key}".lstrip("."))


def _bytes(objects: Iterable[Any]) -> int:
    """Of what is saved, about; an optimiser before its first step will hold two numbers a parameter, as Adam does."""
    total = 0
    for item in objects:
        total += sum(value.nbytes for _, value in tensors_of(item.state_dict()))
        if isinstance(item, Optimizer) and not item.state:
            total += 2 * sum(value.nbytes for _, value in tensors_of(item.param_groups))
    return total


def on_host(state: Any) -> Any:
    """A copy of a state in the host's memory: what is copied may change at once."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: on_host(item) for name, item in state.items()}
    return type(state)(map(on_host, state)) if isinstance(state, (list, tuple)) else state
