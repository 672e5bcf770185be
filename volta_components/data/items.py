# SPDX-License-Identifier: Apache-2.0
"""Items of a datalist as one string of bytes, so that a training needs little memory for a large data set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

PATHS = ("image", "label")


class PackedItems(Sequence[dict[str, Any]]):
    """A read-only list of items, each kept as JSON; one is unpacked when it is asked for.

    As dictionaries, the items of 100,000 volumes take 0.3 GB. What is worse, a loader's worker that looks at an object
    of Python's gets a copy of the memory around it; bytes stay shared. PyTorch and MONAI have nothing for it.

    Args:
        items: what to keep, in this order: anything that JSON can hold, or its JSON as bytes.
    """

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._root: Path | None = None
        packed = [item if isinstance(item, bytes) else pack(item) for item in items]
        self._ends = np.cumsum([len(item) for item in packed], dtype=np.int64)
        self._data = b"".join(packed)
        self._rows = np.arange(len(packed), dtype=np.int64)

    def take(self, rows: Iterable[int] | np.ndarray) -> PackedItems:
        """The items at these places, in this order; nothing is copied."""
        other = PackedItems()
        other._root, other._ends, other._data = self._root, self._ends, self._data
        other._rows = self._rows[np.asarray(rows, dtype=np.int64)]
        return other

    def below(self, root: Path) -> PackedItems:
        """The same items, their paths below a folder."""
        other = self.take(range(len(self)))
        other._root = root
        return other

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> PackedItems: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | PackedItems:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = self._rows[index]
        item: dict[str, Any] = json.loads(self._data[self._ends[row - 1] if row else 0 : self._ends[row]])
        if self._root is not None:
            item.update({key: str(self._root / item[key]) for key in PATHS if key in item})
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def pack(item: Any) -> bytes:
    """JSON of an item; parts of it may be packed already."""
    return json.dumps(item, separators=(",", ":"), default=json.loads).encode()


def packed_if_item(found: dict[str, Any]) -> Any:
    """For ``json.loads``: an item is packed as soon as it is read, so that never all of them are dictionaries."""
    return pack(found) if "image" in found and "patient_id" in found else found
