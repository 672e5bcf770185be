# SPDX-License-Identifier: Apache-2.0
"""Order and randomness of the samples, as functions of seed, epoch and sample alone."""

from __future__ import annotations

import atexit
import hashlib
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader
from monai.transforms import Randomizable
from torch.utils.data import Dataset, Sampler

from volta_components.data.checks import check_contents
from volta_components.distributed import process_count, process_rank
from volta_components.errors import InputError


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part, and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class ResumableSampler(Sampler[tuple[int, ...]]):
    """Shuffled ``(epoch, index)`` pairs that can start anywhere in an epoch.

    PyTorch's samplers draw from a global generator and always start an epoch at its first sample, so a run could not
    resume in the middle of one. Here the order of an epoch follows from seed and epoch, and ``set_position`` sets the
    first mini-batch. Over processes, the samples of one global mini-batch are adjacent in the order, so that two
    processes with batch 1 see what one with batch 2 sees. When the samples do not fill the last global mini-batch, the
    order's first samples are used again.

    Args:
        num_samples: size of the data set.
        seed: base seed.
        batch_size: samples of one process in one mini-batch.
        num_replicas: processes; by default those that train together.
        rank: this process; by default its own.
        weights: chances of the samples; with them, samples are drawn with replacement, and how often one was drawn
            before in its epoch is the third number of its key, so that its views differ.
        shuffle: false keeps the order of the data set.

    Raises:
        InputError: if there are fewer samples than processes, or weights do not fit.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        batch_size: int = 1,
        num_replicas: int | None = None,
        rank: int | None = None,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ) -> None:
        num_replicas = process_count() if num_replicas is None else num_replicas
        if 0 < num_samples < num_replicas:
            raise InputError(
                f"{num_samples} volumes cannot be shared by {num_replicas} processes; start fewer processes"
            )
        if weights is not None and (len(weights) != num_samples or min(weights) < 0 or sum(weights) <= 0):
            raise InputError(f"sampling weights must be {num_samples} non-negative numbers, not all 0")
        self.num_samples = num_samples
        self.seed = seed
        self.batch_size = batch_size
        self.num_replicas = num_replicas
        self.rank = process_rank() if rank is None else rank
        self.weights = None if weights is None else np.asarray(weights, dtype=float) / float(sum(weights))
        self.shuffle = shuffle
        self.epoch = 1
        self.first_iteration = 0

    @property
    def iterations(self) -> int:
        """Mini-batches of one epoch in each process."""
        return -(-self.num_samples // (self.batch_size * self.num_replicas))

    def __len__(self) -> int:
        return self.num_samples if self.num_replicas == 1 else self.iterations * self.batch_size

    def set_position(self, epoch: int, iteration: int = 0) -> None:
        """Set the epoch (counted from 1) and its first mini-batch (counted from 0)."""
        self.epoch = epoch
        self.first_iteration = iteration

    def order(self, epoch: int) -> np.ndarray:
        """Indices of one epoch, over all processes."""
        rng = np.random.default_rng(derived_seed(self.seed, "order", epoch))
        if self.weights is not None:
            return rng.choice(self.num_samples, size=self.num_samples, p=self.weights)
        return rng.permutation(self.num_samples) if self.shuffle else np.arange(self.num_samples)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = self.order(self.epoch)
        step = self.batch_size * self.num_replicas
        if self.num_replicas > 1:
            order = np.resize(order, self.iterations * step)
        repeats = None if self.weights is None else _repeats(order)
        for iteration in range(self.first_iteration, self.iterations):
            start = iteration * step + self.rank * self.batch_size
            for place in range(start, min(start + self.batch_size, len(order))):
                key = (self.epoch, int(order[place]))
                yield key if repeats is None else (*key, int(repeats[place]))


def _repeats(order: np.ndarray) -> np.ndarray:
    """How often each element of ``[n]`` integers stands before itself."""
    by_value = np.argsort(order, kind="stable")
    ordered = order[by_value]
    repeats = np.empty_like(order)
    repeats[by_value] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return repeats


WORKER_GRACE = 30  # seconds; as long as SLURM waits between SIGTERM and SIGKILL


def signals_wait(worker_id: int) -> None:
    """A ``worker_init_fn``: workers that get a signal keep loading until the trainer's window is finished.

    A terminal's Ctrl-C and a scheduler's SIGTERM reach every process of a job. Without this the workers would end at
    once, and the trainer with an error. The trainer itself ends a worker by SIGTERM and waits for it. So a first
    SIGTERM ends a worker after ``WORKER_GRACE`` seconds, a second one at once. It replaces MONAI's ``worker_init_fn``,
    which seeds random transforms: ``KeyedDataset`` does that for each sample.
    """

    def terminate(number: int, _: Any) -> None:
        if signal.alarm(WORKER_GRACE):
            os._exit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


class KeyedDataset(Dataset[Any]):
    """A data set whose random transforms depend on seed, epoch and sample, not on workers, processes or restarts.

    MONAI's data sets seed random transforms once for each worker, so a sample depends on the samples that the worker
    had before. This one takes the keys of ``ResumableSampler``: epoch, index and, with weights, how often the sample
    was drawn before in the epoch.

    Before an image is first read, it is compared with its hash, if it has one. All workers know which ones were.

    Args:
        data: items, such as those of a datalist.
        transform: applied to a shallow copy of an item; random ones are reseeded for each sample.
        seed: base seed.

    Attributes:
        device: where items are.

    Raises:
        InputError: at an item whose image is not what was prepared; see ``check_contents``.
    """

    device = torch.device("cpu")

    def __init__(
        self, data: Sequence[Mapping[str, Any]], transform: Callable[[Any], Any] | None = None, seed: int = 0
    ) -> None:
        self.data = data
        self.transform = transform
        self.seed = seed
        self._is_checked = torch.zeros(len(data), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    def fill(self, indices: Iterable[int] | None = None) -> None:
        """Prepare items before a loader's workers are forked off; there is nothing to prepare here."""

    def item(self, epoch: int, index: int, *repeat: int) -> Mapping[str, Any]:
        """A sample before its transform, without its key; here it is the same in every epoch, and checked once."""
        return self.checked(index)

    def checked(self, index: int) -> Mapping[str, Any]:
        """An item as it is listed, once its file has been checked."""
        item = self.data[index]
        if item.get("sha256") and not self._is_checked[index]:
            check_contents(item)
            self._is_checked[index] = True
        return item

    def __getitem__(self, key: tuple[int, ...] | int) -> Any:
        epoch, index, *repeat = (0, key) if isinstance(key, int) else key
        item: Any = {**self.item(epoch, index, *repeat), "key": torch.tensor([epoch, index, *repeat])}
        if isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=derived_seed(self.seed, "transform", epoch, index, *repeat) % 2**32)
        return self.transformed(item)

    def transformed(self, item: Any) -> Any:
        """A sample after its transform."""
        return item if self.transform is None else self.transform(item)


class KeyedDataLoader(DataLoader):
    """MONAI's ``DataLoader`` for a ``KeyedDataset``, in this process and in those that it trains with.

    When an epoch begins, a data set that keeps its items in memory is filled before the workers are forked off: what
    workers keep dies with them. A run that turns out to be finished has no epoch and reads nothing.

    Args:
        dataset: a ``KeyedDataset``, or another with ``seed``, which decides the order, and ``fill``.
        batch_size: samples of this process in one mini-batch.
        shuffle: whether to train: the order is drawn by a ``ResumableSampler``, workers live as long as the loader and
            wait when they are signalled (``signals_wait``). Otherwise this process goes through its share in order.
        num_workers: processes that load.
        weights: chances of the samples, see ``ResumableSampler``.

    Raises:
        InputError: if there are workers, and items are on a device that they cannot share with this process.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        num_workers: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        on_host = getattr(dataset, "device", KeyedDataset.device).type == "cpu"
        if num_workers and not on_host:
            raise InputError(
                f"items are made on {dataset.device}, which worker processes cannot share: give --num_workers 0"
            )
        options: dict[str, Any] = {"sampler": range(process_rank(), len(dataset), process_count())}
        if shuffle:
            options = {
                "sampler": ResumableSampler(len(dataset), dataset.seed, batch_size, weights=weights),
                "pin_memory": torch.cuda.is_available() and on_host,
                "persistent_workers": num_workers > 0,
                "worker_init_fn": signals_wait,
            }
        super().__init__(dataset, batch_size=batch_size, num_workers=num_workers, **options)
        if shuffle and num_workers:
            atexit.register(_end_workers, weakref.ref(self))

    def __iter__(self) -> Any:
        dataset: Any = self.dataset
        dataset.fill(self.sampler if isinstance(self.sampler, range) else None)
        return super().__iter__()


def _end_workers(reference: weakref.ReferenceType[KeyedDataLoader]) -> None:
    """End a loader's workers in time; otherwise Python sends them SIGTERM at exit and waits for their grace to end."""
    loader = reference()
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
