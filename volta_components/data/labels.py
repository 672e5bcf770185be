# SPDX-License-Identifier: Apache-2.0
"""Label files of a scan, checked and merged into one map: 0 background, 1 left, 2 right hippocampus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from volta_components.data.geometry import largest_distance
from volta_components.data.layouts.common import LEFT, RIGHT, LabelFile
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import Volume, canonical, read_volume, whole_numbers

SIDES = {"left": LEFT, "right": RIGHT}
# In every picture. People who are colour-blind can tell them apart, on grey as well.
SIDE_COLOURS = {LEFT: "#ff9f1c", RIGHT: "#22c7d6"}


ONE_GRID = "give them on one grid, or leave labels alone (--labels none)"


def _same_grid(path: Path, label: Volume, scan: Volume, scan_path: Path) -> None:
    """Raise unless two volumes in RAS order lie on one grid (MINC and NIfTI store different axis orders)."""
    if label.voxels.shape != scan.voxels.shape:
        sizes = ["x".join(map(str, v.voxels.shape)) for v in (label, scan)]
        raise UnusableVolume(path, f"label of {sizes[0]} voxels, scan of {sizes[1]} ({scan_path.name})", ONE_GRID)
    distance = largest_distance(label.affine, scan.affine, scan.voxels.shape)
    if distance > 0.25 * float(voxel_sizes(scan.affine).min()):
        raise UnusableVolume(path, f"label and scan do not share one grid: up to {distance:.1f} mm apart", ONE_GRID)


def centre_x(mask: np.ndarray, affine: np.ndarray) -> float:
    """World x (towards the right) of a mask's centroid, mm."""
    return float(apply_affine(affine, np.argwhere(mask).mean(axis=0))[0])


def read_labels(
    files: Sequence[LabelFile], scan: Volume, scan_path: Path, assume_orientation: str | None = None
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Read a scan's label files into one map.

    One-sided files (HarP) hold two values, which need not be 0 and 1; the lower is background. Sides are told from the
    centroids in world coordinates: where the file named left lies right of the one named right, they are swapped.

    Args:
        files: one map with values 0, 1, 2; or one file a side.
        scan: the scan, whose grid they must share.
        scan_path: to name it.
        assume_orientation: see :func:`volta_components.data.volumes.read_volume`.

    Returns:
        ``[X, Y, Z]`` uint8 in RAS order; its affine; quirks found, as (file, what).

    Raises:
        UnusableVolume: if a file cannot be used, is empty, is on another grid or holds unexpected values.
    """
    grid = canonical(scan)
    merged = np.zeros(grid.voxels.shape, np.uint8, order="F")
    quirks: list[tuple[str, str]] = []
    sides: dict[int, np.ndarray] = {}
    for file in files:
        volume = canonical(read_volume(file.path, assume_orientation))
        quirks += [(file.path.name, warning) for warning in volume.warnings]
        _same_grid(file.path, volume, grid, scan_path)
        voxels = whole_numbers(file.path, volume)
        values = np.unique(voxels)
        if len(values) == 1:
            raise UnusableVolume(file.path, f"empty label: every voxel is {values[0]}", "fetch it again")
        if file.value is None:
            if values[0] < 0 or values[-1] > 2:
                raise UnusableVolume(
                    file.path,
                    f"label values {values[:6].tolist()}{' ...' if len(values) > 6 else ''}",
                    "0 is background, 1 left and 2 right hippocampus; renumber it",
                )
            merged[...] = voxels
            if missing := [f"{name} ({side})" for name, side in SIDES.items() if side not in values]:
                raise UnusableVolume(
                    file.path,
                    f"label without voxels of {missing[0]}",
                    "0 is background, 1 left and 2 right hippocampus; renumber it if one value stands for both sides",
                )
            left, right = (merged == side for side in (LEFT, RIGHT))
            if centre_x(left, volume.affine) > centre_x(right, volume.affine):
                raise UnusableVolume(
                    file.path,
                    "label 1 (left) lies right of label 2 (right)",
                    "look at the scan: exchange the two values, or mend the header that mirrors it",
                )
            continue
        if len(values) != 2:
            raise UnusableVolume(
                file.path, f"{len(values)} values instead of two: {values[:6].tolist()}", "fetch it again"
            )
        if values[0] != 0 or values[1] != 1:
            quirks.append((file.path.name, f"values {values[0]} and {values[1]} taken as 0 and 1"))
        sides[file.value] = voxels == values[1]
    if LEFT in sides and RIGHT in sides:
        x = {side: centre_x(mask, grid.affine) for side, mask in sides.items()}
        if x[LEFT] > x[RIGHT]:
            names = " and ".join(file.path.name for file in files)
            quirks.append((names, f"left and right swapped (centroids at x = {x[LEFT]:.1f} and {x[RIGHT]:.1f} mm)"))
            sides = {LEFT: sides[RIGHT], RIGHT: sides[LEFT]}
        if overlap := int((sides[LEFT] & sides[RIGHT]).sum()):
            quirks.append((files[0].path.name, f"{overlap} voxels are in both sides; they became right"))
    for side, mask in sorted(sides.items()):
        merged[mask] = side
    return merged, grid.affine, quirks
