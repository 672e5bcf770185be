# SPDX-License-Identifier: Apache-2.0
"""BraTS as downloaded, at any depth.

``BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz`` since 2023, ``BraTS2021_00000/BraTS2021_00000_t1.nii.gz`` before.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from volta_components.data.identity import canonical_patient_id, is_old_brats
from volta_components.data.layouts.common import LayoutOptions, Listing, Scan, look
from volta_components.data.walk import VolumeFile, tidy
from volta_components.errors import InputError

_CASE = re.compile(r"BraTS-([A-Za-z]+(?:-[A-Za-z]+)*)-(\d{4,6})(?:-(\d{1,3}))?(?![\dA-Za-z])", re.IGNORECASE)
_OLD_CASE = re.compile(r"BraTS(?:20)?(?:1[3-9]|2[0-2])(?:_[A-Za-z0-9]+)*?_\d+(?=_[a-z]\w*|$)", re.IGNORECASE)
_MODALITY = re.compile(r"[-_](t1n|t1c|t2w|t2f|t1ce|t1|t2|flair|seg|gtv)$", re.IGNORECASE)
_NATIVE = ("t1n", "t1")


def read(options: LayoutOptions) -> Listing:
    """List the native T1 (``t1n``) of each case; time points of one patient share the patient's id.

    Cases without a ``t1n`` are named, and so is every file that is not understood; where one is there both as ``.nii``
    and ``.nii.gz``, the compressed one is used.

    Raises:
        InputError: if there is no such folder, or no case in it.
    """
    root = options.source
    listing = Listing(cohort="brats")
    tree = look(listing, root, options.follow_links)
    cases: dict[str, dict[str, list[VolumeFile]]] = {}
    strange: list[VolumeFile] = []
    for volume in tree.volumes():
        kind, case = _MODALITY.search(volume.stem), _case(volume.stem)
        holder = tidy(volume.path.parent.name)
        if case and _case(holder) == holder != case:
            remedy = "move it to its own folder, or rename it"
            listing.note("problem", case, volume.path, f"lies in the folder of {holder}", remedy, False)
        if kind and case:
            cases.setdefault(case, {}).setdefault(kind[1].lower(), []).append(volume)
        else:
            strange.append(volume)
    for folder in tree.folders:
        if (case := _case(tidy(folder.name))) == tidy(folder.name) and case:
            cases.setdefault(case, {})
    if not cases:
        packed = sorted(path.name for path in tree.files if re.search(r"\.(zip|tar(\.\w+)?|tgz|7z)$", path.name))
        hint = f"unpack {packed[0]} first" if packed else "give the folder that holds them as --source"
        raise InputError(f"{root}: no case like BraTS-GLI-00005-100; {hint}")
    listing.read_people(options.table)
    listing.match_ids(map(canonical_patient_id, cases))
    tasks: Counter[str] = Counter()
    for name, files in sorted(cases.items()):
        native = next((files[kind] for kind in _NATIVE if kind in files), [])
        tasks[match[1] if (match := _CASE.match(name)) else name.split("_")[0]] += bool(native)
        if native:
            _add_scans(listing, name, native)
            continue
        unknown = [volume for volume in strange if _is_below(volume.path, name)]
        there = f"but {unknown[0].name}" if unknown else "its folder is empty"
        there = f"only {', '.join(sorted(files))}" if files else there
        remedy = f"name it {name}-t1n.nii.gz if it is one" if unknown else "download the case again, or leave it out"
        listing.note("problem", name, "", f"has no t1n ({there})", remedy)
    for volume in strange:
        if not any(_is_below(volume.path, name) for name in cases):
            who = tidy(volume.path.relative_to(root).parts[0])
            remedy = "name it as BraTS does (BraTS-GLI-00005-100-t1n.nii.gz), or leave it out"
            listing.note("problem", who, volume.path, "is not named as BraTS names images", remedy)
    patients = {scan.patient_id for scan in listing.scans}
    old = sorted(filter(is_old_brats, patients))
    mixed = len(old) < len(patients)
    for patient in old:
        reason = "a case of BraTS before 2023, whose patients have other names since then" + "; here are both" * mixed
        remedy = "prepare either, or be sure that nobody is in both" if mixed else "do not mix it with later ones"
        listing.note("problem" if mixed else "quirk", patient, "", reason, remedy, False)
    listing.found = {
        **{task: n for task, n in sorted(tasks.items()) if n},
        "cases": len(cases),
        "patients": len(patients),
    }
    return listing.choose(options.sessions)


def time_point(name: str) -> str | None:
    """The time point in the name of a case: ``100`` of ``BraTS-GLI-00005-100``."""
    match = _CASE.match(name)
    return match[3] if match else None


def _case(name: str) -> str | None:
    """The case that a name begins with."""
    match = _CASE.match(name) or _OLD_CASE.match(name)
    return match[0] if match else None


def _is_below(path: Path, case: str) -> bool:
    return any(tidy(part) == case for part in path.parts[:-1])


def _add_scans(listing: Listing, name: str, volumes: list[VolumeFile]) -> None:
    """Add the native scans of a case; two of one folder are one scan, compressed and not."""
    patient = canonical_patient_id(name)
    facts = listing.describe(patient)
    subject = patient if _CASE.match(name) else name
    used: dict[Path, str] = {}
    for volume in sorted(volumes, key=lambda volume: (not volume.path.name.endswith(".gz"), str(volume.path))):
        if (folder := volume.folder) in used:
            reason = f"there both compressed and not: {used[folder]} is used"
            listing.note("quirk", name, volume.path, reason, left_out=True)
            continue
        used[folder] = volume.name
        place = listing.place(volume.path)
        listing.add(Scan(subject, time_point(name), patient, volume.path, place, **facts))
