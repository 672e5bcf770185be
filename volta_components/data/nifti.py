# SPDX-License-Identifier: Apache-2.0
"""Writes NIfTI files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from volta_components.data.headers import own_space
from volta_components.data.volumes import Volume
from volta_components.files import atomic_path

# What the voxels of prepared volumes are stored as.
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float32", "uint16", "uint8")}


def largest_error(dtype: str) -> float:
    """Of a number in [0, 1] that is stored in such a type: half of a step; 0 for float32, which volumes are made in.

    NIfTI has no 16-bit floating point numbers. They would take the space of uint16, with 32 times its error near 1.
    """
    kind = DTYPES[dtype]
    return 0.0 if kind.kind == "f" else 0.5 / np.iinfo(kind).max


def nifti_header(
    voxels: np.ndarray,
    affine: np.ndarray,
    code: int,
    slope: float,
    like: str | os.PathLike[str] | None = None,
) -> nib.Nifti1Header:
    """Header of a single NIfTI-1 file.

    Args:
        voxels: ``[X, Y, Z]``, in the type that is stored.
        affine: ``[4, 4]``, voxel to world mm; stored as sform and qform.
        code: of both.
        slope: intensity of a stored 1.
        like: a volume of the same grid. Where it is NIfTI, its own qform, sform, codes and unit are taken, so that the
            two lie on each other in every viewer, whichever transform that prefers.
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_zooms(nib.affines.voxel_sizes(affine))
    header.set_sform(affine, code)
    header.set_qform(affine, code)
    header.set_xyzt_units("mm")
    header.set_slope_inter(slope, 0.0)
    if like is not None:
        for name, value in own_space(like).items():
            header[name] = value
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    return header


def write_nifti(
    path: str | os.PathLike[str],
    voxels: np.ndarray,
    affine: np.ndarray,
    slope: float = 1.0,
    like: str | os.PathLike[str] | None = None,
) -> None:
    """Write a volume as NIfTI-1, atomically; the same voxels give the same bytes.

    The affine becomes sform and qform, both with the code of scanner space; see ``nifti_header`` for the rest.
    """
    header = nifti_header(voxels, affine, 1, slope, like)
    content = header.binaryblock + bytes(4) + np.asarray(voxels).tobytes(order="F")
    with atomic_path(path) as temporary:
        # Level 1, as NiBabel's own: a higher one takes many times longer and saves 5 %.
        packed = Path(path).suffix == ".gz"
        temporary.write_bytes(gzip.compress(content, compresslevel=1, mtime=0) if packed else content)


def write_label_map(path: str | os.PathLike[str], mask: np.ndarray, affine: np.ndarray) -> None:
    """Write a label map ``[X, Y, Z]`` of 0 to 255 as uint8; see ``write_nifti``."""
    write_nifti(path, np.asarray(mask, dtype=np.uint8), affine)


def write_picture_volume(path: str | os.PathLike[str], volume: Volume) -> None:
    """Write a prepared volume in 256 steps, a tenth of its size, to be looked at."""
    steps = np.round(np.clip(volume.intensities, 0, 1) * 255).astype(np.uint8)
    write_nifti(path, steps, volume.affine, slope=1 / 255)
