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

import hashlib
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy import ndimage, sparse

from volta_components.data.volumes import Volume

SIDES = ("left", "right", "back", "front", "bottom", "top")
PERCENTILES = (0.5, 99.5)
_COARSE_MM = 2.0
_SNAP = 0.02  # voxels: less than this over the whole grid is rounding, not a shift


@dataclass(frozen=True)
class Settings:
    """What decides the prepared voxels.

    Attributes:
        spacing: of the target grid, mm per axis (left-right, back-front, bottom-top).
        shape: of the target grid, voxels per axis.
        dtype: ``float32``, or ``uint16``/``uint8`` with NIfTI's scale factor, which a reader turns into [0, 1] again.
        assume_orientation: axis codes for scans whose header has no orientation; None refuses these.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shape: tuple[int, int, int] = (144, 192, 192)
    dtype: str = "float32"
    assume_orientation: str | None = None


@dataclass(frozen=True)
class Survey:
    """A scan seen at about 2 mm, in one pass over its voxels.

    Attributes:
        voxels: ``[X, Y, Z]`` view in the axis order and directions nearest to RAS.
        affine: ``[4, 4]`` of that view.
        factors: source voxels per coarse voxel, per axis.
        coarse: ``[x, y, z]`` block means, stored units.
        foreground: ``[x, y, z]`` head (or brain), bool: Otsu, largest component, filled.
        digest: SHA-256 of shape and block means: equal for equal voxels, whatever the file format or orientation.
        minimum, maximum: of all voxels, stored units.
    """

    voxels: np.ndarray
    affine: np.ndarray
    factors: tuple[int, int, int]
    coarse: np.ndarray
    foreground: np.ndarray
    digest: str
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Prepared:
    """One prepared volume with what was measured on the way.

    Attributes:
        image: ``shape`` of the settings, float32 in [0, 1].
        label: the same shape, uint8, or None.
        affine: ``[4, 4]``, target voxel to world mm.
        code: NIfTI code of the affine.
        digest: see :class:`Survey`.
        quality: plain numbers and strings for the QC table.
        warnings: what the user should look at.
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    code: int
    digest: str
    quality: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


class UnusableVoxels(ValueError):
    """The voxels of a scan cannot be used; ``args`` are the reason and the remedy."""

    @property
    def reason(self) -> str:
        """What is wrong."""
        return str(self.args[0])

    @property
    def remedy(self) -> str:
        """What to do."""
        return str(self.args[1])


def otsu_threshold(values: np.ndarray, bins: int = 256) -> float:
    """Otsu's threshold of values clipped at their 99.8th percentile (a few bright vessels must not move it).

    Args:
        values: any shape; not all equal.
        bins: of the histogram.

    Returns:
        The threshold that maximises the variance between the two classes; foreground is what lies above it.

    Source: N. Otsu, IEEE Trans. SMC 9(1), 1979. scikit-image's ``threshold_otsu`` is the same on the clipped values.
    """
    top = float(np.percentile(values, 99.8))
    bottom = float(values.min())
    if top <= bottom:
        top = float(values.max())
    counts, edges = np.histogram(np.minimum(values, top), bins=bins, range=(bottom, top))
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    mean_below = np.cumsum(counts * centres) / np.maximum(below, 1)
    mean_above = (np.cumsum((counts * centres)[::-1]) / np.maximum(np.cumsum(counts[::-1]), 1))[::-1]
    between = below[:-1].astype(float) * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(centres[int(np.argmax(between))])


def find_foreground(coarse: np.ndarray) -> np.ndarray:
    """The head (or the brain of a stripped scan) in a coarse volume.

    Above Otsu's threshold, largest connected component, closed and filled, so that ventricles, sulci and bone, which
    are dark, count as inside.

    Args:
        coarse: ``[x, y, z]``, any units.

    Returns:
        ``[x, y, z]`` bool; all False where nothing stands out.
    """
    mask = coarse > otsu_threshold(coarse)
    labels, n = ndimage.label(mask)
    if n == 0:
        return mask
    mask = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    steps = 2 if min(mask.shape) >= 48 else 1
    padded = np.pad(mask, steps + 1)
    padded = ndimage.binary_closing(padded, iterations=steps)
    padded = ndimage.binary_fill_holes(padded)
    inner = slice(steps + 1, -steps - 1)
    return padded[inner, inner, inner] | mask


def survey(volume: Volume) -> Survey:
    """Go over a scan once, slab by slab: defects, range, digest, coarse picture and foreground.

    Raises:
        UnusableVoxels: if there are NaN or infinite voxels, or all are equal.
    """
    orientation = io_orientation(volume.affine)
    if np.isnan(orientation).any():
        raise UnusableVoxels("singular affine: an axis has no direction", "convert it from its source again")
    voxels = apply_orientation(volume.voxels, orientation)
    affine = volume.affine @ inv_ornt_aff(orientation, volume.voxels.shape)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    factors = tuple(int(max(1, min(round(_COARSE_MM / s), n // 8))) for s, n in zip(spacing, voxels.shape, strict=True))
    slab_axis = int(np.argmax(np.abs(voxels.strides)))  # the slowest in memory
    moved = np.moveaxis(voxels, slab_axis, 0)
    f0, f1, f2 = (factors[slab_axis], *(f for axis, f in enumerate(factors) if axis != slab_axis))
    n0, n1, n2 = moved.shape[0] // f0, moved.shape[1] // f1, moved.shape[2] // f2
    coarse = np.empty((n0, n1, n2), np.float32)
    minimum, maximum, nan, infinite = np.inf, -np.inf, 0, 0
    for i in range(-(-moved.shape[0] // f0)):
        slab = moved[i * f0 : (i + 1) * f0]
        if slab.dtype.kind == "f":
            finite = np.isfinite(slab)
            if not finite.all():
                nan += int(np.isnan(slab).sum())
                infinite += int(np.isinf(slab).sum())
                continue
        minimum, maximum = min(minimum, float(slab.min())), max(maximum, float(slab.max()))
        if i < n0:
            block = slab.sum(axis=0, dtype=np.float64 if slab.dtype.kind == "f" else np.int64)
            block = block[: n1 * f1, : n2 * f2].reshape(n1, f1, n2, f2).sum(axis=(1, 3))
            coarse[i] = block / (f0 * f1 * f2)
    if nan or infinite:
        kinds = [f"{name} ({count:,} voxels)" for name, count in (("NaN", nan), ("Inf", infinite)) if count]
        raise UnusableVoxels("contains " + " and ".join(kinds), "convert it again, or repair it in your own way")
    if minimum == maximum:
        raise UnusableVoxels(
            f"constant: every voxel is {minimum * volume.slope + volume.intercept:g}", "fetch it again"
        )
    coarse = np.ascontiguousarray(np.moveaxis(coarse, 0, slab_axis))
    if volume.slope < 0:
        raise UnusableVoxels("negative scale factor (inverted contrast)", "convert it from its source again")
    digest = hashlib.sha256(f"{voxels.shape}".encode() + coarse.tobytes()).hexdigest()
    foreground = find_foreground(coarse) if coarse.min() < coarse.max() else np.zeros(coarse.shape, bool)
    return Survey(voxels, affine, factors, coarse, foreground, digest, minimum, maximum)  # type: ignore[arg-type]


def _coarse_affine(seen: Survey) -> np.ndarray:
    """Affine of the coarse grid: each coarse voxel lies at the centre of its block."""
    scale = np.diag([*seen.factors, 1.0])
    scale[:3, 3] = (np.asarray(seen.factors) - 1) / 2
    return seen.affine @ scale


def _orthogonal_axes(affine: np.ndarray) -> np.ndarray:
    """The rotation nearest to the directions of an affine's axes (polar decomposition); takes out shear."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    u, _, vt = np.linalg.svd(directions)
    return u @ vt


def place_window(
    seen: Survey, settings: Settings, label_points: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, float]]:
    """Choose the target grid: along the scan's own axes, centred on the head, anchored at its top.

    The axes stay those of the scan (no rotation is interpolated; the affine keeps the obliquity), in RAS order. The
    window's top lies one voxel above the top of the foreground. Left-right and back-front, it is centred on the
    bounding box of that part of the foreground that the window's height holds, so that a neck does not move it.
    With labels, it is then moved just as far as it takes to hold every labelled voxel. Where the scan has the target's
    spacing already, the grid is put on the scan's own voxels, so that nothing is interpolated.

    Args:
        seen: the scan.
        settings: spacing and shape of the window.
        label_points: ``[n, 3]``, world mm of labelled voxels (or their bounding corners), to be held.

    Returns:
        ``[4, 4]`` affine of the target grid; shares of the foreground that are cut (``total`` and each of ``SIDES``).

    Raises:
        UnusableVoxels: if there is no foreground, or the labels do not fit the window.
    """
    if not seen.foreground.any():
        raise UnusableVoxels("nothing stands out from the background", "look at it; it may hold no head")
    axes = _orthogonal_axes(seen.affine)
    spacing, shape = np.asarray(settings.spacing, float), np.asarray(settings.shape)
    half = np.abs(np.linalg.inv(axes * spacing) @ _coarse_affine(seen)[:3, :3]).sum(axis=1) / 2
    # Foreground voxels in units of target voxels along the target's axes, from an arbitrary origin.
    to_target = np.linalg.inv(axes * spacing)
    points = (to_target @ nib.affines.apply_affine(_coarse_affine(seen), np.argwhere(seen.foreground)).T).T
    top = points[:, 2].max() + half[2] + 1.0
    kept = points[points[:, 2] > top - shape[2]]
    low, high = kept.min(axis=0) - half, kept.max(axis=0) + half
    start = (low + high) / 2 - shape / 2  # outer corner of the window's first voxel
    start[2] = top - shape[2]
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
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = axes * spacing @ first_centre
    outside = [
        side
        for axis in range(3)
        for side in (points[:, axis] < start[axis], points[:, axis] > start[axis] + shape[axis])
    ]
    cut = {side: float(np.mean(mask)) for side, mask in zip(SIDES, outside, strict=True)}
    cut["total"] = float(np.mean(np.any(outside, axis=0)))
    return affine, cut


def _axis_weights(n_in: int, n_out: int, scale: float, offset: float) -> tuple[sparse.csr_array, np.ndarray]:
    """Weights of source voxels in each target voxel along one axis.

    Linear interpolation; where a target voxel is longer than 1.5 source voxels, the triangle is widened to its length,
    so that fine structure does not alias (as Pillow and ``torch.nn.functional.interpolate(antialias=True)`` do).

    Returns:
        ``[n_out, n_in]`` sparse, rows sum to 1; ``[n_out]`` bool, which target voxels have their centre in the source.
    """
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
    """Resample a scan onto another grid in one step; a mere crop or pad is copied, not interpolated.

    Linear interpolation with protection against aliasing, see :func:`_axis_weights`. Grids whose axes are not parallel
    (a sheared scan) go through ``scipy.ndimage.affine_transform``, each target voxel as the mean of samples within it.

    Args:
        voxels: ``[X, Y, Z]``, any real type.
        affine: ``[4, 4]`` of the scan.
        target: ``[4, 4]`` of the target grid.
        shape: of the target grid.
        fill: value outside the scan, in the scan's units.

    Returns:
        ``shape``, float32, in the scan's units.
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
    """Resample a label map so that each structure keeps its volume.

    Each label's share of every target voxel is computed by linear interpolation, and as many of the fullest voxels are
    taken as make up the structure's volume in the source (a fixed threshold of a half shrinks thin structures; nearest
    neighbour frays them).

    Args:
        label: ``[X, Y, Z]`` integers, 0 is background.
        affine: ``[4, 4]`` of the label map.
        target: ``[4, 4]`` of the target grid.
        shape: of the target grid.

    Returns:
        ``shape``, uint8; and each label's volume after relative to before.
    """
    values = [int(v) for v in np.unique(label) if v != 0]
    # Only the box around the labels matters, and a rim for interpolation.
    rim = 2 + np.ceil(np.linalg.norm((np.linalg.inv(affine) @ target)[:3, :3], axis=0)).astype(int).max()
    box = [
        slice(max(0, int(index.min()) - rim), int(index.max()) + rim + 1) if len(index) else slice(0, 1)
        for index in (np.flatnonzero(label.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3))
    ]
    label = label[tuple(box)]
    affine = affine @ nib.affines.from_matvec(np.eye(3), [part.start for part in box])
    source_mm3, target_mm3 = abs(np.linalg.det(affine[:3, :3])), abs(np.linalg.det(target[:3, :3]))
    result = np.zeros(shape, np.uint8)
    best = np.zeros(shape, np.float32)
    ratios: dict[int, float] = {}
    for value in values:
        mask = label == value
        share = resample(mask.astype(np.uint8), affine, target, shape)
        wanted = round(int(mask.sum()) * source_mm3 / target_mm3)
        candidates = np.flatnonzero((share > 1e-6) & (share > best))
        order = np.argsort(-share.ravel()[candidates], kind="stable")[:wanted]
        chosen = candidates[order]
        result.ravel()[chosen] = value
        best.ravel()[chosen] = share.ravel()[chosen]
    for value in values:
        before = int((label == value).sum()) * source_mm3
        ratios[value] = float((result == value).sum() * target_mm3 / before)
    return result, ratios


def _percentile_range(seen: Survey, window: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5 of the foreground within the window, stored units, from one source voxel per block."""
    sampled = seen.voxels[tuple(slice(f // 2, n * f, f) for f, n in zip(seen.factors, seen.coarse.shape, strict=True))]
    index = np.argwhere(seen.foreground)
    position = nib.affines.apply_affine(np.linalg.inv(window) @ _coarse_affine(seen), index)
    inside = ((position > -0.5) & (position < np.asarray(shape) - 0.5)).all(axis=1)
    values = sampled[tuple(index[inside].T)]
    if values.size == 0:
        values = sampled[seen.foreground]
    low, high = np.percentile(values, PERCENTILES)
    if high <= low:
        low, high = seen.minimum, seen.maximum
    return float(low), float(high)


def snr_like(image: np.ndarray, threshold: float = 0.1) -> float | None:
    """Mean of the foreground over its noise, which is told from second differences along the left-right axis.

    Works with and without a background, unlike the usual ratio with the air's deviation.

    Args:
        image: ``[X, Y, Z]`` in [0, 1].
        threshold: foreground is what lies above it.

    Returns:
        The ratio, or None when there is too little foreground or no noise at all.
    """
    part = image[:, ::2, ::2]
    middle = part[1:-1]
    mask = (middle > threshold) & (part[:-2] > threshold) & (part[2:] > threshold)
    if mask.sum() < 50:
        return None
    difference = (middle - (part[:-2] + part[2:]) / 2)[mask]
    # A MAD of 1 is a deviation of 1.4826; a second difference of white noise has 1.5 times its variance.
    noise = 1.4826 * float(np.median(np.abs(difference - np.median(difference)))) / np.sqrt(1.5)
    return float(middle[mask].mean() / noise) if noise > 0 else None


def on_grid(volume: Volume, settings: Settings) -> bool:
    """Whether a volume has the grid of prepared ones: shape, spacing and RAS order; its axes may be oblique."""
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return (
        volume.voxels.shape == settings.shape
        and np.allclose(spacing, settings.spacing, rtol=0, atol=1e-3)
        and nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    )


def prepare_volume(
    volume: Volume, settings: Settings, label: np.ndarray | None = None, label_affine: np.ndarray | None = None
) -> Prepared:
    """Take one scan to the target grid and to [0, 1], with its label map if there is one.

    Args:
        volume: the scan.
        settings: the target.
        label: ``[X, Y, Z]`` integers on the scan's grid, in RAS order, or None.
        label_affine: ``[4, 4]`` of the label map.

    Raises:
        UnusableVoxels: if the voxels cannot be used (see :func:`survey` and :func:`place_window`).
    """
    seen = survey(volume)
    points = None
    if label is not None:
        assert label_affine is not None
        points = nib.affines.apply_affine(label_affine, np.argwhere(label))
    window, cut = place_window(seen, settings, points)
    low, high = _percentile_range(seen, window, settings.shape)
    image = resample(seen.voxels, seen.affine, window, settings.shape, fill=low)
    image -= np.float32(low)
    image *= np.float32(1 / (high - low))
    np.clip(image, 0, 1, out=image)

    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    oblique = float(np.rad2deg(nib.affines.obliquity(volume.affine).max()))
    warnings = list(volume.warnings)
    result_label = None
    ratios: dict[int, float] = {}
    if label is not None and label_affine is not None:
        result_label, ratios = resample_label(label, label_affine, window, settings.shape)
        for value, ratio in ratios.items():
            if abs(ratio - 1) > 0.02:
                warnings.append(f"label {value} changed its volume by {100 * (ratio - 1):+.1f} %")
    quality: dict[str, Any] = {
        "spacing": "x".join(f"{s:.3g}" for s in spacing),
        "orientation": "".join(nib.orientations.aff2axcodes(volume.affine)),
        "oblique_degrees": round(oblique, 2),
        "shape": "x".join(map(str, volume.voxels.shape)),
        "type": str(volume.voxels.dtype),
        "minimum": seen.minimum * volume.slope + volume.intercept,
        "maximum": seen.maximum * volume.slope + volume.intercept,
        "low": low * volume.slope + volume.intercept,
        "high": high * volume.slope + volume.intercept,
        "foreground_fraction": round(float((image > 0.1).mean()), 5),
        "mean": round(float(image[image > 0.1].mean()), 5) if (image > 0.1).any() else 0.0,
        "snr": None if (snr := snr_like(image)) is None else round(snr, 2),
        "cut": round(cut["total"], 5),
        **{f"cut_{side}": round(cut[side], 5) for side in SIDES},
    }
    if ratios and result_label is not None:
        voxel = float(np.prod(settings.spacing))
        quality["label_volume_mm3"] = {str(v): round(float((result_label == v).sum()) * voxel, 1) for v in ratios}
        quality["label_volume_ratio"] = {str(v): round(r, 5) for v, r in ratios.items()}
    return Prepared(image, result_label, window, volume.code, seen.digest, quality, warnings)
