# SPDX-License-Identifier: Apache-2.0
"""Label maps of whole heads as anatomies that phantoms grow from."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from volta_components.data.phantom.anatomy import CENTRE, Anatomy, surface_points
from volta_components.data.phantom.deformation import box_around, volume_field
from volta_components.data.phantom.labels import (
    BRAIN_CODES,
    CODES,
    NAMES,
    VENTRICLE_CODES,
    LabelMap,
    read_label_map,
)

HEAD_FIELD = (168, 216, 192)  # mm; a head without the neck, and some air


_MIDDLE = CENTRE + np.array([0.0, 6.0, 4.0])  # a head reaches farther forwards and upwards than backwards


_MARGIN = 6  # voxels of air around a label map, so that nothing is smeared beyond its edges


_GRID = 4  # mm


@dataclass(frozen=True)
class Head(Anatomy):
    """An anatomy that is a label map.

    Attributes:
        codes: ``[X, Y, Z]`` uint8, codes of ``labels.NAMES`` over the box, 1 mm.
        has_outside: whether there is anything outside the brain.
        hippocampi: the part of ``codes`` that holds both, with a voxel more on each side.
    """

    codes: NDArray[np.uint8]
    has_outside: bool
    hippocampi: tuple[slice, slice, slice]


def is_code(*codes: int) -> NDArray[np.bool_]:
    """``[256]`` which codes are among some; index it with voxels."""
    table = np.zeros(256, bool)
    table[list(codes)] = True
    return table


BRAIN = is_code(*BRAIN_CODES)
VENTRICLES = is_code(*VENTRICLE_CODES)


def make_head(label_map: LabelMap) -> Head:
    """Prepare a label map for rendering: its box, and the fields of the known effects, computed from this anatomy."""
    brain = BRAIN[label_map.codes] & (label_map.codes != CODES["fluid"])
    places = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    centre = np.array([(place[0] + place[-1]) // 2 for place in places])
    low = CENTRE - centre - _MARGIN
    shape = np.array(label_map.codes.shape)
    box = box_around(low, low + shape + 2 * _MARGIN - 1, _GRID, squarings=4)
    codes = np.zeros(box.voxels, np.uint8)
    codes[tuple(slice(_MARGIN, _MARGIN + n) for n in shape)] = label_map.codes
    coarse = codes[::2, ::2, ::2]

    def share(*wanted: int) -> NDArray[np.float32]:
        return is_code(*wanted)[coarse].astype(np.float32)

    surface = surface_points(BRAIN[codes] & (codes != CODES["fluid"]), box, 6)
    return Head(
        name=label_map.name,
        box=box,
        centre=CENTRE,
        hippocampus_left=volume_field(share(CODES["hippocampus_left"]), box, 2, 3.0, 10.0),
        hippocampus_right=volume_field(share(CODES["hippocampus_right"]), box, 2, 3.0, 10.0),
        ventricles=volume_field(share(*VENTRICLE_CODES), box, 2, 4.0, 16.0),
        surface=surface[:: max(1, math.ceil(len(surface) / 1000))],
        random_scales=((8.0, 1.0), (24.0, 3.0)),
        field=HEAD_FIELD,
        middle=_MIDDLE,
        codes=codes,
        has_outside=label_map.has_outside,
        hippocampi=_part_of(is_code(CODES["hippocampus_left"], CODES["hippocampus_right"])[codes]),
    )


def _part_of(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    places = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    x, y, z = (slice(int(place[0]) - 1, int(place[-1]) + 2) for place in places)
    return x, y, z


@functools.lru_cache(maxsize=32)
def load_head(name: str, path: str) -> Head:
    """Read and prepare a label map; the last ones are kept for the process (about 15 MB each)."""
    return make_head(read_label_map(name, Path(path)))


def code_positions(head: Head, positions: torch.Tensor) -> torch.Tensor:
    """Positions from -1 to 1 as (fractional) voxels of the label map: ``[..., 3]``."""
    sides = torch.tensor([(n - 1) / 2 for n in head.codes.shape])
    return (positions + 1) * sides


def lookup_codes(head: Head, voxels: torch.Tensor) -> NDArray[np.uint8]:
    """The nearest voxel's code at ``[..., 3]`` fractional voxels; air beyond the label map."""
    flat = torch.zeros(voxels.shape[:-1], dtype=torch.int32)
    for axis, length in enumerate(head.codes.shape):
        # The outermost voxels are air: what lies beyond may as well be there.
        flat.mul_(length).add_(voxels[..., axis].add(0.5).clamp_(0, length - 1).to(torch.int32))
    found: NDArray[np.uint8] = head.codes.reshape(-1).take(flat.numpy())
    return found


def sample_tables(head: Head, tables: NDArray[np.float32], voxels: torch.Tensor, spacing: int) -> torch.Tensor:
    """Values for each code, sampled linearly at places of the label map, each voxel as the mean of its ``spacing`` mm.

    Args:
        head: the anatomy.
        tables: ``[C, 256]`` values of each code.
        voxels: ``[X, Y, Z, 3]`` fractional voxels of the label map, on a grid that is bent a little.
        spacing: mm, whole.

    Returns:
        ``[C, X, Y, Z]`` float32.
    """
    # The grid's faces show how far it reaches.
    faces = [voxels.select(axis, end).reshape(-1, 3) for axis in range(3) for end in (0, -1)]
    first = torch.stack([face.amin(dim=0) for face in faces]).amin(dim=0)
    last = torch.stack([face.amax(dim=0) for face in faces]).amax(dim=0)
    window = []
    for axis, length in enumerate(head.codes.shape):
        low = int(np.clip(math.floor(float(first[axis])) - 4, 0, length - 2 * spacing))
        high = int(np.clip(math.ceil(float(last[axis])) + 5 + spacing, low + 2 * spacing, length))
        window.append(slice(low, high))
    codes = head.codes[tuple(window)]
    part = torch.from_numpy(np.stack([table.take(codes) for table in tables]))[None]
    if spacing > 1:
        part = torch.nn.functional.avg_pool3d(part, spacing)
    starts = torch.tensor([side.start for side in window], dtype=torch.float32)
    sizes = torch.tensor(part.shape[2:], dtype=torch.float32)
    # Voxel i of the pooled map has its centre at start + spacing * i + (spacing - 1) / 2.
    scale = 2 / (spacing * (sizes - 1))
    shift = -(starts + (spacing - 1) / 2) * scale - 1
    places = (voxels * scale).add_(shift).flip(-1)[None]
    sampled = torch.nn.functional.grid_sample(part, places, mode="bilinear", padding_mode="border", align_corners=True)
    return sampled[0]


_SIDES = np.stack([is_code(CODES[name]) for name in ("hippocampus_left", "hippocampus_right")]).astype(np.float32)


def hippocampus_shares(head: Head, voxels: torch.Tensor, spacing: int) -> torch.Tensor:
    """Shares of the left and the right hippocampus of the anatomy in each voxel: ``[2, X, Y, Z]``.

    Args:
        head: the anatomy.
        voxels: ``[X, Y, Z, 3]`` fractional voxels of the label map.
        spacing: mm that a voxel is wide, whole.
    """
    shares = torch.zeros((2, *voxels.shape[:-1]))
    near: torch.Tensor | None = None
    for axis, side in enumerate(head.hippocampi):
        along = voxels[..., axis]
        within = (along > side.start - spacing) & (along < side.stop - 1 + spacing)
        near = within if near is None else near.logical_and_(within)
    assert near is not None
    chosen = voxels[near]
    if len(chosen):
        shares[:, near] = sample_tables(head, _SIDES, chosen[:, None, None], spacing)[:, :, 0, 0]
    return shares


__all__ = [
    "BRAIN",
    "HEAD_FIELD",
    "NAMES",
    "VENTRICLES",
    "Head",
    "code_positions",
    "hippocampus_shares",
    "is_code",
    "load_head",
    "lookup_codes",
    "make_head",
    "sample_tables",
]
