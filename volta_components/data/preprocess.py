# SPDX-License-Identifier: Apache-2.0
"""From a scan in any orientation to the window that the networks see: one map, one resampling.

The stock way is a MONAI ``Compose`` of ``Orientationd``, ``Spacingd``, ``CropForegroundd``, ``ResizeWithPadOrCropd``
and ``ScaleIntensityRangePercentilesd``. It is not used here for two reasons. Each step holds a float32 copy of the
whole scan, and ``Spacingd`` a float64 one with a sampling grid three times as large, while most of a big scan is
thrown away by the crop that follows; here, the crop is found first and only the window is ever computed, out of the
voxels as they are stored. And a cropped or shifted grid that is rounded in each step drifts; here, the whole way from
target voxel to source voxel is one affine map, so that a landmark stays where it was.
``tests/data/test_preprocess.py`` compares the result with MONAI's and SciPy's own resampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec, obliquity, voxel_sizes

from volta_components.data.cuts import FACES
from volta_components.data.resample import orthogonal_axes, resample, resample_label
from volta_components.data.skull import is_stripped
from volta_components.data.survey import MAYBE_STRIPPED, Survey, block_middles, coarse_affine, survey
from volta_components.data.unusable import UnusableVoxels
from volta_components.data.volumes import Volume

PERCENTILES = (0.5, 99.5)
# How far the middle of a brain lies behind that of its head, and its top below the head's, mm along RAS axes, by label
# maps of 15 whole heads (10 behind, deviation 7; 12 below with the fluid around it, 17 without, deviation 3).
BRAIN_IN_HEAD = np.array([0.0, 10.0, 14.0])


@dataclass(frozen=True)
class Settings:
    """What decides the prepared voxels.

    Attributes:
        spacing: of the target grid, mm per axis (left-right, back-front, bottom-top).
        shape: of the target grid, voxels per axis.
        dtype: ``float32``, or ``uint16``/``uint8`` with NIfTI's scale factor, which a reader turns into [0, 1] again.
        assume_orientation: axis codes for scans whose header has no orientation; None refuses these.
        masked: whether scans are prepared with their brain masks applied.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shape: tuple[int, int, int] = (144, 192, 192)
    dtype: str = "float32"
    assume_orientation: str | None = None
    masked: bool = False


@dataclass(frozen=True)
class Prepared:
    """One prepared volume with what was measured on the way.

    Attributes:
        image: ``shape`` of the settings, float32 in [0, 1].
        label: the same shape, uint8, or None.
        affine: ``[4, 4]``, target voxel to world mm.
        code: NIfTI code of the affine.
        digest: see :class:`volta_components.data.survey.Survey`.
        quality: plain numbers and strings for the QC table.
        warnings: what the user should look at.
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    code: int
    digest: str
    quality: dict[str, Any]
    warnings: list[str]


def shift_of_a_brain(room: np.ndarray) -> np.ndarray:
    """How far a window moves so that a brain without skull lies in it as with its head, ``[3]`` mm along RAS axes.

    Args:
        room: ``[3]`` mm that the window is longer than the brain; there is no shift beyond it.
    """
    return np.clip(room / (2, 2, 1), 0, BRAIN_IN_HEAD)


def place_window(
    seen: Survey, settings: Settings, label_points: np.ndarray | None = None, stripped: bool = False
) -> tuple[np.ndarray, dict[str, float]]:
    """Choose the target grid: along the scan's own axes, centred on the head, anchored at its top.

    The axes stay those of the scan (no rotation is interpolated; the affine keeps the obliquity), in RAS order. The
    window's top lies one voxel above the top of the foreground. Left-right and back-front, it is centred on the
    bounding box of that part of the foreground that the window's height holds, so that a neck does not move it.
    A brain without skull is placed about where it would lie with its head, as far as the window has room for that: the
    same network sees both, and where a brain lies should not say which of them it is.
    With labels, it is then moved just as far as it takes to hold every labelled voxel. Where the scan has the target's
    spacing already, the grid is put on the scan's own voxels, so that nothing is interpolated.

    Args:
        seen: the scan.
        settings: spacing and shape of the window.
        label_points: ``[n, 3]``, world mm of labelled voxels (or their bounding corners), to be held.
        stripped: whether the scan shows a brain without skull.

    Returns:
        ``[4, 4]`` affine of the target grid; shares of the foreground that are cut (``total`` and each of ``FACES``).

    Raises:
        UnusableVoxels: if there is no foreground, or the labels do not fit the window.
    """
    if not seen.foreground.any():
        raise UnusableVoxels("nothing stands out from the background", "look at it; it may hold no head")
    axes = orthogonal_axes(seen.affine)
    spacing, shape = np.asarray(settings.spacing, float), np.asarray(settings.shape)
    # Foreground voxels in units of target voxels along the target's axes, from an arbitrary origin; half of one's size.
    to_target, coarse = np.linalg.inv(axes * spacing), coarse_affine(seen)
    points = (to_target @ apply_affine(coarse, np.argwhere(seen.foreground)).T).T
    half = np.abs(to_target @ coarse[:3, :3]).sum(axis=1) / 2
    top = points[:, 2].max() + half[2] + 1.0
    kept = points[points[:, 2] > top - shape[2]]
    low, high = kept.min(axis=0) - half, kept.max(axis=0) + half
    start = (low + high) / 2 - shape / 2  # outer corner of the window's first voxel
    start[2] = top - shape[2]
    if stripped:
        start += shift_of_a_brain((shape - (high - low) - (0, 0, 1)) * spacing) / spacing
    if label_points is not None and len(label_points):
        labelled = (to_target @ label_points.T).T
        # Half a voxel more: the label's outermost voxels have an extent, and half another for interpolation.
        first, last = labelled.min(axis=0) - 1.0, labelled.max(axis=0) + 1.0
        if (last - first > shape).any():
            need = np.ceil(last - first).astype(int)
            raise UnusableVoxels(
                f"labels span {'x'.join(map(str, need))} voxels, more than the window's {'x'.join(map(str, shape))}",
                "choose a larger --shape, or look at the label file",
            )
        start = np.maximum(np.minimum(start, first), last - shape)
    first_centre = start + 0.5
    # Put the grid on the scan's own voxels (an affine map of the grid by less than half a voxel).
    origin = to_target @ seen.affine[:3, 3]
    first_centre = origin + np.round(first_centre - origin)
    start = first_centre - 0.5
    before, after = points < start, points > start + shape
    cut = {side: float(np.mean((before if place == 0 else after)[:, axis])) for side, (axis, place) in FACES.items()}
    cut["total"] = float(np.mean((before | after).any(axis=1)))
    return from_matvec(axes * spacing, axes * spacing @ first_centre), cut


def _percentile_range(seen: Survey, window: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5 of the foreground within the window, stored units, from one source voxel per block."""
    sampled = block_middles(seen)
    index = np.argwhere(seen.foreground)
    position = apply_affine(np.linalg.inv(window) @ coarse_affine(seen), index)
    inside = ((position > -0.5) & (position < np.asarray(shape) - 0.5)).all(axis=1)
    values = sampled[tuple(index[inside].T)]
    if values.size == 0:
        values = sampled[seen.foreground]
    low, high = np.percentile(values, PERCENTILES)
    if high <= low:
        low, high = seen.minimum, seen.maximum
    return float(low), float(high)


def snr_like(image: np.ndarray) -> float | None:
    """Mean of the foreground over its noise, which is told from second differences along the left-right axis.

    Works with and without a background, unlike the usual ratio with the air's deviation. None when there is too little
    foreground (above 0.1) or no noise at all. The image ``[X, Y, Z]`` is in [0, 1].
    """
    part = image[:, ::2, ::2]
    middle = part[1:-1]
    mask = (middle > 0.1) & (part[:-2] > 0.1) & (part[2:] > 0.1)
    if mask.sum() < 50:
        return None
    difference = (middle - (part[:-2] + part[2:]) / 2)[mask]
    # A MAD of 1 is a deviation of 1.4826; a second difference of white noise has 1.5 times its variance.
    noise = 1.4826 * float(np.median(np.abs(difference - np.median(difference)))) / np.sqrt(1.5)
    return float(middle[mask].mean() / noise) if noise > 0 else None


def on_grid(volume: Volume, settings: Settings) -> bool:
    """Whether a volume has the grid of prepared ones: shape, spacing and RAS order; its axes may be oblique."""
    return (
        volume.voxels.shape == settings.shape
        and np.allclose(voxel_sizes(volume.affine), settings.spacing, rtol=0, atol=1e-3)
        and nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    )


def prepare_volume(
    volume: Volume,
    settings: Settings,
    label: np.ndarray | None = None,
    label_affine: np.ndarray | None = None,
    has_mask: bool = False,
) -> Prepared:
    """Take one scan to the target grid and to [0, 1], with its label map if there is one.

    Args:
        volume: the scan.
        settings: the target.
        label: ``[X, Y, Z]`` integers on the scan's grid, in RAS order, or None.
        label_affine: ``[4, 4]`` of the label map.
        has_mask: whether a brain mask was applied to the scan, which counts as stripped then.

    Raises:
        UnusableVoxels: if the voxels cannot be used (see ``survey`` and :func:`place_window`).
    """
    seen = survey(volume)
    points = None
    if label is not None:
        assert label_affine is not None
        points = apply_affine(label_affine, np.argwhere(label))
    looks_stripped = is_stripped(seen)
    stripped = has_mask or looks_stripped
    window, cut = place_window(seen, settings, points, stripped)
    low, high = _percentile_range(seen, window, settings.shape)
    image = resample(seen.voxels, seen.affine, window, settings.shape, fill=low)
    image -= np.float32(low)
    image *= np.float32(1 / (high - low))
    np.clip(image, 0, 1, out=image)

    head = image > 0.1
    warnings = [*volume.warnings, *(note for note in seen.warnings if not (stripped and MAYBE_STRIPPED in note))]
    if has_mask and not looks_stripped:
        warnings.append("it does not look stripped, although its brain mask was applied")
    quality: dict[str, Any] = {
        "spacing": "x".join(f"{s:.3g}" for s in voxel_sizes(volume.affine)),
        "orientation": "".join(nib.aff2axcodes(volume.affine)),
        "oblique_degrees": round(float(np.rad2deg(obliquity(volume.affine).max())), 2),
        "shape": "x".join(map(str, volume.voxels.shape)),
        "type": str(volume.voxels.dtype),
        "minimum": seen.minimum * volume.slope + volume.intercept,
        "maximum": seen.maximum * volume.slope + volume.intercept,
        "low": low * volume.slope + volume.intercept,
        "high": high * volume.slope + volume.intercept,
        "foreground_fraction": round(float(head.mean()), 5),
        "mean": round(float(image[head].mean()), 5) if head.any() else 0.0,
        "snr": None if (snr := snr_like(image)) is None else round(snr, 2),
        "stripped": stripped,
        "cut": round(cut["total"], 5),
        **{f"cut_{side}": round(cut[side], 5) for side in FACES},
    }
    result_label = None
    if label is not None and label_affine is not None:
        result_label, ratios = resample_label(label, label_affine, window, settings.shape)
        for value, ratio in ratios.items():
            if abs(ratio - 1) > 0.02:
                warnings.append(f"label {value} changed its volume by {100 * (ratio - 1):+.1f} %")
        if ratios:
            voxel = float(np.prod(settings.spacing))
            quality["label_volume_mm3"] = {str(v): round(float((result_label == v).sum()) * voxel, 1) for v in ratios}
            quality["label_volume_ratio"] = {str(v): round(r, 5) for v, r in ratios.items()}
    return Prepared(image, result_label, window, volume.code, seen.digest, quality, warnings)
