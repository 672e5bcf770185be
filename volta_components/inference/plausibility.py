# SPDX-License-Identifier: Apache-2.0
"""Signs that a mask of the hippocampi is implausible, whatever tool made it."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from scipy import ndimage

from volta_components.data.labels import SIDES
from volta_components.data.survey import find_foreground

USUAL_ML = (1.0, 6.5)  # of one side; beyond it, adults' hippocampi do not go
SIDES_DIFFER = 1 / 3  # of the larger side
PIECES = 0.9  # share of a side that lies in its largest piece
# Where the middle of a side lies, in widths of the head: from the midline, behind the middle, below the top. Twenty
# heads have 0.14 to 0.19, -0.14 to -0.02 and 0.63 to 0.77.
_PLACES = {"from the midline": (0.05, 0.35), "from front to back": (-0.35, 0.2), "below the top": (0.4, 1.05)}


def odd_about_masks(mask: np.ndarray, affine: np.ndarray, image: np.ndarray, image_affine: np.ndarray) -> list[str]:
    """Marks on a mask: volume, difference of the sides, place in the head, pieces; none for most masks.

    Args:
        mask: ``[X, Y, Z]``, 1 left, 2 right.
        affine: ``[4, 4]`` of the mask.
        image: ``[D, H, W]``, the prepared volume in [0, 1], RAS order.
        image_affine: ``[4, 4]`` of the prepared volume.
    """
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    parts = {side: mask == value for side, value in SIDES.items()}
    ml = {side: float(part.sum()) * voxel_ml for side, part in parts.items()}
    marks = [
        f"{side} hippocampus of {size:.2g} ml ({USUAL_ML[0]:g} to {USUAL_ML[1]:g} is usual)"
        if size
        else f"no {side} hippocampus was found"
        for side, size in ml.items()
        if not USUAL_ML[0] <= size <= USUAL_ML[1]
    ]
    if min(ml.values()) > 0 and min(ml.values()) < (1 - SIDES_DIFFER) * max(ml.values()):
        marks.append(f"the sides differ by more than a third ({ml['left']:.2g} ml left, {ml['right']:.2g} ml right)")
    for side, part in parts.items():
        if ml[side]:
            marks += _scattered(side, part)
    return marks + _misplaced({s: p for s, p in parts.items() if ml[s]}, affine, image, image_affine)


def _scattered(side: str, part: np.ndarray) -> list[str]:
    box = ndimage.find_objects(part.astype(np.uint8))[0]
    labels, n = ndimage.label(part[box], structure=np.ones((3, 3, 3)))
    largest = np.bincount(labels.ravel())[1:].max() / part.sum()
    return [f"{side} hippocampus in {n} pieces, {100 * largest:.0f} % in the largest"] if largest < PIECES else []


def _misplaced(
    parts: dict[str, np.ndarray], affine: np.ndarray, image: np.ndarray, image_affine: np.ndarray
) -> list[str]:
    """Sides that lie where no hippocampus is."""
    coarse = image[::2, ::2, ::2]
    if not parts or coarse.min() == coarse.max() or not (head := find_foreground(coarse)).any():
        return []
    mm = nib.affines.voxel_sizes(image_affine)
    slices = head.sum(axis=(1, 2))
    across = 2 * np.flatnonzero(slices > 0.25 * slices.max()) * mm[0]  # ears do not count
    along = 2 * np.flatnonzero(head.any(axis=(0, 2))) * mm[1]
    top = 2 * float(np.flatnonzero(head.any(axis=(0, 1))).max()) * mm[2]
    width = max(float(np.ptp(across)), float(mm[0]))
    to_image = np.linalg.inv(image_affine) @ affine
    marks = []
    for side, part in parts.items():
        x, y, z = nib.affines.apply_affine(to_image, np.argwhere(part).mean(axis=0)) * mm
        outwards = (across.mean() - x) if side == "left" else (x - across.mean())
        places = (outwards, y - (along.min() + along.max()) / 2, top - z)
        found = [
            f"{distance / width:.2f} head widths {name}"
            for (name, (low, high)), distance in zip(_PLACES.items(), places, strict=True)
            if not low <= distance / width <= high
        ]
        if found:
            marks.append(f"{side} hippocampus outside the middle of the head ({', '.join(found)})")
    return marks
