# SPDX-License-Identifier: Apache-2.0
"""BraTS 2023 and later as downloaded: ``BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz``, at any depth."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from volta_components.data.identity import canonical_patient_id
from volta_components.data.layouts.common import (
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

_CASE = re.compile(r"BraTS-([A-Za-z]+(?:-[A-Za-z]+)*)-(\d{4,6})(?:-(\d{3}))?")
_MODALITY = re.compile(r"-(t1n|t1c|t2w|t2f|seg|gtv)\.nii(\.gz)?$")


def read(options: LayoutOptions) -> Listing:
    """List the native T1 (``t1n``) of each case; time points of one patient share the patient's id.

    Cases without a ``t1n`` are named; where one is there both as ``.nii`` and ``.nii.gz``, the compressed one is used.

    Raises:
        InputError: if there is no such folder, or no case in it.
    """
    root = options.source
    listing = Listing(cohort="brats")
    cases: dict[str, dict[str, list[Path]]] = {}
    for path in find_volumes(root):
        kind = _MODALITY.search(path.name)
        case = _CASE.match(path.name)
        if kind and case:
            cases.setdefault(case[0], {}).setdefault(kind[1], []).append(path)
    for folder, _, _ in os.walk(root):
        if case := _CASE.fullmatch(Path(folder).name):
            cases.setdefault(case[0], {})
    if not cases:
        packed = sorted(path.name for pattern in ("*.zip", "*.tar*") for path in root.rglob(pattern))
        hint = f"unpack {packed[0]} first" if packed else "give the folder that holds them as --source"
        raise InputError(f"{root}: no case like BraTS-GLI-00005-100; {hint}")
    people = read_people(listing, options.table) if options.table else {}
    tasks: Counter[str] = Counter()
    for name, files in sorted(cases.items()):
        match = _CASE.fullmatch(name)
        assert match
        if "t1n" not in files:
            there = f"only {', '.join(sorted(files))}" if files else "its folder is empty"
            listing.note("problem", name, "", f"has no t1n ({there})", "download the case again, or leave it out")
            continue
        tasks[match[1]] += 1
        paths = sorted(files["t1n"], key=lambda path: (not path.name.endswith(".gz"), str(path)))
        same_place = [path for path in paths[1:] if path.parent == paths[0].parent]
        for other in same_place:
            listing.note(
                "quirk",
                name,
                relative(other, root),
                f"there both compressed and not: {paths[0].name} is used",
                "",
                True,
            )
        patient = canonical_patient_id(name)
        facts = describe_person(listing, patient, options.table.name if options.table else "", people.get(patient))
        for path in paths:
            if path not in same_place:
                listing.scans.append(
                    Scan(f"BraTS-{match[1]}-{match[2]}", match[3], patient, path, relative(path, root), **facts)
                )
    listing.found = {
        **{task: n for task, n in sorted(tasks.items())},
        "cases": len(cases),
        "patients": len({scan.patient_id for scan in listing.scans}),
    }
    listing.scans = drop_doubles(listing, select_sessions(listing, listing.scans, options.sessions))
    return listing
