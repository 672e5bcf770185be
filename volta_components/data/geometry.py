# SPDX-License-Identifier: Apache-2.0
"""Affines of volumes: which are plausible, what to assume if there is none, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import axcodes2ornt

from volta_components.data.unusable import UnusableVolume
from volta_components.errors import InputError

MAX_VOXELS = 2**30
SPACING_RANGE = (0.05, 20.0)
# Two affines that differ by less than this agree.
_TOLERANCE_MM, _TOLERANCE_DEGREES, _TOLERANCE_SIZE = 1.0, 1.0, 0.01


def check_geometry(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> tuple[int, int, int]:
    """Check the dimensions and the affine of a volume of any format; give its three dimensions.

    Further axes of length 1 are dropped. The affine is ``[4, 4]``, voxel to world mm.

    Raises:
        UnusableVolume: if it is not 3-D, huge, or has an affine that no scan has.
    """
    if len(shape) > 3 and all(n == 1 for n in shape[3:]):
        shape = shape[:3]
    if len(shape) != 3:
        kind = "x".join(map(str, shape)) or "no dimensions"
        remedy = (
            "give one 3-D volume (split it, or take the mean or the first)" if len(shape) > 3 else "give a 3-D volume"
        )
        raise UnusableVolume(path, f"{len(shape)}-D ({kind}) instead of a 3-D volume", remedy)
    if min(shape) < 2:
        raise UnusableVolume(path, f"not a volume: {'x'.join(map(str, shape))} voxels", "give a 3-D volume")
    voxels = int(np.prod(shape, dtype=np.float64))
    if voxels > MAX_VOXELS:
        raise UnusableVolume(
            path,
            f"huge: {'x'.join(map(str, shape))} voxels, more than {MAX_VOXELS:,}",
            "the header is probably damaged; fetch it again, or downsample the volume first",
        )
    if reason := unusable_axes(affine):
        raise UnusableVolume(path, reason, "convert it from its source again")
    if (far := float(np.abs(affine[:3, 3]).max())) > 1e5:
        raise UnusableVolume(
            path, f"implausible affine: the volume lies {far / 1000:.3g} m from the origin", "convert it again"
        )
    spacing = voxel_sizes(affine)
    if not plausible(spacing):
        raise UnusableVolume(
            path,
            f"implausible spacing {by(spacing, ' x ')} mm",
            f"from {SPACING_RANGE[0]:g} to {SPACING_RANGE[1]:g} mm is accepted; the header's units may not be mm",
        )
    return shape[0], shape[1], shape[2]


def unusable_axes(affine: np.ndarray) -> str | None:
    """What is wrong with an affine ``[4, 4]`` whatever its units, or None."""
    if not np.isfinite(affine).all():
        return "affine with NaN or Inf"
    spacing = voxel_sizes(affine)
    if (spacing == 0).any() or abs(np.linalg.det(affine[:3, :3] / np.where(spacing == 0, 1, spacing))) < 1e-3:
        return "singular affine: its axes do not span the space"
    return None


def plausible(spacing: np.ndarray) -> bool:
    """Whether voxels may have these sizes, mm."""
    return bool(spacing.min() >= SPACING_RANGE[0] and spacing.max() <= SPACING_RANGE[1])


def same_size(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two voxel sizes, mm, are one but for rounding."""
    return bool((np.abs(first / second - 1) <= _TOLERANCE_SIZE).all())


def by(numbers: Any, between: str = "x") -> str:
    """Numbers in one word, such as ``1x1x1.2``."""
    return between.join(f"{number:.4g}" for number in numbers)


def check_dtype(path: Path, dtype: np.dtype[Any]) -> None:
    """Refuse voxels that are no plain numbers."""
    if dtype.fields is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UnusableVolume(
            path, f"voxels of type {dtype} (colour, complex or extended)", "give a grey-scale volume of a plain type"
        )


def axis_codes(given: str | None) -> str | None:
    """The value of ``--assume-orientation`` in capital letters.

    Raises:
        InputError: unless it names each of the three directions once.
    """
    if given is None:
        return None
    codes = str(given).upper()
    if len(codes) != 3 or any(len(set(pair) & set(codes)) != 1 for pair in ("LR", "AP", "SI")):
        raise InputError(f"--assume-orientation {given}: three axis codes, such as RAS or LPS")
    return codes


def assumed_affine(codes: str, shape: tuple[int, ...], spacing: np.ndarray) -> np.ndarray:
    """Affine of a volume whose axes run towards ``codes`` (such as ``"RAS"``), with its centre at the origin."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(axcodes2ornt(tuple(codes.upper()))):
        affine[int(world), axis] = sign * spacing[axis]
        affine[int(world), 3] = -sign * spacing[axis] * (shape[axis] - 1) / 2
    return affine


def largest_distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far the voxels of two affines ``[4, 4]`` of one shape lie apart at most, mm: it is at a corner."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    return float(np.linalg.norm(apply_affine(first, corners) - apply_affine(second, corners), axis=1).max())


def describe_difference(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> str:
    """In which respects two affines ``[4, 4]`` of one volume of a shape differ, empty where they agree."""
    if unusable_axes(first) is not None:
        return f"the qform is unusable ({unusable_axes(first)})"
    parts = []
    sizes = [voxel_sizes(affine) for affine in (first, second)]
    axes = [affine[:3, :3] / size for affine, size in zip((first, second), sizes, strict=True)]
    codes = [nib.aff2axcodes(affine) for affine in (first, second)]
    mirrored = np.linalg.det(axes[0]) * np.linalg.det(axes[1]) < 0
    if mirrored or any({a, b} == {"L", "R"} for a, b in zip(*codes, strict=True)):
        parts.append("LEFT/RIGHT FLIP")
    # The angle of the rotation between them; the axis that is mirrored is turned back first.
    backs = [1.0 - 2.0 * np.eye(3)[axis] for axis in range(3)] if mirrored else [np.ones(3)]
    traces = [float(np.trace(axes[0] @ np.diag(back) @ np.linalg.inv(axes[1]))) for back in backs]
    degrees = float(np.rad2deg(np.arccos(np.clip((max(traces) - 1) / 2, -1, 1))))
    if degrees > _TOLERANCE_DEGREES:
        parts.append(f"{degrees:.0f} degrees")
    if not same_size(*sizes):
        parts.append(f"voxels of {by(sizes[0])} and {by(sizes[1])} mm")
    if (apart := largest_distance(first, second, shape)) > _TOLERANCE_MM:
        parts.append(f"up to {apart:.1f} mm apart")
    return ", ".join(parts)
