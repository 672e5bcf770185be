# SPDX-License-Identifier: Apache-2.0
"""Simply a folder of volumes (NIfTI, MINC, MGH), with or without labels and a table."""

from __future__ import annotations

import re
from pathlib import Path

from volta_components.data.identity import canonical_patient_id
from volta_components.data.layouts.common import (
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
    slug,
)
from volta_components.data.volumes import volume_stem
from volta_components.errors import InputError

_LABEL = re.compile(r"[._-](label|labels|seg|mask|dseg)$", re.IGNORECASE)
_SESSION = re.compile(r"[._-](ses-[A-Za-z0-9]+)(?=[._-]|$)")


def read(options: LayoutOptions) -> Listing:
    """List all volumes under a folder.

    A file's name without its suffix is its subject id (a ``_ses-X`` in it is the session). A file in a folder
    ``labels``, or whose name ends in ``_label``, ``_seg``, ``_mask`` or ``_dseg``, is the label of the volume of that
    name. A table (``participants.tsv``, ``participants.csv`` or ``--table``) may give sex, age, diagnosis and site.

    Raises:
        InputError: if there is no such folder, or no volume in it.
    """
    root = options.source
    files = find_volumes(root)
    listing = Listing(cohort=slug(root.resolve().name))
    labels: dict[str, Path] = {}
    images: list[tuple[str, Path]] = []
    for path in files:
        stem = volume_stem(path)
        inside = {part.lower() for part in path.relative_to(root).parts[:-1]}
        if inside & {"labels", "label", "labelstr"} or _LABEL.search(stem):
            name = _LABEL.sub("", stem)
            if name in labels:
                listing.note("problem", name, relative(path, root), "double label file", "the first is used", False)
            labels.setdefault(name, path)
        else:
            images.append((stem, path))
    if not images:
        raise InputError(f"{root}: no volume (.nii, .nii.gz, .mnc, .mgz) in it or below; DICOM wants --layout dicom")
    table = options.table or next(
        (root / name for name in ("participants.tsv", "participants.csv") if (root / name).exists()), None
    )
    people = read_people(listing, table) if table else {}
    for stem, path in images:
        session = _SESSION.search(stem)
        subject = stem[: session.start()] if session else stem
        patient = canonical_patient_id(subject)
        row = people.get(patient) or people.get(canonical_patient_id(stem))
        if table and row is None:
            listing.note("problem", subject, table.name, "has no row", "kept without sex and site", left_out=False)
        facts = describe_person(listing, patient, table.name if table else "", row)
        label = labels.get(stem) if options.labels != "none" else None
        listing.scans.append(
            Scan(
                subject,
                session[1] if session else None,
                patient,
                path,
                relative(path, root),
                labels=(LabelFile(label),) if label else (),
                **facts,
            )
        )
    if options.labels != "none":
        for name in sorted(set(labels) - {stem for stem, _ in images}):
            listing.note("problem", name, relative(labels[name], root), "label without image", "add the image")
    known = {scan.patient_id for scan in listing.scans}
    for person in sorted(set(people) - known - {canonical_patient_id(stem) for stem, _ in images}):
        listing.note(
            "problem", person, table.name if table else "", "has a row but no volume", "add it, or drop the row"
        )
    listing.found = {"volumes": len(images), "labels": len(labels)}
    listing.scans = drop_doubles(listing, select_sessions(listing, listing.scans, options.sessions))
    return listing
