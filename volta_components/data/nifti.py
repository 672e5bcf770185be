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


def write_picture_volume(path: Path, volume: Volume) -> None:
    """Write a prepared volume in 256 steps, a tenth of its size, to be looked at."""
    voxels = volume.voxels.astype(np.float32) * np.float32(volume.slope) + np.float32(volume.intercept)
    image = nib.Nifti1Image(np.round(np.clip(voxels, 0, 1) * 255).astype(np.uint8), volume.affine)
    image.header.set_slope_inter(1 / 255, 0)
    _write_nifti(path, image)


def write_label_map(path: str | os.PathLike[str], mask: np.ndarray, affine: np.ndarray) -> None:
    """Write a label map as uint8 NIfTI, atomically; the same bytes for the same voxels.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        mask: ``[X, Y, Z]``, 0 to 255.
        affine: ``[4, 4]``, voxel to world mm.
    """
    _write_nifti(Path(path), nib.Nifti1Image(np.asarray(mask, dtype=np.uint8), affine))


def _write_nifti(path: Path, image: nib.Nifti1Image) -> None:
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
