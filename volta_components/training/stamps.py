# SPDX-License-Identifier: Apache-2.0
"""Sizes and times of the files that a run is trained on, to notice at a resume that they were exchanged."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from volta_components.data.items import HASH_OF, PATHS
from volta_components.data.places import file_of, sha256_of
from volta_components.errors import InputError

ABSENT = (-1, -1)


def _files(items: Sequence[Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Items, and which of their keys are files, in order; anatomies, which are read once, have none."""
    for item in items:
        if isinstance(item, Mapping):
            yield from ((item, kind) for kind in PATHS if isinstance(item.get(kind), str))


def make_stamps(items: Sequence[Any]) -> Tensor:
    """Size (bytes) and time of the last change (ns) of each file, ``[files, 2]``, int64; -1 for one that is missing.

    Nothing is read: a hundred thousand files on a local disk take about a second.

    Args:
        items: of a datalist, with absolute paths.
    """
    numbers = array("q")
    for item, kind in _files(items):
        try:
            found = os.stat(file_of(item[kind]))  # noqa: PTH116 - twice as fast
        except OSError:
            numbers.extend(ABSENT)
        else:
            numbers.extend((found.st_size, found.st_mtime_ns))
    return torch.tensor(numbers, dtype=torch.int64).reshape(-1, 2)


def check_stamps(path: Path, items: Sequence[Any], there: Tensor | None, here: Tensor) -> None:
    """Refuse to resume with other files than a run began with.

    A file of the same size and time is taken as the same. One with another time is read, and its hash compared with
    the datalist's: a copy or a touched file costs no more than this. Without a hash there, its size decides.

    Args:
        path: the checkpoint, for the message.
        items: what is trained on now; the settings say that the datalist is the same.
        there: what ``make_stamps`` found when the checkpoint was written; None in an older one.
        here: what it finds now.

    Raises:
        InputError: listing the files that are others.
    """
    if there is None or there.shape != here.shape:
        return
    changed = (there != here).any(dim=1)
    entries = [(entry, row) for row, entry in enumerate(_files(items)) if changed[row]]

    def examine(entry: tuple[tuple[Mapping[str, Any], str], int]) -> tuple[str, str, str] | None:
        (item, kind), row = entry
        who = (str(item.get("subject_id", "")), str(item[kind]))
        before, now = int(there[row, 0]), int(here[row, 0])
        if now < 0:
            return (*who, "is missing")
        if before != now:
            return (*who, f"{now:,} bytes, {before:,} when the run began")
        known = item.get(HASH_OF[kind])
        if known and sha256_of(item[kind]) != known:
            return (*who, "another content")
        return None

    bar = {"desc": "comparing volumes", "leave": False, "disable": not entries}
    if rows := list(filter(None, thread_map(examine, entries, max_workers=joblib.cpu_count(), **bar))):
        raise InputError.many(
            f"{path} was trained on other files than are there now ({len(rows)} of {len(here)})",
            rows,
            "Put them back, or choose another run_name (--run_name NAME) to train on these from the beginning.",
        )
