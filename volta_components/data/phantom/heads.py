# SPDX-License-Identifier: Apache-2.0
"""Label maps of whole heads as anatomies that phantoms grow from."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from volta_components.data.phantom.anatomy import CENTRE, Anatomy, surface_points
from volta_components.data.phantom.deformation import box_around, volume_field
from volta_components.data.phantom.labels import (
    CODES,
    HIPPOCAMPI,
    TISSUE,
    VENTRICLE_CODES,
    LabelMap,
    is_code,
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
        copies: of ``codes``, on the devices that heads were rendered on.
    """

    codes: NDArray[np.uint8]
    has_outside: bool
    hippocampi: tuple[slice, slice, slice]
    copies: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def codes_on(self, device: torch.device) -> torch.Tensor:
        """``codes`` on a device, copied there once."""
        if device not in self.copies:
            self.copies[device] = torch.from_numpy(self.codes).to(device)
        return self.copies[device]


def make_head(label_map: LabelMap) -> Head:
    """Prepare a label map for rendering: its box, and the fields of the known effects, computed from this anatomy."""
    brain = TISSUE[label_map.codes]
    centre = np.array([(side.start + side.stop - 1) // 2 for side in ndimage.find_objects(brain.view(np.uint8))[0]])
    low = CENTRE - centre - _MARGIN
    shape = np.array(label_map.codes.shape)
    box = box_around(low, low + shape + 2 * _MARGIN - 1, _GRID, squarings=4)
    codes = np.zeros(box.voxels, np.uint8)
    codes[tuple(slice(_MARGIN, _MARGIN + n) for n in shape)] = with_muscles(label_map.codes, label_map.digest)
    coarse = codes[::2, ::2, ::2]

    def share(*wanted: int) -> NDArray[np.float32]:
        return is_code(*wanted)[coarse].astype(np.float32)

    surface = surface_points(TISSUE[codes], box, 6)
    return Head(
        name=label_map.name,
        box=box,
        centre=CENTRE,
        hippocampus_left=volume_field(share(CODES["hippocampus_left"]), box, 2, 4.0, 12.0),
        hippocampus_right=volume_field(share(CODES["hippocampus_right"]), box, 2, 4.0, 12.0),
        ventricles=volume_field(share(*VENTRICLE_CODES), box, 2, 4.0, 16.0),
        surface=surface[:: max(1, math.ceil(len(surface) / 1000))],
        random_scales=((8.0, 1.0), (24.0, 3.0)),
        field=HEAD_FIELD,
        middle=_MIDDLE,
        codes=codes,
        has_outside=label_map.has_outside,
        hippocampi=_part_of(is_code(*(CODES[name] for name in HIPPOCAMPI))[codes]),
    )


def with_muscles(codes: NDArray[np.uint8], digest: str) -> NDArray[np.uint8]:
    """Codes whose thick soft tissue has muscles with fat between them, and vessels: the same ones for an anatomy.

    A label map has one number for all of face and neck; rendered as one tissue, they look like a block of plaster.

    Args:
        codes: ``[X, Y, Z]``.
        digest: hexadecimal, of the label map; draws the muscles.
    """
    soft = is_code(CODES["scalp"])[codes[::2, ::2, ::2]]
    deep = ndimage.minimum_filter(soft, size=5)
    # Longer from top to bottom than they are thick, which is about 8 mm.
    rng = np.random.default_rng(int(digest[:16], 16))
    bundles, vessels = (
        ndimage.gaussian_filter(rng.standard_normal(deep.shape, dtype=np.float32), width, mode="wrap")
        for width in ((2.0, 2.0, 6.0), (1.0, 1.0, 4.0))
    )
    muscle = deep & (np.abs(bundles) > 0.4 * bundles.std())
    vessel = deep & (vessels > 2.2 * vessels.std())
    result = codes.copy()
    for found, name in ((muscle, "other_tissue"), (vessel, "sinus")):  # a brain's vessel would count as brain
        fine = np.kron(found, np.ones((2, 2, 2), bool))
        result[fine[tuple(slice(side) for side in codes.shape)]] = CODES[name]
    return result


def _part_of(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    x, y, z = (slice(side.start - 1, side.stop + 1) for side in ndimage.find_objects(mask.view(np.uint8))[0])
    return x, y, z


@functools.lru_cache(maxsize=32)
def load_head(name: str, path: str) -> Head:
    """Read and prepare a label map; the last ones are kept for the process (about 15 MB each)."""
    return make_head(read_label_map(name, Path(path)))


def lookup_codes(head: Head, voxels: torch.Tensor) -> torch.Tensor:
    """The nearest voxel's code, ``[X, Y, Z]`` uint8, at ``[3, X, Y, Z]`` fractional voxels; air beyond the map."""
    shape = head.codes.shape
    # The outermost voxels are air: what lies beyond may as well be there.
    x, y, z = (along.add(0.5).clamp_(0, n - 1).to(torch.int32) for along, n in zip(voxels, shape, strict=True))
    flat = x.mul_(shape[1]).add_(y).mul_(shape[2]).add_(z)
    return look_up(head.codes_on(voxels.device).reshape(-1), flat)


def look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]``, several times as fast, for a table of one axis and an index that fits int32."""
    return table.index_select(0, index.reshape(-1).int()).reshape(index.shape)


def sample_tables(head: Head, tables: NDArray[np.float32], voxels: torch.Tensor, spacing: int) -> torch.Tensor:
    """Values for each code, sampled linearly at places of the label map, each voxel as the mean of its ``spacing`` mm.

    Args:
        head: the anatomy.
        tables: ``[C, 256]`` values of each code.
        voxels: ``[3, X, Y, Z]`` fractional voxels of the label map, on a grid that is bent a little.
        spacing: mm, whole.

    Returns:
        ``[C, X, Y, Z]`` float32.
    """
    # The grid's faces show how far it reaches.
    faces = [voxels.select(axis, end) for axis in (1, 2, 3) for end in (0, -1)]
    first = torch.stack([face.amin(dim=(1, 2)) for face in faces]).amin(dim=0).tolist()
    last = torch.stack([face.amax(dim=(1, 2)) for face in faces]).amax(dim=0).tolist()
    window = []
    for length, low, high in zip(head.codes.shape, first, last, strict=True):
        start = int(np.clip(math.floor(low) - 4, 0, length - 2 * spacing))
        window.append(slice(start, int(np.clip(math.ceil(high) + 5 + spacing, start + 2 * spacing, length))))
    part = _pooled(head.codes_on(voxels.device)[tuple(window)], tables, spacing)[None]
    places = torch.empty((*voxels.shape[1:], 3), device=voxels.device)
    for axis, (side, size) in enumerate(zip(window, part.shape[2:], strict=True)):
        # Voxel i of the pooled map has its centre at start + spacing * i + (spacing - 1) / 2.
        scale = 2 / (spacing * (size - 1))
        shift = -(side.start + (spacing - 1) / 2) * scale - 1
        torch.add(voxels[axis] * scale, shift, out=places[..., 2 - axis])
    sampled = torch.nn.functional.grid_sample(
        part, places[None], mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled[0]


def _pooled(codes: torch.Tensor, tables: NDArray[np.float32], width: int) -> torch.Tensor:
    """Values of ``[X, Y, Z]`` codes, ``[C, x, y, z]``: each the mean over a block of ``width`` voxels a side.

    Of each block, ``width ** 2`` voxels are looked at, one in each row along every axis (a Latin square); all of them
    would take ``width`` times as long, and differ little.
    """
    each = torch.from_numpy(tables).to(codes.device)
    if width == 1:
        return torch.stack([look_up(table, codes) for table in each])
    shape = tuple(length // width for length in codes.shape)
    values = torch.zeros((len(tables), *shape), device=codes.device)
    for i, j in itertools.product(range(width), repeat=2):
        first = (i, j, (i + j) % width)
        x, y, z = (slice(a, a + width * (n - 1) + 1, width) for a, n in zip(first, shape, strict=True))
        for table, total in zip(each, values, strict=True):
            total.add_(look_up(table, codes[x, y, z]))
    return values.div_(width**2)


_SIDES = np.stack([is_code(CODES[name]) for name in HIPPOCAMPI]).astype(np.float32)


def hippocampus_shares(head: Head, voxels: torch.Tensor, spacing: int, out: torch.Tensor) -> torch.Tensor:
    """Shares of both hippocampi, left first, in voxels as ``sample_tables`` takes them.

    Args:
        head: the anatomy.
        voxels: ``[3, X, Y, Z]``, see ``sample_tables``.
        spacing: mm, whole.
        out: ``[2, X, Y, Z]`` of zeros; the shares are written where there are any.

    Returns:
        ``[2]`` float64, their sums.
    """
    # Every fourth voxel tells where the hippocampi are; its neighbours lie within some mm of it.
    margin = 2 * spacing
    within = [
        (along > side.start - margin) & (along < side.stop - 1 + margin)
        for along, side in zip(voxels[:, ::4, ::4, ::4], head.hippocampi, strict=True)
    ]
    places = torch.stack(within).all(dim=0).nonzero()
    if not len(places):
        return torch.zeros(2, dtype=torch.float64, device=voxels.device)
    low, high = (places.amin(dim=0) * 4 - 4).tolist(), (places.amax(dim=0) * 4 + 5).tolist()
    x, y, z = (slice(max(0, a), b) for a, b in zip(low, high, strict=True))
    shares = sample_tables(head, _SIDES, voxels[:, x, y, z], spacing)
    out[:, x, y, z] = shares
    return shares.sum(dim=(1, 2, 3), dtype=torch.float64)
