# SPDX-License-Identifier: Apache-2.0
"""From the grid that a network sees back to a scan's own: its orientation, spacing and shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage


def grids_of(image: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """A loaded volume's affine; affine and shape of its scan, which ``LoadScand`` notes in ``meta``, or its own."""
    if not isinstance(image, MetaTensor):
        return np.eye(4), np.eye(4), tuple(image.shape[1:])
    affine = np.asarray(torch.as_tensor(image.affine).cpu(), float)
    if not {"original_affine", "spatial_shape"} <= image.meta.keys():
        return affine, affine, tuple(image.shape[1:])
    own = np.asarray(torch.as_tensor(image.meta["original_affine"]).cpu(), float)
    return affine, own, tuple(int(side) for side in torch.as_tensor(image.meta["spatial_shape"]))


def voxels_to_voxels(source: np.ndarray, target: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Matrix ``[4, 4]`` from voxels of one affine's grid to another's; whole numbers where only rounding differs."""
    matrix = np.linalg.inv(target) @ source
    snapped = np.round(matrix)
    return snapped if np.abs(matrix - snapped).max() * max(shape) < 1e-3 else matrix


def restore_map(
    values: np.ndarray, affine: np.ndarray, target_affine: np.ndarray, target_shape: Sequence[int]
) -> np.ndarray:
    """A map ``[D, H, W]`` on the prepared grid, interpolated linearly to a scan's grid; float32, 0 outside."""
    to_prepared = voxels_to_voxels(target_affine, affine, target_shape)
    return ndimage.affine_transform(
        np.asarray(values, np.float32), to_prepared, output_shape=tuple(target_shape), order=1, mode="constant"
    )


def restore_mask(
    probabilities: np.ndarray, affine: np.ndarray, target_affine: np.ndarray, target_shape: Sequence[int]
) -> np.ndarray:
    """Label map (uint8) on a scan's own grid from probabilities ``[C, D, H, W]`` on the prepared one.

    Probabilities are interpolated linearly, and the class with the highest one is taken afterwards (background, the
    first, outside the prepared grid), so that edges are as smooth as the scan's grid allows; an interpolated label map
    would be frayed. On equal grids nothing changes.
    """
    shape = tuple(int(side) for side in target_shape)
    result = np.zeros(shape, np.uint8)
    places = np.argwhere(probabilities.argmax(axis=0) > 0)
    if not len(places):
        return result
    to_prepared = voxels_to_voxels(target_affine, affine, shape)
    # A voxel that becomes foreground lies less than one prepared voxel from one that is.
    low, high = places.min(axis=0) - 1.0, places.max(axis=0) + 1.0
    corners = np.array([[(low, high)[bit][axis] for axis, bit in enumerate(bits)] for bits in np.ndindex(2, 2, 2)])
    box = nib.affines.apply_affine(np.linalg.inv(to_prepared), corners)
    first = np.maximum(np.floor(box.min(axis=0)), 0).astype(int)
    last = np.minimum(np.ceil(box.max(axis=0)) + 1, shape).astype(int)
    if (last <= first).any():
        return result
    matrix, offset = to_prepared[:3, :3], to_prepared[:3, 3]
    part = np.stack(
        [
            ndimage.affine_transform(
                channel,
                matrix,
                offset=offset + matrix @ first,
                output_shape=tuple(last - first),
                output=np.float32,
                order=1,
                mode="constant",
                cval=float(index == 0),
            )
            for index, channel in enumerate(probabilities)
        ]
    )
    result[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = part.argmax(axis=0)
    return result
