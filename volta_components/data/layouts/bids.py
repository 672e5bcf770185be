# SPDX-License-Identifier: Apache-2.0
"""Any BIDS data set with T1w images, among them Clinica's ADNI, AIBL and IXI, and this package's phantoms.

The walk is over ``sub-*/[ses-*/]anat/*_T1w.nii[.gz]`` and three tables. PyBIDS would index every file of the data set
into a database first (minutes on ADNI) and brings SQLAlchemy models, formulaic and more for what is one glob here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from volta_components.data.identity import canonical_patient_id, cohort_of, is_worldwide
from volta_components.data.layouts.common import (
    LabelFile,
    LayoutOptions,
    Listing,
    Scan,
    check_folder,
    describe_person,
    drop_doubles,
    pick,
    read_delimited,
    read_table,
    relative,
    select_sessions,
    slug,
)
from volta_components.data.volumes import NIFTI_SUFFIXES, volume_suffix
from volta_components.errors import InputError


def read(options: LayoutOptions) -> Listing:
    """List the T1w scans of a BIDS folder.

    Sex, site, age and diagnosis come from ``participants.tsv`` and each subject's ``*_sessions.tsv`` (the session's own
    row wins). Label maps are files ``*hippocampus*_dseg.nii[.gz]`` of any derivative, at the scan's place.

    Raises:
        InputError: if there is no such folder, or no ``sub-*`` folder in it.
    """
    root = options.source
    check_folder(root)
    subjects = sorted(path for path in root.glob("sub-*") if path.is_dir())
    if not subjects:
        raise InputError(f"{root}: no sub-* folder, so not a BIDS data set; give its root, or another --layout")
    listing = Listing(cohort=_cohort(root, [path.name for path in subjects]))
    people = _participants(listing, options)
    listing.found["subjects"] = len(subjects)
    scans: list[Scan] = []
    for folder in subjects:
        scans += _subject(listing, options, folder, people.get(folder.name))
    for name in sorted(set(people) - {path.name for path in subjects}):
        listing.note("problem", name, "participants.tsv", "has a row but no folder", "fetch the scan, or drop the row")
    _labels_without_images(listing, options, scans)
    chosen = drop_doubles(listing, select_sessions(listing, scans, options.sessions))
    listing.scans = [_with_anatomy(scan, people.get(scan.subject_id, {})) for scan in chosen]
    return listing


def _with_anatomy(scan: Scan, row: Mapping[str, str]) -> Scan:
    """All phantoms of one anatomy are one patient: none of them may be scored by what was trained on another."""
    anatomy = row.get("anatomy_id", "")
    return replace(scan, patient_id=anatomy) if is_worldwide(anatomy) else scan


def _cohort(root: Path, names: list[str]) -> str:
    """From the ids where they tell, else the data set's own name, else the folder's; phantoms are ``phantom``."""
    cohorts = {cohort_of(canonical_patient_id(name)) for name in names}
    if len(cohorts) == 1 and (only := cohorts.pop()):
        return only
    try:
        description = json.loads((root / "dataset_description.json").read_text(encoding="utf-8"))
        name = description.get("Name")
        if any(str(tool.get("Name")) == "volta3d phantom" for tool in description.get("GeneratedBy", [])):
            name = "phantom"
    except (OSError, ValueError, AttributeError):
        name = None
    return slug(str(name or root.resolve().name))


def _participants(listing: Listing, options: LayoutOptions) -> dict[str, dict[str, str]]:
    path = options.table or options.source / "participants.tsv"
    if not path.exists():
        if options.table:
            raise InputError(f"{path}: no such file; give the table of subjects as --table")
        listing.note("problem", "(all)", "participants.tsv", "is missing", "sex and site stay unknown", False)
        return {}
    rows: dict[str, dict[str, str]] = {}
    for row in read_table(path) if options.table else read_delimited(path):
        name = pick(row, "participant_id", "subject_id")
        if name is None:
            continue
        name = name if name.startswith("sub-") else f"sub-{name}"
        if name in rows:
            if rows[name] != row:
                listing.note("problem", name, path.name, "has two rows that differ", "the first is used", False)
            continue
        rows[name] = row
    return rows


def _subject(listing: Listing, options: LayoutOptions, folder: Path, person: dict[str, str] | None) -> list[Scan]:
    root, name = options.source, folder.name
    table = folder / f"{name}_sessions.tsv"
    visits: dict[str, dict[str, str]] = {}
    if table.exists():
        try:
            for row in read_delimited(table):
                if visit := pick(row, "session_id"):
                    visits[visit if visit.startswith("ses-") else f"ses-{visit}"] = row
        except InputError as error:
            listing.note("problem", name, relative(table, root), str(error).split(": ", 1)[-1], "", False)
    try:
        visits_found: list[Path | None] = [*sorted(path for path in folder.glob("ses-*") if path.is_dir())]
        scans = []
        for session in visits_found or [None]:
            anat = (session or folder) / "anat"
            images = [
                path
                for path in (sorted(anat.iterdir()) if anat.is_dir() else [])
                if volume_suffix(path) in NIFTI_SUFFIXES and path.name.removesuffix(".gz").endswith("_T1w.nii")
            ]
            if chosen := _choose(listing, root, name, images):
                row = (
                    {**(person or {}), **{k: v for k, v in visits.get(session.name, {}).items() if v != "n/a"}}
                    if (session)
                    else dict(person or {})
                )
                scans.append(_scan(listing, options, name, session, chosen, row))
    except PermissionError as error:
        file = relative(Path(error.filename or folder), root)
        listing.note("problem", name, file, "permission denied", "make it readable (chmod u+rx)")
        return []
    if not scans:
        others = sorted(path for path in folder.rglob("anat/*") if volume_suffix(path) and path.is_file())
        reason = f"has no T1w image, but {others[0].name}" if others else "has no T1w image"
        remedy = f"name it {name}_T1w.nii.gz if it is one" if others else "fetch it, or remove the folder"
        listing.note("problem", name, relative(folder, root), reason, remedy)
    elif person is None:
        listing.note("problem", name, "participants.tsv", "has no row", "kept without sex and site", False)
    return scans


def _choose(listing: Listing, root: Path, name: str, images: list[Path]) -> Path | None:
    """One T1w of a session: without contrast agent, the first run, the plainest name."""

    def rank(path: Path) -> tuple[object, ...]:
        run = re.search(r"_run-(\d+)", path.name)
        return ("_ce-" in path.name, path.name.count("_"), int(run[1]) if run else 0, len(path.name), path.name)

    images = sorted(images, key=rank)
    for other in images[1:]:
        same = other.name.removesuffix(".gz") == images[0].name.removesuffix(".gz")
        reason = "same scan, compressed and not" if same else "another T1w of this session"
        listing.note("quirk", name, relative(other, root), f"{reason}: {images[0].name} is used", "", True)
    return images[0] if images else None


def _scan(
    listing: Listing, options: LayoutOptions, name: str, session: Path | None, image: Path, row: dict[str, str]
) -> Scan:
    root = options.source
    patient = canonical_patient_id(name)
    facts = describe_person(listing, patient, "participants.tsv", row)
    labels: tuple[LabelFile, ...] = ()
    if options.labels != "none":
        place = image.parent.relative_to(root)
        found = [
            path
            for path in sorted(root.glob(f"derivatives/*/{place.as_posix()}/*hippocampus*_dseg.nii*"))
            if volume_suffix(path) in NIFTI_SUFFIXES
        ]
        if len(found) > 1:
            listing.note("quirk", name, relative(found[1], root), f"another label map: {found[0].name} is used")
        labels = tuple(LabelFile(path) for path in found[:1])
    return Scan(
        subject_id=name,
        session=session.name if session else None,
        patient_id=patient,
        image=image,
        source=relative(image, root),
        labels=labels,
        **facts,
    )


def _labels_without_images(listing: Listing, options: LayoutOptions, scans: list[Scan]) -> None:
    if options.labels == "none":
        return
    used = {label.path for scan in scans for label in scan.labels}
    places = {scan.image.parent.relative_to(options.source) for scan in scans}
    for path in sorted(options.source.glob("derivatives/*/sub-*/**/*hippocampus*_dseg.nii*")):
        if (
            path not in used
            and path.parent.relative_to(options.source / "derivatives" / path.parts[len(options.source.parts) + 1])
            not in places
        ):
            subject = next(part for part in path.parts if part.startswith("sub-"))
            listing.note("problem", subject, relative(path, options.source), "label without image", "fetch the scan")
