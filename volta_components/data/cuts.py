# SPDX-License-Identifier: Apache-2.0
"""Where a head is cut: by the faces of its field of view, or by blank voxels at any angle."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

# Each side of a volume: the axis that leads to it, and the place of its face there.
FACES = {"left": (0, 0), "right": (0, -1), "back": (1, 0), "front": (1, -1), "bottom": (2, 0), "top": (2, -1)}
OTHER_AXES = ((1, 2), (0, 2), (0, 1))  # of each axis
# Share of the head's largest cross-section on a face of the field of view, beyond which the head is cut there. Whole
# heads (one real, one template, 6 phantoms, 8 label maps) have up to 0.07 on these faces, 0.10 at the front. Without
# 10 mm of the left or right, those that are scans have 0.13 to 0.40; without 10 mm of the back, 0.08 to 0.34.
FACE_LIMITS = {"left": 0.12, "right": 0.12, "back": 0.12, "front": 0.2, "bottom": 0.2, "top": 0.12}
# A head that the bottom cuts is complete down to the cerebellum when it is this high, in widths.
LEAST_HEIGHT = 0.92
# The same share on an oblique plane. Whole heads have up to 0.22, at their sides (one real scan and phantoms of two
# kinds); from 0.3 on, a plane starts to move the window.
_PLANE_LIMIT, _DIRECTIONS = 0.3, 1200
# Share of the surface above, beside and behind the brain that borders on blank voxels, beyond which these cut the head.
_BLANK_LIMIT = 0.05
# Area of a block of one value on a face of the field of view, beyond which it is marked.
_BLOCK_MM2 = 400


def find_cuts(foreground: np.ndarray, coarse: np.ndarray, mm: np.ndarray) -> list[str]:
    """Say where the head goes on beyond the field of view, or where blank voxels cut it.

    Args:
        foreground: ``[x, y, z]`` bool, the head.
        coarse: ``[x, y, z]``, the scan.
        mm: spacing of both, mm.
    """
    blank = [np.ptp(coarse, axis=others) == 0 for others in OTHER_AXES]
    box = tuple(slice(int(np.argmin(b)), len(b) - int(np.argmin(b[::-1]))) for b in blank)
    mask = foreground[box]
    if not mask.any():
        return []
    return (
        _on_faces(mask, mm)
        or _on_a_plane(mask, mm)
        or _on_blank_voxels(mask, coarse[box], mm)
        or _blocks(foreground, coarse, mm)
    )


def _flat(coarse: np.ndarray) -> np.ndarray:
    """Voxels all of whose neighbours have their value."""
    flat: np.ndarray = ndimage.maximum_filter(coarse, 3) == ndimage.minimum_filter(coarse, 3)
    return flat


def _blocks(foreground: np.ndarray, coarse: np.ndarray, mm: np.ndarray) -> list[str]:
    """Blocks of one value, as bright as the head, between it and a face of the field of view."""
    if foreground.all():
        return []
    block = foreground & _flat(coarse) & (coarse > np.median(coarse[~foreground]))
    found = []
    for side, (axis, place) in FACES.items():
        area = block.take(place, axis=axis).sum() * np.prod(np.delete(mm, axis))
        if side != "bottom" and area > _BLOCK_MM2:
            found.append(f"a block of one value lies against the head at the {side}: padding?")
    return found


def _on_faces(mask: np.ndarray, mm: np.ndarray) -> list[str]:
    """Sides at which the field of view ends within the head, or its slices are blank from there on.

    A head's outermost slice is a small cap. Where it is a large part of the largest cross-section, the head goes on
    beyond the field of view. The neck does so always; it is too much where the head above it is lower than a whole one.
    """
    areas = [mask.sum(axis=others).astype(float) for others in OTHER_AXES]
    extents = [float(np.ptp(np.flatnonzero(area)) + 1) * mm[axis] for axis, area in enumerate(areas)]
    found = []
    for side, (axis, place) in FACES.items():
        area = areas[axis] if place == 0 else areas[axis][::-1]
        # Of two slices, since the last one may hold a part of a voxel; each less the cap of a ball of the head's size.
        shares = [area[k] / area.max() - 4 * (k + 1) * mm[axis] / extents[axis] for k in range(min(2, len(area)))]
        if max(shares) <= FACE_LIMITS[side]:
            continue
        if side == "bottom":
            width = float((areas[0] > 0.25 * areas[0].max()).sum()) * mm[0]
            if extents[2] >= LEAST_HEIGHT * width:
                continue
        found.append(
            f"the field of view ends within the head at the {side} ({100 * area[:2].max() / area.max():.0f} % of its "
            "largest cross-section lie there)"
        )
    return found


def _is_face_or_neck(directions: np.ndarray) -> np.ndarray:
    """Which directions from a head's middle ``[n, 3]`` (unit length) lead to where it is no ball, or is defaced."""
    x, y, z = directions.T
    return (z < -0.25) | ((np.abs(x) < 0.4) & (y > 0.3) & (z < 0.3))


def _on_a_plane(mask: np.ndarray, mm: np.ndarray) -> list[str]:
    """An oblique plane on which the head ends, as where a half of the volume is blank."""
    step = [max(1, round(4 / side)) for side in mm]
    mask, mm = mask[tuple(slice(None, None, s) for s in step)], mm * step
    areas = [mask.sum(axis=others) * np.prod(mm[list(others)]) for others in OTHER_AXES]
    thick = 6.0
    filled = np.flatnonzero(mask.any(axis=(1, 2)))
    if not filled.size or np.ptp(filled) * mm[0] < 10 * thick:  # no head of usual size
        return []
    number = np.arange(_DIRECTIONS) + 0.5
    down, around = np.arccos(1 - 2 * number / _DIRECTIONS), np.pi * (1 + np.sqrt(5)) * number
    directions = np.stack([np.cos(around) * np.sin(down), np.sin(around) * np.sin(down), np.cos(down)], axis=1)
    directions = directions[~_is_face_or_neck(directions)]
    surface = np.argwhere(mask & ~ndimage.binary_erosion(mask, iterations=2)) * mm
    places = surface.astype(np.float32) @ directions.T.astype(np.float32)
    slabs = (places > places.max(axis=0) - thick).sum(axis=0) * np.prod(mm) / thick
    share = float(slabs.max()) / float(max(area.max() for area in areas))
    if share <= _PLANE_LIMIT:
        return []
    x, y, z = directions[int(slabs.argmax())]
    towards = {"right": x, "left": -x, "front": y, "back": -y, "top": z}
    names = [side for side, part in towards.items() if part > 0.4]
    return [
        f"the head ends on a plane at the {' and '.join(names) or 'side'} ({100 * share:.0f} % of its largest "
        "cross-section lie there): cut?"
    ]


def _on_blank_voxels(mask: np.ndarray, coarse: np.ndarray, mm: np.ndarray) -> list[str]:
    """Blank voxels that border on the head, in a scan whose air has noise."""
    # One value throughout, and not as a whole slice, which is noted apart.
    flat = _flat(coarse) & ~mask
    for others in OTHER_AXES:
        flat &= np.ptp(coarse, axis=others, keepdims=True) > 0
    if not 0.005 < flat.sum() / max(1, (~mask).sum()) < 0.7:
        return []
    surface = mask & ~ndimage.binary_erosion(mask)
    upper = np.argwhere(mask.any(axis=(0, 1))).max() * mm[2] - 0.5 * np.ptp(np.argwhere(mask.any(axis=(1, 2)))) * mm[0]
    places = np.argwhere(surface) * mm
    middle = np.array([*((np.argwhere(mask).min(axis=0) + np.argwhere(mask).max(axis=0)) * mm / 2)[:2], upper])
    away = places - middle
    away /= np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-6)
    counted = ~_is_face_or_neck(away) & (away[:, 2] > -0.25)
    near = ndimage.binary_dilation(flat, iterations=3)[surface]
    share = float(near[counted].mean()) if counted.any() else 0.0
    return [f"{100 * share:.0f} % of the head's surface border on blank voxels: cut?"] if share > _BLANK_LIMIT else []
