# SPDX-License-Identifier: Apache-2.0
"""Skulls: existing brain masks are found and applied, and whether a scan still has its skull is measured.

Cohorts with and without skulls in one mixture teach an encoder which cohort a scan is from. Masks that a tool made
(SynthStrip, HD-BET, FreeSurfer, a BIDS derivative) bring both to one form.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage

from volta_components.data.cuts import OTHER_AXES
from volta_components.data.layouts.common import Listing, Scan
from volta_components.data.resample import resample
from volta_components.data.survey import Survey, block_middles, find_foreground
from volta_components.data.unusable import UnusableVolume
from volta_components.data.volumes import Volume, read_volume, volume_stem
from volta_components.data.walk import VolumeFile, walk

# A scan without skull has one value in this share of its background.
_CONSTANT = 0.9
# Share of rays from outside that cross a dark layer (bone) below a bright one (scalp).
_RAYS, _FEWEST_RAYS = 0.4, 100
# A brain fills this part of its width times its squared length, a head with face or neck more. Both change alike with
# the width, so that a narrow brain counts as one too.
_FULLEST = 0.8
_LEAST_WIDTH = 60.0  # mm; no ray is deep enough in what is narrower
# Share of a brain mask that lies outside of the head, beyond which it is marked, or from which on it is refused.
_MARKED_OUTSIDE, _REFUSED_OUTSIDE = 0.2, 0.5
# An image without skull has more values than this, a map of brain and lesion or of tissues fewer.
_MOST_LABELS = 10
# A head of this size or more has a brain of this size or more, ml; heads of newborns are smaller.
_LARGE_HEAD, _SMALLEST_BRAIN = 2500.0, 300.0
_NO_OTHER_SPACE = ("space-T1w", "space-orig", "space-individual")


# --- finding masks ---------------------------------------------------------------------------------------------------


def attach_masks(listing: Listing, scans: Sequence[Scan], where: str, root: Path) -> list[Scan]:
    """Give each scan its brain mask; scans without one become problems and are left out.

    Masks are looked for among the data set's own derivatives (``bids``), or in a folder. A mask has the name of its
    scan's file; if several scans of the data set have that name, used or not, it also lies in a folder of its scan's.
    """
    folders = [root / "derivatives", root / "sourcedata"] if where == "bids" else [Path(where)]
    by_name: dict[str | None, dict[Path, tuple[str, ...]]] = defaultdict(dict)
    for folder in filter(Path.is_dir, folders):
        for file in walk(folder).volumes():
            inside = file.folder.relative_to(folder).parts
            by_name[_mask_of(file)][file.path] = inside  # at None, what is no mask
            if where != "bids":  # a mask may simply have the name of its scan
                by_name[file.stem][file.path] = inside
    sources = {scan.source for scan in listing.scans} | {found.file for found in listing.findings if found.left_out}
    places = {Path(source).parent / volume_stem(Path(source)) for source in sources}
    crowd = Counter(place.name.split("#")[0] for place in places)
    kept = []
    for scan in scans:
        stem = volume_stem(scan.image)
        named = {path for path, inside in by_name[stem].items() if crowd[stem] < 2 or _is_beside(scan, inside)}
        keys = (set(by_name[name]) for name in (scan.key, f"{scan.key}_T1w"))
        paths = sorted(next(filter(None, (named, *keys)), ()))
        if len(paths) == 1:
            kept.append(replace(scan, mask=paths[0]))
        elif paths:
            words = ", ".join(path.name for path in paths[:3])
            listing.note_scan("problem", scan, f"has {len(paths)} brain masks: {words}", "remove all but one")
        else:
            name = stem if crowd[stem] < 2 else scan.key  # others have this name too
            remedy = f"add {name}_mask.nii.gz, or leave out --mask"
            listing.note_scan("problem", scan, f"has no brain mask in {', '.join(map(str, folders))}", remedy)
    return kept


def _is_beside(scan: Scan, folders: tuple[str, ...]) -> bool:
    """Whether a mask's folders are those that the scan lies in, or have the names of its subject and session."""
    own = Path(scan.source).parent.parts
    if own and folders[-len(own) :] == own:
        return True
    session = scan.session or ""
    return scan.subject_id in folders and (
        not session or not {session, session.removeprefix("ses-")}.isdisjoint(folders)
    )


def _mask_of(file: VolumeFile) -> str | None:
    """The name of the scan that a file is the brain mask of, by the usual tools' names; None for another file."""
    stem = file.stem
    if stem == "brainmask" and file.folder.name == "mri":  # FreeSurfer
        return file.folder.parent.name
    words = stem.split("_")
    if any(word.startswith("space-") and word not in _NO_OTHER_SPACE for word in words):
        return None
    for ending in ("_desc-brain_mask", "_bet_mask", "_synthstrip_mask", "_brain_mask", "_brainmask", "_mask"):
        if stem.lower().endswith(ending):
            name = stem[: -len(ending)]
            return "_".join(word for word in name.split("_") if not word.startswith("space-"))
    return None


# --- applying masks --------------------------------------------------------------------------------------------------


def apply_mask(volume: Volume, path: Path) -> Volume:
    """A scan with everything outside of its brain mask at 0, or at its darkest value where that is below.

    Args:
        volume: the scan.
        path: the mask, on any grid in the scan's space: two values, labels, or an image that is 0 outside of the brain.

    Raises:
        UnusableVolume: if the mask cannot be read, is empty or holds nearly everything, lies beside the head or is too
            small for it.
    """
    given = read_volume(path)
    voxels = given.intensities
    values = np.unique(voxels)
    is_map = len(values) > 2 and values[-1] > 1 and not (values % 1).any() and len(values) <= _MOST_LABELS
    # FreeSurfer writes 1 where a person has erased something; a probability map is cut at a half. Labels all count.
    least = 0.5 if is_map else 1.0 if values[-1] > 1 and len(values) > 2 else values[-1] / 2
    share = resample((voxels > least).astype(np.uint8), given.affine, volume.affine, volume.voxels.shape)
    inside = share > 0.5
    part = float(inside.mean())
    if part < 1e-3 or part > 0.95:
        raise UnusableVolume(
            path,
            f"the brain mask holds {100 * part:.1f} % of the scan's voxels",
            "give the mask of this scan's brain, in this scan's space",
        )
    zero = -volume.intercept / volume.slope if volume.slope else 0.0
    dark = min(zero, float(volume.voxels[inside].min()))
    kind = volume.voxels.dtype
    fits = kind.kind == "f" or (dark == int(dark) and np.iinfo(kind).min <= dark <= np.iinfo(kind).max)
    masked = np.asfortranarray(volume.voxels if fits else volume.voxels.astype(np.float32)).copy(order="F")
    masked[~inside] = dark
    notes = [f"brain mask: {text}" for text in given.warnings]
    head = find_foreground(volume.voxels[::2, ::2, ::2].astype(np.float32))
    brain = inside[::2, ::2, ::2]
    of_head, of_brain = (8e-3 * float(some.sum() * np.prod(voxel_sizes(volume.affine))) for some in (head, brain))
    if of_head > _LARGE_HEAD and of_brain < _SMALLEST_BRAIN:
        raise UnusableVolume(
            path,
            f"the brain mask holds {of_brain:.0f} ml of a head of {of_head:.0f} ml",
            "give the mask of the whole brain, not of a part of it",
        )
    if head.any() and brain.any() and (outside := float((~head[brain]).mean())) > _MARKED_OUTSIDE:
        if outside >= _REFUSED_OUTSIDE:
            raise UnusableVolume(
                path,
                f"{100 * outside:.0f} % of the brain mask lie outside of the head: it is inverted, or of another scan",
                "give the mask of this scan's brain, in this scan's space, with 0 outside of the brain",
            )
        notes.append(f"{100 * outside:.0f} % of the brain mask lie outside of the head")
    return replace(volume, voxels=masked, warnings=(*volume.warnings, *notes))


# --- measuring -------------------------------------------------------------------------------------------------------


def is_stripped(seen: Survey) -> bool:
    """Whether a scan shows a brain without skull.

    Its background is one constant value, its outline is no larger than a brain's, and from outside, no bright scalp
    comes before dark bone. Heads whose background was blanked differ in the latter two.

    Checked on scans that had no part in choosing the limits: 21 phantoms of other seeds (11 of the template, all
    without skull; 10 of label maps, one without) and a real head, each as it is, with its background set to 0, and with
    everything below its 5th percentile set to 0. 63 of 66 came out right; the other 3, heads with few rays or none,
    led to the rule for these. Rays cross bone in 0.00 to 0.20 of brains and in 0.44 to 1.00 of heads with enough of
    them; fullness is 0.48 to 0.72, so that it decides on none of them.
    """
    outside = block_middles(seen)[~seen.foreground]
    if not outside.size or not seen.foreground.any():
        return False
    _, counts = np.unique(outside, return_counts=True)
    if counts.max() < _CONSTANT * outside.size:
        return False
    mm = voxel_sizes(seen.affine) * seen.factors
    areas = [seen.foreground.sum(axis=others) for others in OTHER_AXES[:2]]
    width, length = (float((area > 0.25 * area.max()).sum() * mm[axis]) for axis, area in enumerate(areas))
    if seen.foreground.sum() * float(np.prod(mm)) > _FULLEST * width * length**2:
        return False
    crossing, rays = _crossing_bone(seen, mm, width)
    if rays < _FEWEST_RAYS:  # a brain is deep below all of its surface; a head may be hollow, as its dark parts are
        return width < _LEAST_WIDTH
    return crossing < _RAYS


def _crossing_bone(seen: Survey, mm: np.ndarray, width: float) -> tuple[float, int]:
    """Share of rays from above, the sides and behind that cross a dark layer below a bright one, and their number."""
    inside = np.pad(seen.foreground, 1)
    depth = ndimage.distance_transform_edt(inside, sampling=mm)[1:-1, 1:-1, 1:-1]
    top = int(np.flatnonzero(seen.foreground.any(axis=(0, 1))).max())
    upper = seen.foreground.copy()
    upper[:, :, : max(0, top - round(0.45 * width / mm[2]))] = False
    found = []
    for axis, step in ((2, -1), (0, 1), (0, -1), (1, 1)):
        flip = (slice(None, None, step),)
        values, mask, below = (np.moveaxis(a, axis, 0)[flip] for a in (seen.coarse, upper, depth))
        n = max(6, round(24 / mm[axis]))
        index = np.minimum(mask.argmax(axis=0)[None] + np.arange(n)[:, None, None], len(values) - 1)
        steep = mask.any(axis=0) & (np.take_along_axis(below, index[-1:], 0)[0] > 16)
        ray = np.take_along_axis(values, index, 0)[:, steep] - seen.coarse.min()
        third = max(2, n // 3)
        first = ray[:third].argmax(axis=0)
        outer, inner = ray[:third].max(axis=0, initial=0), ray[-max(2, n * 5 // 12) :].mean(axis=0)
        later = np.arange(n)[:, None] >= first
        middle = np.where(later & (np.arange(n) < n * 5 // 6)[:, None], ray, np.inf).min(axis=0, initial=np.inf)
        found.append(middle < 0.6 * np.minimum(outer, inner))
    rays = np.concatenate(found)
    return (float(rays.mean()) if rays.size else 0.0), int(rays.size)
