# SPDX-License-Identifier: Apache-2.0
"""PyTorch's ``.pt`` files: the same bytes for the same tensors, and nothing loaded that is damaged or too large."""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

PICKLE = "data.pkl"
CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")


class DamagedArchiveError(ValueError):
    """A ``.pt`` file that must not be loaded; the message is the reason, without the file's name."""


def write_archive(state: Any, path: str | os.PathLike[str]) -> None:
    """Write tensors, and containers of them, as ``torch.load(..., weights_only=True)`` reads them.

    Given a path, ``torch.save`` names the archive's folder after it, and a temporary name is never the same twice.
    Given an open file, it takes a fixed name.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        with Path(path).open("wb") as stream:
            torch.save(state, stream)
    except RuntimeError as error:
        # After a failed write, PyTorch's writer fails once more while it closes.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_archive(path: str | os.PathLike[str]) -> Any:
    """Read what ``write_archive`` wrote, on the CPU, after checking the file.

    ``torch.load`` neither compares checksums nor limits sizes: a flipped bit passes, and a file of a kilobyte can hold
    a tensor of terabytes. The checks come first: every record is stored as it is, is as long as the file has bytes for
    it, and has its CRC-32; no tensor has more elements than its record.

    Raises:
        DamagedArchiveError: if the file is damaged, of an older format, larger than it looks, or holds anything but
            tensors, numbers, text, and lists or dictionaries of them.
        OSError: if it cannot be read.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive, path.stat().st_size)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (DamagedArchiveError, OSError):
        raise
    except zipfile.BadZipFile as error:
        raise DamagedArchiveError("damaged, or not a PyTorch archive") from error
    except Exception as error:
        # Not the error's own text: torch's advises to load without protection, or is empty.
        raise DamagedArchiveError(f"damaged, or not plain tensors ({type(error).__name__})") from error


def _check(archive: zipfile.ZipFile, size: int) -> None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DamagedArchiveError("its records are compressed, which PyTorch never does")
    if sum(entry.file_size for entry in entries) > size or len({*names}) < len(names):
        raise DamagedArchiveError("its records are larger than the file")
    if (bad := archive.testzip()) is not None:
        raise DamagedArchiveError(f"damaged: the checksum of its record {bad} is wrong")
    pickles = [name for name in names if name.split("/")[1:] == [PICKLE]]
    if len(pickles) != 1:
        raise DamagedArchiveError("not a PyTorch archive")
    root = pickles[0].removesuffix(PICKLE)
    records = {
        entry.filename.removeprefix(f"{root}data/"): entry.file_size
        for entry in entries
        if entry.filename.startswith(f"{root}data/")
    }
    _Sizes(archive.read(pickles[0]), records).load()


def _rebuilt(storage: Any, *rest: Any) -> Any:
    """A tensor, as the number of elements of its storage; a parameter is a tensor already."""
    if len(rest) < 4:  # a parameter: tensor, whether it trains, hooks
        return storage
    size = rest[1]
    if any(side < 0 for side in size) or math.prod(size) > storage:
        raise DamagedArchiveError(f"declares a tensor of {math.prod(size):,} elements, but holds {storage:,}")
    return storage


STAND_INS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_parameter": _rebuilt,
    # Of tensors with attributes.
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _, given, state: rebuild(*given),
}


# Python's own unpickler: that of C makes room for whatever number of objects a file announces.
class _Sizes(pickle._Unpickler):
    """Reads an archive's pickle for the sizes that it declares; makes no tensor and calls nothing that it names."""

    def __init__(self, content: bytes, records: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self.records = records

    def persistent_load(self, pid: Any) -> int:
        """Elements of a storage."""
        _, kind, key, _, count = pid
        width = 1 if kind == "UntypedStorage" else torch.serialization.StorageType(kind).dtype.itemsize
        if not 0 <= count * width <= self.records.get(str(key), 0):
            raise DamagedArchiveError(f"declares {count:,} elements for a record of {self.records.get(str(key), 0)} B")
        return int(count)

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what a state dict needs; everything else is refused."""
        full = f"{module}.{name}"
        if full in STAND_INS:
            return STAND_INS[full]
        if full in CLASSES or (module in ("torch", "torch.storage") and name.endswith("Storage")):
            return name
        raise DamagedArchiveError(f"holds {full}, not plain tensors: loading it could run code")
