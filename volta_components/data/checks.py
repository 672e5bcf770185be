# SPDX-License-Identifier: Apache-2.0
"""Whether volumes are what their datalist says: partly before a training starts, the rest when one is first read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from tqdm.contrib.concurrent import thread_map

from volta_components.data.datalist import Datalist, no_datalist, uneven_skulls
from volta_components.data.geometry import by
from volta_components.data.items import HASH_OF, PATHS
from volta_components.data.nifti import DTYPES
from volta_components.data.places import file_of, header_of, place_of, sha256_of, volume_of
from volta_components.data.remote import forget, is_remote
from volta_components.data.unusable import UnusableVolume, named_errors
from volta_components.errors import AGAIN, InputError

_AGAIN = "remove it, and run the same volta3d prepare again (the rest is kept)"
_PACK = "run the same volta3d pack-data again (what is whole is kept)"
_FETCH = "its local copy was removed, so that it will be fetched again"
_REMEDY = (
    "Remove these files and run the same volta3d prepare again (the rest is kept), or remove the items from the "
    "datalist."
)
GONE = (
    "Paths count from the datalist's folder: move it together with its volumes, put these back, or run the same "
    "volta3d prepare again."
)
# A header takes a millisecond, or several behind a network.
_HEADERS = 2_500


def check_volumes(datalist: Datalist, deep: bool = False) -> None:
    """Check that every volume of a datalist is there and is what the datalist says, before a training starts.

    By default every file's size is looked at, and the headers of up to 2,500 of them, evenly chosen, and of all that
    are not plain files of the expected size. Contents are checked by ``check_contents`` when a loader first reads them;
    an image without a hash is read now. ``deep`` reads every voxel and compares hashes now, with a progress bar;
    threads suffice, as reading, NumPy and hashing all release the interpreter's lock. Processes that train together
    share the work, and each raises what any of them found.

    Raises:
        InputError: listing every bad file with its reason; or if there is no datalist.
    """
    if datalist.content.get("rendered"):
        return  # anatomies, which were read whole for their hash; their volumes are made while training
    # Here, since it imports torch, which the workers of ``volta3d prepare`` do without.
    from volta_components.distributed import gather_objects, process_count, process_rank

    items = datalist.items
    if not items:
        raise no_datalist(datalist.path)
    if process_rank() == 0 and (note := uneven_skulls(items, datalist.name)):
        warnings.warn(f"{datalist.path}: {note}", stacklevel=2)
    share = items[process_rank() :: process_count()]
    is_shown = deep and process_rank() == 0
    rows = sorted(gather_objects(unusable_volumes(datalist, share, deep, is_shown)))
    if rows:
        remedy = GONE if all(reason == "no such file" for *_, reason in rows) else _REMEDY
        raise InputError.many(f"{datalist.path}: {len(rows)} files of {len(items)} items cannot be used", rows, remedy)


def unusable_volumes(
    datalist: Datalist,
    items: Sequence[Mapping[str, Any]],
    deep: bool = False,
    is_shown: bool = False,
) -> list[tuple[str, str, str]]:
    """Subject, file and reason of each volume of a datalist that is not what the datalist says.

    Args:
        datalist: the datalist.
        items: those of it to look at.
        deep: read every voxel too.
        is_shown: show a progress bar.
    """
    step = -(-len(items) // _HEADERS)

    def examine(index: int) -> list[tuple[str, str, str]]:
        found, item = [], items[index]
        if not deep and is_remote(str(item["image"])):
            return []  # it would be fetched
        for kind in PATHS:
            if kind not in item:
                continue
            is_sure = kind == "label" or bool(item.get("sha256"))
            if deep or not is_sure or not index % step or not _has_size(item, kind, datalist.shape):
                try:
                    _check_header(item[kind], datalist)
                    if deep or not is_sure:
                        _check_voxels(item[kind], kind)
                    if deep:
                        _check_hash(item[kind], item.get(HASH_OF[kind]))
                except UnusableVolume as error:
                    found.append((str(item["subject_id"]), str(item[kind]), error.reason))
        return found

    def examine_all(indices: range) -> list[tuple[str, str, str]]:
        return [row for index in indices for row in examine(index)]

    # A task of a pool takes a kilobyte, and as long as a look at a file's size.
    batch = 1 if deep else 100
    batches = [range(first, min(first + batch, len(items))) for first in range(0, len(items), batch)]
    checked = thread_map(
        examine_all,
        batches,
        max_workers=joblib.cpu_count(),
        desc="checking volumes",
        unit="volume",
        leave=False,
        disable=not is_shown,
    )
    return [row for found in checked for row in found]


def check_contents(item: Mapping[str, Any]) -> None:
    """Check before an item's image is used that its content is what was prepared; one without a hash passes.

    Raises:
        InputError: if it is not; names subject, file, reason and remedy.
    """
    try:
        _check_hash(item["image"], item.get("sha256"))
    except UnusableVolume as error:
        forget(file_of(item["image"]))
        raise InputError(
            f"{item.get('subject_id', '')}: {error.path}: {error.reason}; {error.remedy}; {AGAIN}"
        ) from error


def _has_size(item: Mapping[str, Any], kind: str, shape: Sequence[int]) -> bool:
    """Whether a file is as long as a plain NIfTI file that ``volta3d prepare`` writes."""
    kinds = ["uint8"] if kind == "label" else [str(item["dtype"])] if "dtype" in item else list(DTYPES)
    voxels = int(np.prod(shape, dtype=np.int64))
    sizes = [352 + voxels * DTYPES[name].itemsize for name in kinds if name in DTYPES]
    try:
        place = place_of(item[kind])
        size = os.stat(file_of(item[kind])).st_size  # noqa: PTH116 - twice as fast
        if place is not None:
            return place.length in sizes and place.start + place.length <= size
        return item[kind].endswith(".nii") and size in sizes
    except OSError:
        return False


def _check_header(path: str, datalist: Datalist) -> None:
    found, mm = header_of(path)
    if found != datalist.shape:
        sizes = ["x".join(map(str, shape)) for shape in (found, datalist.shape)]
        raise UnusableVolume(path, f"shape {sizes[0]} where the datalist says {sizes[1]}", _AGAIN)
    if not np.allclose(mm, datalist.spacing, rtol=0, atol=1e-3):
        raise UnusableVolume(path, f"spacing {by(mm)} mm where the datalist says {by(datalist.spacing)}", _AGAIN)


def _check_voxels(path: str, kind: str) -> None:
    volume = volume_of(path)
    if volume.voxels.dtype.kind == "f" and not np.isfinite(volume.voxels).all():
        bad = volume.voxels.size - int(np.isfinite(volume.voxels).sum())
        raise UnusableVolume(path, f"contains NaN or Inf ({bad:,} voxels)", _AGAIN)
    low, high = (float(v) * volume.slope + volume.intercept for v in (volume.voxels.min(), volume.voxels.max()))
    if kind == "image" and low == high:
        raise UnusableVolume(path, f"constant: every voxel is {low:g}", _AGAIN)
    if kind == "image" and (low < -1e-3 or high > 1 + 1e-3):
        raise UnusableVolume(path, f"intensities from {low:g} to {high:g} instead of 0 to 1", _AGAIN)
    if kind == "label" and volume.voxels.dtype.kind == "f" and not (volume.voxels == np.round(volume.voxels)).all():
        raise UnusableVolume(path, "label values that are no integers", _AGAIN)


def _check_hash(path: str, digest: str | None) -> None:
    with named_errors(Path(path)):
        if digest and sha256_of(path) != digest:
            remedy = _FETCH if is_remote(path) else _PACK if place_of(path) else _AGAIN
            raise UnusableVolume(path, "its content is not what was prepared (another hash)", remedy)
