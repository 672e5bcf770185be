# SPDX-License-Identifier: Apache-2.0
"""HarP as downloaded: MINC scans in ``100/`` and ``35/``, one NIfTI label file a side in ``Labels_*_NIFTI/``."""

from __future__ import annotations

import re

from volta_components.data.layouts.common import (
    LEFT,
    RIGHT,
    LabelFile,
    LayoutOptions,
    Listing,
    Scan,
    align,
    choose,
    describe_person,
    look,
    read_table_of_people,
    relative,
)
from volta_components.data.walk import VolumeFile
from volta_components.errors import InputError

_SCAN = re.compile(r"(ADNI_(\d{3}_S_\d{4})_(\d+))(_ACPC)?$")
_LABEL = re.compile(r"(ADNI_(\d{3}_S_\d{4})_(\d+))(_ACPC)?_([LR])$")
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
        place = relative(volume.path, root)
        if match := _LABEL.search(volume.stem):
            side = LEFT if match[5] == "L" else RIGHT
            if side in labels.setdefault(match[1], {}):
                listing.note("problem", match[1], place, "double label file", "the first is used", left_out=False)
            else:
                labels[match[1]][side] = volume
        elif match := _SCAN.search(volume.stem):
            scans.append((volume, match))
        else:
            remedy = (
                "name it as HarP does (ADNI_002_S_0295_13722_ACPC.mnc, ADNI_002_S_0295_13722_L.nii), or move it away"
            )
            listing.note("problem", volume.stem, place, "is not named as HarP names scans and labels", remedy)
    if not scans:
        raise InputError(
            f"{root}: no scan like 100/ADNI_002_S_0295_13722_ACPC.mnc; give the folder that holds 100 and 35"
        )
    people = read_table_of_people(listing, options.table)
    align(listing, people, (match[2] for _, match in scans))
    complete = 0
    for volume, match in scans:
        name, patient = match[1], match[2]
        found = labels.get(name, {})
        if options.labels != "none" and len(found) == 1:
            missing = "right" if LEFT in found else "left"
            place = relative(volume.path, root)
            listing.note("problem", name, place, f"has no {missing} label file", "download the labels again")
            continue
        complete += len(found) == 2
        both = tuple(LabelFile(found[side].path, side) for side in sorted(found))
        facts = describe_person(listing, people, patient)
        listing.add(Scan(name, None, patient, volume.path, relative(volume.path, root), both, **facts))
    for name in sorted(set(labels) - {match[1] for _, match in scans}):
        file = relative(min(label.path for label in labels[name].values()), root)
        listing.note("problem", name, file, "label without image", "download the scan, or remove the label")
    listing.found = {
        "scans": len(scans),
        "with both labels": complete,
        "patients": len({match[2] for _, match in scans}),
    }
    return choose(listing, options.sessions)
