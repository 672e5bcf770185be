# SPDX-License-Identifier: Apache-2.0
"""HarP as downloaded: MINC scans in ``100/`` and ``35/``, one NIfTI label file a side in ``Labels_*_NIFTI/``."""

from __future__ import annotations

import re

from volta_components.data.layouts.common import LEFT, RIGHT, LabelFile, LayoutOptions, Listing, Scan, look
from volta_components.data.walk import VolumeFile
from volta_components.errors import InputError

# Scan, patient, and the side of a label file.
_NAME = re.compile(r"(ADNI_(\d{3}_S_\d{4})_\d+)(?:_ACPC)?(?:_([LR]))?$")
# Scans whose left and right label files are swapped in the release. Only a cross-check: sides are told by centroids.
SWAPPED = frozenset(
    {
        "ADNI_007_S_1304_74384",
        "ADNI_016_S_4121_280306",
        "ADNI_029_S_4279_265980",
        "ADNI_136_S_0429_109839",
    }
)


def read(options: LayoutOptions) -> Listing:
    """List HarP's scans with their two label files.

    Raises:
        InputError: if there is no such folder, or no scan in it.
    """
    root = options.source
    listing = Listing(cohort="harp", swapped=SWAPPED)
    scans: list[tuple[VolumeFile, re.Match[str]]] = []
    labels: dict[str, dict[int, VolumeFile]] = {}
    for volume in look(listing, root, options.follow_links).volumes():
        match = _NAME.search(volume.stem)
        if match and match[3]:
            side = LEFT if match[3] == "L" else RIGHT
            if side in labels.setdefault(match[1], {}):
                listing.note("problem", match[1], volume.path, "double label file", "the first is used", False)
            else:
                labels[match[1]][side] = volume
        elif match:
            scans.append((volume, match))
        else:
            remedy = (
                "name it as HarP does (ADNI_002_S_0295_13722_ACPC.mnc, ADNI_002_S_0295_13722_L.nii), or move it away"
            )
            listing.note("problem", volume.stem, volume.path, "is not named as HarP names scans and labels", remedy)
    if not scans:
        raise InputError(
            f"{root}: no scan like 100/ADNI_002_S_0295_13722_ACPC.mnc; give the folder that holds 100 and 35"
        )
    listing.read_people(options.table)
    listing.match_ids(match[2] for _, match in scans)
    complete = 0
    for volume, match in scans:
        name, patient = match[1], match[2]
        found = labels.get(name, {})
        if options.labels != "none" and len(found) == 1:
            missing = "right" if LEFT in found else "left"
            listing.note("problem", name, volume.path, f"has no {missing} label file", "download the labels again")
            continue
        complete += len(found) == 2
        both = tuple(LabelFile(found[side].path, side) for side in sorted(found))
        place = listing.place(volume.path)
        listing.add(Scan(name, None, patient, volume.path, place, both, **listing.describe(patient)))
    for name in sorted(set(labels) - {match[1] for _, match in scans}):
        file = min(label.path for label in labels[name].values())
        listing.note("problem", name, file, "label without image", "download the scan, or remove the label")
    listing.found = {
        "scans": len(scans),
        "with both labels": complete,
        "patients": len({match[2] for _, match in scans}),
    }
    return listing.choose(options.sessions)
