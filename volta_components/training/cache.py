# SPDX-License-Identifier: Apache-2.0
"""Data set that keeps its prepared items in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
from monai.transforms import Compose
from monai.transforms.traits import RandomizableTrait

from volta_components.training.sampling import KeyedDataset


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
        self._compose = transform if isinstance(transform, Compose) else Compose(transform or [])
        super().__init__(data, self._compose, seed)
        first = self._compose.get_index_of_first(lambda t: isinstance(t, RandomizableTrait))
        self._first = len(self._compose.transforms) if first is None else int(first)
        self.cache = cache
        self._cache: dict[int, Any] = {}

    def fill(self, indices: Iterable[int] | None = None) -> None:
        """Fill the cache, all of it by default, with threads (cores, up to 8), before workers are started."""
        indices = range(len(self.data)) if indices is None else indices
        missing = [index for index in indices if index not in self._cache]
        if not self.cache or not missing:
            return
        with ThreadPoolExecutor(min(8, joblib.cpu_count())) as pool:
            self._cache.update(zip(missing, pool.map(self._deterministic, missing)))

    def _deterministic(self, index: int) -> dict[str, Any]:
        return self._compose(dict(self.checked(index)), end=self._first, threading=True)

    def item(self, epoch: int, index: int, *repeat: int) -> Mapping[str, Any]:
        """A sample before its first random transform, without its key; a copy of what is cached."""
        if index in self._cache:
            return copy.deepcopy(self._cache[index])
        item = self._deterministic(index)
        if self.cache:
            self._cache[index] = copy.deepcopy(item)
        return item

    def transformed(self, item: Any) -> Any:
        """A sample after the other transforms."""
        return self._compose(item, start=self._first)
