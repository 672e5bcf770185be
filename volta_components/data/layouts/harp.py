# SPDX-License-Identifier: Apache-2.0
"""HarP as downloaded: MINC scans in ``100/`` and ``35/``, one NIfTI label file a side in ``Labels_*_NIFTI/``."""

from __future__ import annotations

import re
from pathlib import Path

from volta_components.data.layouts.common import (
    LEFT,
    RIGHT,
    LabelFile,
    LayoutOptions,
    Listing,
    Scan,
    describe_person,
    drop_doubles,
    find_volumes,
    read_people,
    relative,
    select_sessions,
)
from volta_components.errors import InputError

_SCAN = re.compile(r"(ADNI_(\d{3}_S_\d{4})_(\d+))(_ACPC)?\.(mnc|nii|nii\.gz)$")
_LABEL = re.compile(r"(ADNI_(\d{3}_S_\d{4})_(\d+))(_ACPC)?_([LR])\.(mnc|nii|nii\.gz)$")
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
    scans: list[tuple[Path, re.Match[str]]] = []
    labels: dict[str, dict[int, Path]] = {}
    for path in find_volumes(root):
        if match := _LABEL.search(path.name):
            side = LEFT if match[5] == "L" else RIGHT
            if side in labels.setdefault(match[1], {}):
                listing.note(
                    "problem", match[1], relative(path, root), "double label file", "the first is used", left_out=False
                )
            else:
                labels[match[1]][side] = path
        elif match := _SCAN.search(path.name):
            scans.append((path, match))
    if not scans:
        raise InputError(
            f"{root}: no scan like 100/ADNI_002_S_0295_13722_ACPC.mnc; give the folder that holds 100 and 35"
        )
    people = read_people(listing, options.table) if options.table else {}
    complete = 0
    for path, match in scans:
        name, patient = match[1], match[2]
        found = labels.get(name, {})
        if options.labels != "none" and len(found) == 1:
            missing = "right" if LEFT in found else "left"
            listing.note(
                "problem", name, relative(path, root), f"has no {missing} label file", "download the labels again"
            )
            continue
        complete += len(found) == 2
        facts = describe_person(listing, patient, options.table.name if options.table else "", people.get(patient))
        listing.scans.append(
            Scan(
                name,
                None,
                patient,
                path,
                relative(path, root),
                labels=tuple(LabelFile(found[side], side) for side in sorted(found)),
                **facts,
            )
        )
    for name in sorted(set(labels) - {match[1] for _, match in scans}):
        file = relative(min(labels[name].values()), root)
        listing.note("problem", name, file, "label without image", "download the scan, or remove the label")
    listing.found = {
        "scans": len(scans),
        "with both labels": complete,
        "patients": len({match[2] for _, match in scans}),
    }
    listing.scans = drop_doubles(listing, select_sessions(listing, listing.scans, options.sessions))
    return listing
