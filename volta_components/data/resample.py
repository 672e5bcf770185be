# SPDX-License-Identifier: Apache-2.0
"""Resampling of volumes and label maps to a grid."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from scipy import ndimage, sparse

_SNAP = 0.02  # voxels: less than this over the whole grid is rounding, not a shift


def orthogonal_axes(affine: np.ndarray) -> np.ndarray:
    """The rotation nearest to the directions of an affine's axes (polar decomposition); takes out shear."""
    directions = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    u, _, vt = np.linalg.svd(directions)
    return u @ vt


def _axis_weights(n_in: int, n_out: int, scale: float, offset: float) -> tuple[sparse.csr_array, np.ndarray]:
    """Weights ``[n_out, n_in]`` of source voxels in target voxels; which targets have their centre in the source."""
    centre = scale * np.arange(n_out) + offset
    reach = abs(scale) if abs(scale) > 1.5 else 1.0
    index = np.floor(centre - reach).astype(int)[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
    weight = np.maximum(0, 1 - np.abs(index - centre[:, None]) / reach)
    weight[(index < 0) | (index >= n_in)] = 0
    inside = (centre > -0.5) & (centre < n_in - 0.5)
    weight[~inside] = 0
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-12)
    rows, columns = np.nonzero(weight)
    entries = (weight[rows, columns].astype(np.float32), (rows, index[rows, columns]))
    return sparse.csr_array(entries, shape=(n_out, n_in)), inside


def _resample_straight(
    voxels: np.ndarray, scale: np.ndarray, offset: np.ndarray, shape: tuple[int, ...], fill: float
) -> np.ndarray:
    """Resample along the axes, one plane of the source at a time; planes without weight are not even read."""
    parts = [_axis_weights(voxels.shape[axis], shape[axis], scale[axis], offset[axis]) for axis in range(3)]
    slow = int(np.argmax(np.abs(voxels.strides)))
    first, second = (axis for axis in range(3) if axis != slow)
    result = np.zeros(shape, np.float32)
    planes, moved = np.moveaxis(voxels, slow, 0), np.moveaxis(result, slow, 0)
    by_source = parts[slow][0].tocsc()
    for i in range(planes.shape[0]):
        span = slice(by_source.indptr[i], by_source.indptr[i + 1])
        if span.start == span.stop:
            continue
        plane = parts[first][0] @ np.ascontiguousarray(planes[i], dtype=np.float32)
        plane = (parts[second][0] @ np.ascontiguousarray(plane.T)).T
        for target, weight in zip(by_source.indices[span], by_source.data[span], strict=True):
            moved[target] += weight * plane
    for axis, (_, inside) in enumerate(parts):
        np.moveaxis(result, axis, 0)[~inside] = fill
    return result


def resample(
    voxels: np.ndarray, affine: np.ndarray, target: np.ndarray, shape: tuple[int, ...], fill: float = 0.0
) -> np.ndarray:
    """Resample a scan onto another grid in one step (float32); a mere crop or pad is copied, not interpolated.

    Linear interpolation; where a target voxel is longer than 1.5 source voxels, the triangle is widened to its length,
    so that fine structure does not alias (as Pillow and ``torch.nn.functional.interpolate(antialias=True)`` do). Grids
    whose axes are not parallel (a sheared scan) go through ``scipy.ndimage.affine_transform``, each target voxel as the
    mean of samples within it.

    Args:
        voxels: ``[X, Y, Z]``, any real type.
        affine: ``[4, 4]`` of the scan.
        target: ``[4, 4]`` of the target grid.
        shape: of the target grid.
        fill: value outside the scan, in the scan's units.
    """
    to_source = np.linalg.inv(affine) @ target
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    extent = np.asarray(shape, float)
    shift = np.round(offset)
    if (np.abs(matrix - np.eye(3)) @ extent + np.abs(offset - shift) < _SNAP).all():
        return _copy_window(voxels, shift.astype(int), shape, fill)
    if (np.abs(matrix - np.diag(np.diag(matrix))) @ extent < _SNAP).all():
        return _resample_straight(voxels, np.diag(matrix), offset, shape, fill)
    steps = [int(np.ceil(ratio - 0.5)) if ratio > 1.5 else 1 for ratio in np.linalg.norm(matrix, axis=0)]
    samples = [(np.arange(n) + 0.5) / n - 0.5 for n in steps]
    shifts = np.stack(np.meshgrid(*samples, indexing="ij"), axis=-1).reshape(-1, 3)
    result, part = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    for step in shifts:
        ndimage.affine_transform(
            voxels, matrix, offset + matrix @ step, output_shape=shape, output=part, order=1, mode="constant", cval=fill
        )
        result += part
    result /= len(shifts)
    return result


def _copy_window(voxels: np.ndarray, start: np.ndarray, shape: tuple[int, ...], fill: float) -> np.ndarray:
    """The window of ``shape`` that begins at voxel ``start``, filled where it leaves the source."""
    result = np.full(shape, fill, np.float32)
    low, high = np.maximum(start, 0), np.minimum(start + np.asarray(shape), voxels.shape)
    if (high > low).all():
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        inside = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
        result[inside] = voxels[source]
    return result


def resample_label(
    label: np.ndarray, affine: np.ndarray, target: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, dict[int, float]]:
    """Resample a label map ``[X, Y, Z]`` (0 is background) so that each structure keeps its volume.

    Each label's share of every target voxel is computed by linear interpolation, and as many of the fullest voxels are
    taken as make up the structure's volume in the source (a fixed threshold of a half shrinks thin structures; nearest
    neighbour frays them).

    Returns:
        ``shape``, uint8; and each label's volume after relative to before.
    """
    values = [int(v) for v in np.unique(label) if v != 0]
    # Only the box around the labels matters, and a rim for interpolation.
    rim = 2 + np.ceil(nib.affines.voxel_sizes(np.linalg.inv(affine) @ target)).astype(int).max()
    found = ndimage.find_objects((label > 0).view(np.uint8)) or [(slice(0, 1),) * 3]
    box = tuple(slice(max(0, side.start - rim), side.stop + rim) for side in found[0])
    label = label[box]
    affine = affine @ nib.affines.from_matvec(np.eye(3), [part.start for part in box])
    source_mm3, target_mm3 = abs(np.linalg.det(affine[:3, :3])), abs(np.linalg.det(target[:3, :3]))
    result = np.zeros(shape, np.uint8)
    best = np.zeros(shape, np.float32)
    mm3 = {value: int((label == value).sum()) * source_mm3 for value in values}
    for value in values:
        share = resample((label == value).astype(np.uint8), affine, target, shape)
        wanted = round(mm3[value] / target_mm3)
        candidates = np.flatnonzero((share > 1e-6) & (share > best))
        chosen = candidates[np.argsort(-share.ravel()[candidates], kind="stable")[:wanted]]
        result.ravel()[chosen] = value
        best.ravel()[chosen] = share.ravel()[chosen]
    return result, {value: float((result == value).sum() * target_mm3 / mm3[value]) for value in values}
