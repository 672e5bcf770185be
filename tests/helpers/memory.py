# SPDX-License-Identifier: Apache-2.0
"""Memory, measured in a process of its own: in pytest's, a thread that another test left behind would count too."""

from __future__ import annotations

import multiprocessing
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny_datasets as tiny

from volta_components.data.datalist import load_datalist
from volta_components.data.preprocess import Settings, prepare_volume
from volta_components.data.volumes import Volume


def in_fresh_process(function: Callable[..., float], *arguments: object) -> float:
    """What a function of this module returns there."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def kept_by_datalist(folder: Path) -> float:
    """Bytes that a prepared set's datalist keeps, split at fold 1, whose only item is the first."""
    tracemalloc.start()
    datalist = load_datalist(folder)
    others, held_out = datalist.split(1)
    kept, _ = tracemalloc.get_traced_memory()
    assert len(others) == len(datalist.items) - 1 and [item["subject_id"] for item in held_out] == ["s0"]
    assert np.shares_memory(np.frombuffer(others._data, np.uint8), np.frombuffer(datalist.items._data, np.uint8))
    return kept


def peak_of_a_big_scan() -> float:
    """Most memory that the preparation of a scan takes, as a share of the scan's."""
    shape, affine = tiny.grid("PIR", (0.1, 0.1, 0.1), (200, 220, 240), centre=(0.3, -1.2, 0.7))
    coarse_shape, coarse_affine = tiny.grid("PIR", (0.8, 0.8, 0.8), (25, 28, 30), centre=(0.3, -1.2, 0.7))
    small = tiny.head(coarse_shape, coarse_affine).astype(np.int16)
    voxels = np.asfortranarray(
        np.repeat(np.repeat(np.repeat(small, 8, 0), 8, 1), 8, 2)[: shape[0], : shape[1], : shape[2]]
    )
    volume = Volume(voxels, affine, 1.0, 0.0, 1)
    tracemalloc.start()
    prepare_volume(volume, Settings(spacing=(1.0, 1.0, 1.0), shape=(28, 30, 32)))
    return tracemalloc.get_traced_memory()[1] / voxels.nbytes
