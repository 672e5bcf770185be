# SPDX-License-Identifier: Apache-2.0
"""Items of a datalist: their names, and all of them as one string of bytes, which takes little memory."""

from __future__ import annotations

import copy
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

PATHS = ("image", "label")
# Where an item has the hash of each; data sets of earlier versions have none of label maps.
HASH_OF = {"image": "sha256", "label": "label_sha256"}
_BLOCK = 64  # items that are compressed together: most of what they say is the same
_decode = json.JSONDecoder().decode


def item_name(item: Mapping[str, Any]) -> str:
    """Subject and session, as files are named."""
    return "_".join(str(item[key]) for key in ("subject_id", "session") if item.get(key))


@dataclass(slots=True)
class _Row:
    """What stands for a packed item until its list is complete."""

    number: int


class Packer:
    """Packs items: of each its values as JSON, compressed in blocks; keys are kept once for all that have the same."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.block_ends = array("q")
        # Of each item: its block, and where it ends there.
        self.blocks = array("i")
        self.ends = array("i")
        self._open = bytearray()
        self.kinds: dict[tuple[str, ...], int] = {}
        self._encode = json.JSONEncoder(separators=(",", ":"), default=self.plain).encode

    def add(self, item: Any) -> int:
        """Pack an item, or whatever stands in its place; give its number."""
        if isinstance(item, dict):
            values = [self.kinds.setdefault(tuple(item), len(self.kinds)), *item.values()]
        else:
            values = [-1, item]
        text = self._encode(values).encode()  # first: it may close a block
        self._open += text
        self.blocks.append(len(self.block_ends))
        self.ends.append(len(self._open))
        if len(self.ends) % _BLOCK == 0:
            self.close()
        return len(self.ends) - 1

    def close(self) -> None:
        """Compress the block that was begun, if one was."""
        if self._open:
            self.data += zlib.compress(self._open)
            self.block_ends.append(len(self.data))
            self._open = bytearray()

    def hook(self, found: dict[str, Any]) -> Any:
        """For ``json.loads``: an item is packed as soon as it is read, so that never all of them are dictionaries."""
        return _Row(self.add(found)) if "image" in found and "patient_id" in found else found

    def plain(self, found: Any) -> Any:
        """What a row stands for; anything else as it is."""
        return PackedItems([found], self)[0] if isinstance(found, _Row) else found


class PackedItems(Sequence[dict[str, Any]]):
    """A read-only list of items, kept as compressed JSON; one is unpacked when it is asked for.

    As dictionaries, the items of 100,000 volumes take 0.3 GB. What is worse, a loader's worker that looks at an object
    of Python's gets a copy of the memory around it; bytes stay shared. PyTorch and MONAI have nothing for it.

    Args:
        items: what to keep, in this order: anything that JSON can hold, or what ``packer`` made of it.
        packer: has packed some of them.
    """

    def __init__(self, items: Iterable[Any] = (), packer: Packer | None = None) -> None:
        packer = packer or Packer()
        rows = [item.number if isinstance(item, _Row) else packer.add(item) for item in items]
        packer.close()
        self._rows = np.array(rows, dtype=np.int64)
        self._blocks, self._ends = np.array(packer.blocks), np.array(packer.ends)
        self._block_ends = np.array(packer.block_ends)
        self._data = bytes(packer.data)
        self._unpacked = -1, b""  # the block that was looked at last
        self._kinds = list(packer.kinds)
        self._root: Path | None = None

    def take(self, rows: Iterable[int] | np.ndarray) -> PackedItems:
        """The items at these places, in this order; nothing is copied."""
        other = copy.copy(self)
        other._rows = self._rows[np.asarray(rows, dtype=np.int64)]
        return other

    def below(self, root: Path) -> PackedItems:
        """The same items, their paths below a folder; what lies behind a URL stays there."""
        other = copy.copy(self)
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
        block = self._block(int(self._blocks[row]))
        start = self._ends[row - 1] if row and self._blocks[row - 1] == self._blocks[row] else 0
        kind, *values = _decode(block[start : self._ends[row]].decode())
        if kind < 0:
            return values[0]
        item: dict[str, Any] = dict(zip(self._kinds[kind], values))
        if self._root is not None:
            paths = {key: item[key] for key in PATHS if isinstance(item.get(key), str)}
            item.update({key: str(self._root / path) for key, path in paths.items() if "://" not in path})
        return item

    def _block(self, number: int) -> bytes:
        unpacked = self._unpacked
        if unpacked[0] != number:
            start = self._block_ends[number - 1] if number else 0
            unpacked = number, zlib.decompress(self._data[start : self._block_ends[number]])
            self._unpacked = unpacked
        return unpacked[1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
