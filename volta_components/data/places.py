# SPDX-License-Identifier: Apache-2.0
"""Prepared volumes that lie in a few large tar files instead of a file each, or behind a URL.

A datalist names such a volume by shard, first byte and length: ``shards/00003.tar@1536:5308768``. The shards are plain
tar files of plain NIfTI files, so that ``tar`` and WebDataset read them as well; a volume is read at its place, without
an index.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from volta_components.data.remote import forget, is_remote, local_copy
from volta_components.data.unusable import UnusableVolume, named_errors
from volta_components.data.volumes import Volume, read_header, read_volume
from volta_components.files import sha256_file

_GZIP = b"\x1f\x8b"
_HEADER = 348  # bytes
_PLACE = re.compile(r"(.+\.tar)@(\d+):(\d+)")


class Place(NamedTuple):
    """Where a volume lies within a shard, bytes."""

    shard: str
    start: int
    length: int


def place_of(image: str | os.PathLike[str]) -> Place | None:
    """The place within a shard that an item's image is; None for a file."""
    # Path, which MONAI's LoadImage makes of every name, takes a slash from a URL.
    text = re.sub(r"^(\w{2,}):/(?=[^/])", r"\1://", os.fspath(image))
    found = _PLACE.fullmatch(text)
    return None if found is None else Place(found[1], int(found[2]), int(found[3]))


def file_of(image: str) -> str:
    """The file that holds an image, which may be a shard, and may be behind a URL."""
    place = place_of(image)
    return image if place is None else place.shard


def read_place(place: Place, most: int | None = None) -> bytes:
    """The bytes of a volume, or the first of them.

    Raises:
        UnusableVolume: if the shard is not there, cannot be fetched, or ends before them.
    """
    with named_errors(Path(place.shard)):
        for is_last in (False, True):
            try:
                with local_copy(place.shard).open("rb") as stream:
                    size = os.fstat(stream.fileno()).st_size
                    found = os.pread(stream.fileno(), min(place.length, most or place.length), place.start)
                break
            except FileNotFoundError:  # another process has made room in between
                if is_last or not is_remote(place.shard):
                    raise
        if size < place.start + place.length:
            forget(place.shard)
            raise UnusableVolume(place.shard, f"ends before byte {place.start + place.length:,}", "pack the data again")
    return found


def sha256_of(image: str | os.PathLike[str]) -> str:
    """SHA-256 of an image's bytes, in a file of its own or in a shard."""
    place = place_of(image)
    return sha256_file(image) if place is None else hashlib.sha256(read_place(place)).hexdigest()


def image_of(place: Place) -> nib.Nifti1Image:
    """A volume of a shard, its bytes in memory."""
    found = read_place(place)
    with named_errors(Path(place.shard)):
        return nib.Nifti1Image.from_bytes(gzip.decompress(found) if found.startswith(_GZIP) else found)


def header_of(image: str | os.PathLike[str]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Voxels, and mm between them, by the header of an image in a file of its own or in a shard; it reads no more."""
    place = place_of(image)
    if place is None:
        header = read_header(image)
        return header.shape, header.spacing
    start = read_place(place, _HEADER)
    with named_errors(Path(place.shard)):
        found = image_of(place).header if start.startswith(_GZIP) else nib.Nifti1Header(start)
        affine = found.get_best_affine()
    return tuple(map(int, found.get_data_shape())), tuple(map(float, nib.affines.voxel_sizes(affine)))


def volume_of(image: str | os.PathLike[str]) -> Volume:
    """An image's voxels, in a file of its own or in a shard."""
    place = place_of(image)
    if place is None:
        return read_volume(image)
    found = image_of(place)
    proxy: Any = found.dataobj
    return Volume(np.asarray(proxy.get_unscaled()), found.affine, float(proxy.slope), float(proxy.inter), 1)
