# SPDX-License-Identifier: Apache-2.0
"""Writes NIfTI files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from volta_components.data.volumes import Volume
from volta_components.files import atomic_path


def write_nifti(path: str | os.PathLike[str], voxels: np.ndarray, affine: np.ndarray, slope: float = 1.0) -> None:
    """Write a volume as NIfTI-1, atomically; the same voxels give the same bytes.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        voxels: ``[X, Y, Z]``, in the type that is stored.
        affine: ``[4, 4]``, voxel to world mm; stored as sform and qform, both with the code of scanner space.
        slope: intensity of a stored 1.
    """
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, 0)
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        # Level 1, as NiBabel's own: a higher one takes many times longer and saves 5 %.
        packed = Path(path).suffix == ".gz"
        temporary.write_bytes(gzip.compress(content, compresslevel=1, mtime=0) if packed else content)


def write_label_map(path: str | os.PathLike[str], mask: np.ndarray, affine: np.ndarray) -> None:
    """Write a label map ``[X, Y, Z]`` of 0 to 255 as uint8; see ``write_nifti``."""
    write_nifti(path, np.asarray(mask, dtype=np.uint8), affine)


def write_picture_volume(path: str | os.PathLike[str], volume: Volume) -> None:
    """Write a prepared volume in 256 steps, a tenth of its size, to be looked at."""
    voxels = volume.voxels.astype(np.float32) * np.float32(volume.slope) + np.float32(volume.intercept)
    write_nifti(path, np.round(np.clip(voxels, 0, 1) * 255).astype(np.uint8), volume.affine, slope=1 / 255)
