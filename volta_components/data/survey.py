# SPDX-License-Identifier: Apache-2.0
"""The first look at a scan: what its voxels are, where the head is, and what is odd about either.

Stock tools find a head by one threshold. That fails where the background is not dark: padding far below the air
(-2000, -32768), a few voxels of a million, noise as bright as tissue (MP2RAGE). Each of these is told apart here, so
that the head is found as if it were not there; what cannot be told apart is noted, never passed over.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from nibabel.orientations import io_orientation
from scipy import ndimage
from skimage.filters import threshold_otsu

from volta_components.data.cuts import FACES, OTHER_AXES, find_cuts
from volta_components.data.unusable import UnusableVoxels
from volta_components.data.volumes import Volume, canonical

_COARSE_MM = 2.0
_MOST = 1e30  # beyond it, sums do not fit in float32
_LARGE = 1e12  # beyond it, squares times counts of voxels do not
_REPLACE = "convert it again, or replace them (fslmaths IN -nan OUT sets NaN to 0)"
# Padding is one value, of at least this share of the voxels, this far (in ranges of the other voxels) from them.
_PADDING_SHARE, _PADDING_GAP = 0.002, 0.25
_FEWEST_VALUES = 8
# Where NaN borders on tissue, air is this many ranges of the tissue below it: no threshold falls within the tissue.
_BELOW_TISSUE = 3
# Voxels further than this many ranges (between percentiles 0.1 and 99.9) above or below that range are spikes.
_FAR_ABOVE, _FAR_BELOW = 2.0, 1.0
# A part of the foreground that is not connected with the largest one is of the head if it has this share of its voxels.
_PART = 0.1
# Share of the faces that the foreground covers, beyond which the background may be as bright, or must be.
_COVERED, _MOSTLY_COVERED = 0.05, 0.5
# Brightness of the background in that of the head, beyond which it is marked.
_BRIGHT = 0.3
# No mark where a scan is known to have no skull.
MAYBE_STRIPPED = "far below all else: padding, or a brain without skull?"


@dataclass(frozen=True)
class Survey:
    """A scan seen at about 2 mm.

    Attributes:
        voxels: ``[X, Y, Z]`` view in the axis order and directions nearest to RAS; a copy where padding or spikes were
            replaced.
        affine: ``[4, 4]`` of that view.
        factors: source voxels per coarse voxel, per axis.
        coarse: ``[x, y, z]`` block means, stored units.
        foreground: ``[x, y, z]`` head (or brain), bool.
        digest: SHA-256 of shape and block means: equal for equal voxels, whatever the file format or orientation.
        minimum, maximum: of all voxels as they were, stored units.
        warnings: what is odd about the voxels.
    """

    voxels: np.ndarray
    affine: np.ndarray
    factors: tuple[int, int, int]
    coarse: np.ndarray
    foreground: np.ndarray
    digest: str
    minimum: float
    maximum: float
    warnings: tuple[str, ...] = ()


def survey(volume: Volume) -> Survey:
    """Go over a scan once, slab by slab: defects, range, digest, coarse picture and foreground.

    Raises:
        UnusableVoxels: if voxels within the head are NaN, any is infinite, or all are equal.
    """
    if np.isnan(io_orientation(volume.affine)).any():
        raise UnusableVoxels("singular affine: an axis has no direction", "convert it from its source again")
    upright = canonical(volume)
    voxels, nan = without_nan(upright)
    spacing = voxel_sizes(upright.affine)
    factors = tuple(int(max(1, min(round(_COARSE_MM / s), n // 8))) for s, n in zip(spacing, voxels.shape, strict=True))
    coarse, minimum, maximum = block_means(voxels, factors)  # type: ignore[arg-type]
    if minimum == maximum:
        raise UnusableVoxels(
            f"constant: every voxel is {minimum * volume.slope + volume.intercept:g}", "fetch it again"
        )
    if volume.slope < 0:
        raise UnusableVoxels("negative scale factor (inverted contrast)", "convert it from its source again")
    digest = hashlib.sha256(f"{voxels.shape}".encode() + coarse.tobytes()).hexdigest()
    seen = Survey(voxels, upright.affine, factors, coarse, np.zeros(coarse.shape, bool), digest, minimum, maximum)  # type: ignore[arg-type]
    seen = _without_outliers(seen, volume, nan)
    if seen.coarse.min() != seen.coarse.max():
        seen = _with_foreground(seen)
    if nan is None:
        return seen
    return replace(_check_nan(seen, nan), minimum=float(np.nanmin(upright.voxels)))


def without_nan(volume: Volume) -> tuple[np.ndarray, np.ndarray | None]:
    """A scan's voxels with air in the place of NaN, which SPM, FSL and others write outside of the brain.

    Air has an intensity of 0, or of the darkest voxel where that is below. Where nothing is left of the air, as in
    z-scores of the head alone, it is far below all others.

    Returns:
        ``[X, Y, Z]``: the voxels; where they were NaN, or None where nothing was.
    """
    if volume.voxels.dtype.kind != "f" or not (nan := np.isnan(volume.voxels)).any() or nan.all():
        return volume.voxels, None
    zero, darkest = -volume.intercept / volume.slope, np.nanmin(volume.voxels)
    air = min(zero, darkest)
    if darkest < zero and np.isfinite(darkest) and _borders_on_tissue(volume.voxels, nan):
        air = darkest - _BELOW_TISSUE * (np.nanpercentile(volume.voxels, 99) - darkest)
    return np.where(nan, air, volume.voxels).astype(volume.voxels.dtype), nan


def _borders_on_tissue(voxels: np.ndarray, nan: np.ndarray) -> bool:
    """Whether NaN lies close around the head: what is left is standardised, or it is no air beside the NaN."""
    rest = voxels[~nan]
    if abs(rest.mean(dtype=np.float64)) < 0.01 and abs(rest.std(dtype=np.float64) - 1) < 0.01:
        return True
    low, high = np.percentile(rest, [1, 99])
    border = voxels[ndimage.binary_dilation(nan) & ~nan]
    return bool(border.size and np.median(border) > low + 0.1 * (high - low))


def _check_nan(seen: Survey, nan: np.ndarray) -> Survey:
    """Note voxels that were NaN.

    Raises:
        UnusableVoxels: if some lie within the head, where nobody knows what was there.
    """
    inner = ndimage.binary_erosion(seen.foreground, iterations=2)
    if inner.any():
        share, _, _ = block_means(nan.view(np.uint8), seen.factors)
        if within := round(float(share[inner].sum()) * float(np.prod(seen.factors))):
            raise UnusableVoxels(f"contains NaN ({within:,} voxels within the head)", _REPLACE)
    note = (
        f"{int(nan.sum()):,} voxels are NaN ({100 * nan.mean():.2g} % of all), taken as outside of the head: where "
        "they are of its skin, its window has moved"
    )
    return replace(seen, warnings=(*seen.warnings, note))


def block_means(voxels: np.ndarray, factors: tuple[int, int, int]) -> tuple[np.ndarray, float, float]:
    """Means over blocks of voxels (``[x, y, z]``, float32), one slab of the file at a time; extremes of all voxels.

    Voxels left over at the end of an axis are not in the means.

    Raises:
        UnusableVoxels: if there are NaN or infinite voxels.
    """
    slab_axis = int(np.argmax(np.abs(voxels.strides)))  # the slowest in memory
    moved = np.moveaxis(voxels, slab_axis, 0)
    f0, f1, f2 = (factors[slab_axis], *(f for axis, f in enumerate(factors) if axis != slab_axis))
    n0, n1, n2 = moved.shape[0] // f0, moved.shape[1] // f1, moved.shape[2] // f2
    coarse = np.empty((n0, n1, n2), np.float32)
    minimum, maximum, nan, infinite = np.inf, -np.inf, 0, 0
    # Sums of integers are exact, but those of 8 bytes may not fit.
    kind = np.int64 if voxels.dtype.kind in "iu" and voxels.dtype.itemsize < 8 else np.float64
    for i in range(-(-moved.shape[0] // f0)):
        slab = moved[i * f0 : (i + 1) * f0]
        if slab.dtype.kind == "f" and not np.isfinite(slab).all():
            nan += int(np.isnan(slab).sum())
            infinite += int(np.isinf(slab).sum())
            continue
        minimum, maximum = min(minimum, float(slab.min())), max(maximum, float(slab.max()))
        if i < n0 and max(abs(minimum), abs(maximum)) < _MOST:
            block = slab.sum(axis=0, dtype=kind)
            block = block[: n1 * f1, : n2 * f2].reshape(n1, f1, n2, f2).sum(axis=(1, 3))
            coarse[i] = block / (f0 * f1 * f2)
    if nan or infinite:
        kinds = [f"{name} ({count:,} voxels)" for name, count in (("NaN", nan), ("Inf", infinite)) if count]
        raise UnusableVoxels("contains " + " and ".join(kinds), _REPLACE)
    if max(abs(minimum), abs(maximum)) >= _MOST:
        raise UnusableVoxels(f"values from {minimum:.3g} to {maximum:.3g}: no intensities", "convert it again")
    return np.ascontiguousarray(np.moveaxis(coarse, 0, slab_axis)), minimum, maximum


# --- padding and spikes ----------------------------------------------------------------------------------------------


def _without_outliers(seen: Survey, volume: Volume, nan: np.ndarray | None) -> Survey:
    """Replace padding by air, and clip spikes; note what is odd. What was ``nan`` is air already."""

    def shown(value: float) -> str:
        return f"{volume.slope * value + volume.intercept:.4g}"

    sample = seen.voxels[tuple(slice(None, None, max(1, n // 64)) for n in seen.voxels.shape)]
    notes = []
    values, counts = np.unique(sample, return_counts=True)
    if len(values) <= _FEWEST_VALUES:
        notes.append(f"only {len(values)} different values: a mask or a label map, not a scan?")
    known = np.ones(sample.shape, bool)
    slices = {float(np.moveaxis(seen.voxels, axis, 0)[i].flat[0]) for axis, i in blank_slices(seen)}
    paddings: list[float] = []
    frequent = {*map(float, values[counts >= _PADDING_SHARE * sample.size])}
    if nan is not None:
        air = float(seen.voxels[nan][0])
        if air < -volume.intercept / volume.slope and np.mean((seen.voxels == air) & ~nan) < _PADDING_SHARE:
            frequent, slices = frequent - {air}, slices - {air}
    for value in frequent | slices:
        kind = _padding(sample, value, -volume.intercept / volume.slope, value in slices)
        if kind == "padding or background":
            notes.append(f"the background of {shown(value)} is {MAYBE_STRIPPED}")
        elif kind is not None:
            paddings.append(value)
            known &= ~ndimage.binary_dilation(sample == value, iterations=2)  # its neighbours may be interpolated
            if kind == "slices":
                notes.append(f"slices of {shown(value)}, far from all else, were taken as air")
            elif kind != "dark":
                notes.append(f"the background of {shown(value)}, {kind}, was taken as air")
    first, air, last = np.percentile(sample[known].astype(np.float64), [0.1, 1, 99.9])
    low, high = first - _FAR_BELOW * (last - first), last + _FAR_ABOVE * (last - first)
    if last == first or (not paddings and low <= seen.minimum and seen.maximum <= high):
        return replace(seen, warnings=(*seen.warnings, *notes))
    is_padding = np.isin(seen.voxels, paddings)
    if any(value > last for value in {*paddings} - slices):
        is_padding = ndimage.binary_dilation(is_padding, iterations=2)  # likewise
    is_far = (seen.voxels > high) & ~is_padding
    if any(value < first for value in paddings):
        low = air  # what lies between padding and air is interpolated
    else:
        is_far |= (seen.voxels < low) & ~is_padding
    if is_far.any():
        notes.append(
            f"{int(is_far.sum())} voxels far outside of the range of the others ({shown(first)} to {shown(last)})"
        )
    voxels = np.clip(seen.voxels.astype(np.float32), low, high)
    # A background as bright as tissue lies around a brain without skull; it becomes darker than all of the brain.
    voxels[is_padding] = low if any(first < value <= last for value in paddings) else air
    return replace(seen, voxels=voxels, coarse=block_means(voxels, seen.factors)[0], warnings=(*seen.warnings, *notes))


def blank_slices(seen: Survey) -> list[tuple[int, int]]:
    """Axis and index of the slices that have one value throughout."""
    found = []
    for axis in range(3):
        planes = np.moveaxis(seen.voxels, axis, 0)
        one, other = (factor for a, factor in enumerate(seen.factors) if a != axis)
        found += [(axis, i) for i, plane in enumerate(planes) if np.ptp(plane[::one, ::other]) == 0 == np.ptp(plane)]
    return found


def _padding(sample: np.ndarray, value: float, zero: float, fills_slices: bool) -> str | None:
    """What a value is that fills slices or the corners and lies far from all others; None where it is nothing special.

    Dark padding and the background of a brain without skull look alike. Padding borders on air, which is dark, and it
    is below zero (stored as ``zero``) or lies around a field of view that reaches the volume's faces.
    ``fills_slices`` says that whole slices have the value.
    """
    at = sample == value
    is_around = at[np.ix_((0, -1), (0, -1), (0, -1))].sum() >= 4
    if is_around:  # and one piece of some thickness, unlike the white half of salt and pepper
        is_around = ndimage.binary_erosion(at, iterations=2, border_value=1).any()
    if not (is_around or fills_slices):
        return None  # as nearly all values of a noisy background, before the slow dilation
    rest = ~ndimage.binary_dilation(at, iterations=2)
    if rest.mean() < 0.02:
        return None
    low, high = np.percentile(sample[rest].astype(np.float64), [1, 99.9])
    gap = _PADDING_GAP * (high - low)
    if low == high or low - gap <= value <= low + gap:
        return None
    if not is_around:
        return None if low <= value <= high + gap else "slices"
    if value > low:
        return "brighter than the head" if value > high else "as bright as tissue"
    shell = rest & ~ndimage.binary_erosion(rest)
    if np.median(sample[shell]) >= low + 0.2 * (high - low):
        return None
    is_below_zero = value < zero and low - zero < 0.2 * (high - zero)
    reaches = max(float(rest.take(place, axis=axis).mean()) for axis, place in FACES.values())
    return "dark" if is_below_zero or reaches > 0.3 else "padding or background"


# --- the head --------------------------------------------------------------------------------------------------------


def otsu_threshold(values: np.ndarray) -> float:
    """Otsu's threshold of values clipped at their 99.8th percentile (a few bright vessels must not move it)."""
    values = values.ravel()  # threshold_otsu takes a short last axis for colours
    if (largest := float(np.abs(values).max())) > _LARGE:
        return largest * otsu_threshold(values / largest)
    top = float(np.percentile(values, 99.8))
    return float(threshold_otsu(np.minimum(values, top) if top > values.min() else values))


def find_foreground(coarse: np.ndarray) -> np.ndarray:
    """The head (or the brain of a stripped scan) in a coarse volume ``[x, y, z]``; all False where nothing stands out.

    Above Otsu's threshold, largest connected component, closed and filled, so that ventricles, sulci and bone, which
    are dark, count as inside. Dark slices that cut a head apart leave more than one large component; all of them count.
    """
    return _largest_filled(coarse > otsu_threshold(coarse), _PART)


def _largest_filled(mask: np.ndarray, part: float = 1.0) -> np.ndarray:
    """The largest connected component, and those of at least a part of its size, closed and filled."""
    labels, n = ndimage.label(mask)
    if n == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = np.arange(n + 1) == np.argmax(sizes)
    mask = (largest | ((sizes >= part * sizes.max()) & (part < 1)))[labels]
    steps = 2 if min(mask.shape) >= 48 else 1
    padded = np.pad(mask, steps + 1)
    padded = ndimage.binary_closing(padded, iterations=steps)
    padded = ndimage.binary_fill_holes(padded)
    inner = slice(steps + 1, -steps - 1)
    return padded[inner, inner, inner] | mask


def _with_foreground(seen: Survey) -> Survey:
    """Find the head by brightness or, in a background as bright, by smoothness."""
    foreground = find_foreground(seen.coarse)
    seen = replace(seen, foreground=foreground)
    covered, bright = _covered(foreground), _bright_outside(seen)
    if (covered > _COVERED or bright) and (smooth := _smooth_part(seen)) is not None:
        note = "noise as bright as tissue around the head (an MP2RAGE image?): mask or denoise it"
        seen = replace(seen, foreground=smooth)
        notes = [note, *_cuts(seen)]
    elif covered > _MOSTLY_COVERED:
        share = f"{100 * covered:.0f} % of the volume's faces are as bright as the head"
        notes = [f"no background to separate the head from: {share}"]
    else:
        notes = [*(bright or _dark_inside(seen)), *_cuts(seen), *_apart(seen)]
    return replace(seen, warnings=(*seen.warnings, *notes))


def _covered(mask: np.ndarray) -> float:
    """Share of the volume's faces that a mask covers; the bottom, where the neck is, does not count."""
    faces = [mask.take(place, axis=axis).ravel() for side, (axis, place) in FACES.items() if side != "bottom"]
    return float(np.mean(np.concatenate(faces)))


def _smooth_part(seen: Survey) -> np.ndarray | None:
    """The head as the part in which neighbouring voxels are alike, as in tissue and not in noise; None for no head."""
    inner = [np.arange(n) * f + (f - 1) // 2 for n, f in zip(seen.coarse.shape, seen.factors, strict=True)]
    here = seen.voxels[np.ix_(*inner)].astype(np.float32)
    rough = np.zeros(seen.coarse.shape, np.float32)
    for axis, side in enumerate(seen.voxels.shape):
        index = list(inner)
        index[axis] = np.minimum(inner[axis] + 1, side - 1)
        rough += np.abs(seen.voxels[np.ix_(*index)].astype(np.float32) - here)
    rough = ndimage.uniform_filter(rough, 3 if max(seen.factors) == 1 else 5)
    if rough.min() == rough.max():
        return None
    smooth = _largest_filled(rough < threshold_otsu(rough.ravel()))
    is_head = (
        0.03 < smooth.mean() < 0.9
        and _covered(smooth) < _COVERED
        and np.median(rough[smooth]) < 0.5 * np.median(rough[~smooth])
        and seen.foreground[smooth].mean() > 0.5
    )
    return smooth if is_head else None


# --- what is odd about it --------------------------------------------------------------------------------------------


def _bright_outside(seen: Survey) -> list[str]:
    """Noise around the head that is a good part as bright as the head."""
    outside, inside = seen.coarse[~seen.foreground], seen.coarse[seen.foreground]
    if not outside.size or not inside.size:
        return []
    dark = float(np.percentile(seen.coarse, 0.1))
    around, head = float(np.median(outside)) - dark, float(np.median(inside)) - dark
    if around <= _BRIGHT * head:
        return []
    if head <= 0:
        return ["the background is brighter than the head: noise, an inverted mask, or no scan?"]
    share = around / head
    return [f"the background is {100 * share:.0f} % as bright as the head: noise, as in an MP2RAGE image?"]


def _dark_inside(seen: Survey) -> list[str]:
    """Tissue that is darker than air: values above 32767 that were stored as negative ones."""
    outside = seen.coarse[~seen.foreground]
    if outside.size < 0.01 * seen.coarse.size or not seen.foreground.any():
        return []
    air, top = float(np.median(outside)), float(np.percentile(seen.coarse[seen.foreground], 99))
    labels, n = ndimage.label(seen.foreground & (seen.coarse < air - 0.1 * (top - air)))
    largest = int(np.bincount(labels.ravel())[1:].max()) if n else 0
    if largest < 8:
        return []
    ml = largest * float(np.prod(voxel_sizes(coarse_affine(seen)))) / 1000
    return [f"{ml:.2g} ml inside the head are darker than air: negative values, wrapped around at 32767?"]


def _cuts(seen: Survey) -> list[str]:
    """Where the field of view, or blank voxels, cut through the head."""
    return find_cuts(seen.foreground, seen.coarse, voxel_sizes(coarse_affine(seen)))


def _apart(seen: Survey) -> list[str]:
    """Slices of one value within the head, and a head of more than one piece."""
    notes = []
    pieces, _ = ndimage.label(seen.foreground & (seen.coarse > otsu_threshold(seen.coarse)))
    sizes = np.bincount(pieces.ravel())[1:]
    boxes = ndimage.find_objects(pieces)
    large = [box for box, size in zip(boxes, sizes, strict=True) if size >= _PART * sizes.max()]
    largest = boxes[int(np.argmax(sizes))] if boxes else ()
    # The brain is a piece within the scalp, since bone is dark; that is no head in pieces.
    if any(a.stop <= b.start or b.stop <= a.start for box in large for a, b in zip(box, largest, strict=True)):
        notes.append("the head is in pieces, and all of them were taken: dark slices within it, or no head?")
    blank = blank_slices(seen)
    for axis, name in enumerate(("left-right", "back-front", "bottom-top")):
        within = np.flatnonzero(seen.foreground.any(axis=OTHER_AXES[axis]))
        if not within.size:
            continue
        inner = range((int(within[0]) + 1) * seen.factors[axis], int(within[-1]) * seen.factors[axis])
        if count := sum(a == axis and i in inner for a, i in blank):
            notes.append(
                f"{count} blank slice{'s' * (count != 1)} within the head, along the {name} axis: fetch it again"
            )
    return notes


def block_middles(seen: Survey) -> np.ndarray:
    """``[x, y, z]``: of each block, the source voxel at its middle."""
    return seen.voxels[tuple(slice(f // 2, n * f, f) for n, f in zip(seen.coarse.shape, seen.factors, strict=True))]


def coarse_affine(seen: Survey) -> np.ndarray:
    """Affine of the coarse grid: each coarse voxel lies at the centre of its block."""
    factors = np.array(seen.factors, float)
    return seen.affine @ from_matvec(np.diag(factors), (factors - 1) / 2)
