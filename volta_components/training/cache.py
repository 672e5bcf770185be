# SPDX-License-Identifier: Apache-2.0
"""Data set that keeps its prepared items in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import torch
from monai.transforms import Compose
from monai.transforms.traits import RandomizableTrait

from volta_components.training.sampling import KeyedDataset, derived_seed


class KeyedCacheDataset(KeyedDataset):
    """``KeyedDataset`` that applies the transforms before the first random one only once.

    MONAI's ``CacheDataset`` seeds random transforms once for each worker, and fills its cache when it is built, even if
    the run is finished already. This one is filled by ``KeyedDataLoader``, or item by item as it is used.

    Args:
        data: items.
        transform: a ``Compose``; the part before its first random transform is cached.
        seed: base seed.
        cache: whether to keep anything in memory.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        super().__init__(data, transform if isinstance(transform, Compose) else Compose(transform or []), seed)
        first = self._compose.get_index_of_first(lambda t: isinstance(t, RandomizableTrait))
        self._first = len(self._compose.transforms) if first is None else int(first)
        self.cache = cache
        self._cache: dict[int, Any] = {}

    @property
    def _compose(self) -> Compose:
        assert isinstance(self.transform, Compose)
        return self.transform

    def fill(self, indices: Iterable[int] | None = None, workers: int | None = None) -> None:
        """Fill the cache, all of it by default, with threads (cores, up to 8), before workers are started."""
        indices = range(len(self.data)) if indices is None else indices
        missing = [index for index in indices if index not in self._cache]
        if not self.cache or not missing:
            return
        with ThreadPoolExecutor(workers or min(8, joblib.cpu_count())) as pool:
            self._cache.update(zip(missing, pool.map(self._deterministic, missing)))

    def _deterministic(self, index: int) -> Any:
        return self._compose(dict(self.checked(index)), end=self._first, threading=True)

    def __getitem__(self, key: tuple[int, ...] | int) -> Any:
        epoch, index = (0, key) if isinstance(key, int) else key[:2]
        if index in self._cache:
            item = copy.deepcopy(self._cache[index])
        else:
            item = self._deterministic(index)
            if self.cache:
                self._cache[index] = copy.deepcopy(item)
        item["key"] = torch.tensor([epoch, index])
        self._compose.set_random_state(seed=derived_seed(self.seed, "transform", epoch, index) % 2**32)
        return self._compose(item, start=self._first)
