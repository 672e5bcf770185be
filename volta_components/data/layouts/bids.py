# SPDX-License-Identifier: Apache-2.0
"""Any BIDS data set with T1w images, among them Clinica's ADNI, AIBL and IXI, and this package's phantoms.

The walk is over ``sub-*/[ses-*/]anat/*_T1w.nii[.gz]`` and a few tables. PyBIDS would index every file of the data set
into a database first (minutes on ADNI) and brings SQLAlchemy models, formulaic and more for what is one walk here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from volta_components.data.identity import canonical_patient_id, cohort_of, is_worldwide
from volta_components.data.layouts.common import (
    LabelFile,
    LayoutOptions,
    Listing,
    Scan,
    align,
    choose,
    describe_person,
    look,
    note_rows_without_scans,
    one_of_session,
    read_table_of_people,
    relative,
    slug,
)
from volta_components.data.names import OTHER_CONTRASTS, date_in, date_of_cell, parse_name
from volta_components.data.tables import DATE_COLUMNS, People, Row, is_missing, pick, read_table, session_row
from volta_components.data.volumes import NIFTI_SUFFIXES
from volta_components.data.walk import VolumeFile, tidy
from volta_components.errors import InputError

# Folders beside the subjects in which BIDS keeps what is no raw scan.
ASIDE = frozenset({"derivatives", "sourcedata", "code", "stimuli", "phenotype"})
_LABEL = re.compile(r"hippocampus.*_dseg$")


def read(options: LayoutOptions) -> Listing:
    """List the T1w scans of a BIDS folder.

    Sex, site, age and diagnosis come from ``participants.tsv`` and each subject's ``*_sessions.tsv`` (the session's own
    row wins). Label maps are files ``*hippocampus*_dseg.nii[.gz]`` of any derivative, at the scan's place.

    Raises:
        InputError: if there is no such folder, or no ``sub-*`` folder in it.
    """
    root = options.source
    listing = Listing("")
    tree = look(listing, root, options.follow_links)
    subjects = {path.name: path for path in tree.folders if path.parent == root and path.name.startswith("sub-")}
    if not subjects:
        raise InputError(f"{root}: no sub-* folder, so not a BIDS data set; give its root, or another --layout")
    listing.cohort = _cohort(root, list(subjects))
    listing.found["subjects"] = len(subjects)
    for name in subjects:
        listing.meet(canonical_patient_id(tidy(name)), tidy(name))
    people = _participants(listing, options)
    patients = [canonical_patient_id(tidy(name)) for name in subjects]
    align(listing, people, patients)
    volumes = [volume for volume in tree.volumes() if volume.path.relative_to(root).parts[0] not in ASIDE]
    scans = _scans(listing, options, volumes, people)
    _others(listing, root, tree.folders, volumes, {scan.image for scan in scans})
    scans = one_of_session(listing, scans, plainness)
    if options.labels != "none":
        found = [
            v for v in tree.volumes() if v.path.relative_to(root).parts[0] == "derivatives" and _LABEL.search(v.stem)
        ]
        scans = _labelled(listing, root, scans, found)
    for scan in scans:
        listing.add(scan)
    note_rows_without_scans(listing, people, patients, "folder")
    choose(listing, options.sessions)
    if people:
        _join_anatomies(listing, people)
    return listing


def _join_anatomies(listing: Listing, people: People) -> None:
    """All phantoms of one anatomy are one patient: none of them may be scored by what was trained on another."""
    for place, scan in enumerate(listing.scans):
        anatomy = (people.row(scan.patient_id)[0] or {}).get("anatomy_id", "")
        if is_worldwide(anatomy):
            listing.people.pop(scan.patient_id, None)
            listing.meet(anatomy)
            listing.scans[place] = replace(scan, patient_id=anatomy)


def _cohort(root: Path, names: list[str]) -> str:
    """From the ids if they show it, else the data set's own name, else the folder's; phantoms are ``phantom``."""
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


def _participants(listing: Listing, options: LayoutOptions) -> People | None:
    path = options.table or options.source / "participants.tsv"
    if not options.table and not path.exists() and not path.is_symlink():
        listing.note("problem", "(all)", "participants.tsv", "is missing", "sex and site stay unknown", False)
        return None
    return read_table_of_people(
        listing, path, lambda text: canonical_patient_id(re.sub(r"^(sub[-_])?", "sub-", text, flags=re.IGNORECASE))
    )


def _scans(
    listing: Listing, options: LayoutOptions, volumes: Iterable[VolumeFile], people: People | None
) -> list[Scan]:
    """Scans that lie where BIDS has them; those whose name and folder contradict each other are left out."""
    root = options.source
    tables: dict[Path, list[Row]] = {}
    scans = []
    for volume in volumes:
        subject, session = _place(volume.path, root)
        name = parse_name(volume.stem)
        if subject is None or name.contrast.lower() != "t1w" or not volume.name.lower().endswith(NIFTI_SUFFIXES):
            continue
        place = relative(volume.path, root)
        if name.subject != subject or (session or name.session) != name.session:
            names = f"{name.subject} {name.session or ''}".strip()
            reason = f"its name says {names}, its folder {f'{subject} {session or str()}'.strip()}"
            listing.note("problem", subject, place, reason, "rename it, or move it to the folder that it belongs to")
            continue
        patient = canonical_patient_id(subject)
        own = _session_table(listing, root, subject, session, tables)
        row = own and session_row(own, session)
        if own and row is None:
            known = ", ".join(sorted(str(pick(r, "session_id")) for r in own))
            reason = f"{session or 'the scan'} has no row of its own among {known}"
            remedy = "name the session alike in the table; kept with what participants.tsv says"
            listing.note("problem", subject, f"{subject}/{subject}_sessions.tsv", reason, remedy, False)
        when = pick(row or {}, *DATE_COLUMNS) or _scan_time(listing, volume.path, root, tables)
        date = date_of_cell(when or "") or date_in(session or "")
        if when and not is_missing(when) and not date_of_cell(when):
            reason, remedy = f"date {when!r} cannot be read for certain", "write it as 2020-06-25; kept without it"
            listing.note("problem", subject, place, reason, remedy, False)
        more = {column: cell for column, cell in (row or {}).items() if not is_missing(cell)}
        facts = describe_person(listing, people, patient, session, date, more)
        scans.append(Scan(subject, session, patient, volume.path, place, date=date, **facts))
    return scans


def _place(image: Path, root: Path) -> tuple[str | None, str | None]:
    """Subject and session by the folders, as ``sub-01/ses-1/anat`` has them; None where it lies elsewhere."""
    match = re.fullmatch(r"(sub-[^/]+)/(?:(ses-[^/]+)/)?anat", tidy(relative(VolumeFile.of(image).folder, root)))
    return (match[1], match[2]) if match else (None, None)


def _session_table(
    listing: Listing, root: Path, subject: str, session: str | None, tables: dict[Path, list[Row]]
) -> list[Row]:
    """A subject's ``sub-*_sessions.tsv``; empty where there is none, or where there are no sessions."""
    path = root / subject / f"{subject}_sessions.tsv"
    return _table(listing, path, root, subject, tables) if session else []


def _scan_time(listing: Listing, image: Path, root: Path, tables: dict[Path, list[Row]]) -> str | None:
    """When an image was acquired, by the ``*_scans.tsv`` of its session."""
    folder = VolumeFile.of(image).folder.parent
    name = image.name.split("_ses-")[0] if not folder.name.startswith("ses-") else f"{folder.parent.name}_{folder.name}"
    subject = name.split("_")[0]
    for row in _table(listing, folder / f"{name}_scans.tsv", root, subject, tables):
        if (pick(row, "filename") or "").endswith(f"anat/{image.name}"):
            return pick(row, *DATE_COLUMNS)
    return None


def _table(listing: Listing, path: Path, root: Path, subject: str, tables: dict[Path, list[Row]]) -> list[Row]:
    """Rows of a subject's table, read once; empty where there is none or it cannot be read."""
    if path not in tables:
        tables[path] = []
        place = relative(path, root)

        def complain(_: str, what: str, remedy: str) -> None:
            listing.note("problem", subject, place, what, remedy, False)

        if path.exists() or path.is_symlink():
            try:
                tables[path] = read_table(path, complain)
            except InputError as error:
                reason = str(error).removeprefix(f"{path}: ")
                listing.note("problem", subject, place, reason, "mend it; kept without it", False)
    return tables[path]


def plainness(scan: Scan) -> tuple[object, ...]:
    """Of a session's T1w images the lowest is taken: no contrast agent, no phase image, plainest name, first run."""
    parts = parse_name(VolumeFile.of(scan.image).stem).entities
    numbers = [int(re.sub(r"\D", "", parts.get(key, "")) or 0) for key in ("run", "echo", "inv")]
    return "ce" in parts, parts.get("part", "mag") != "mag", len(set(parts) - {"run", "echo", "inv"}), *numbers


def _others(listing: Listing, root: Path, folders: Iterable[Path], volumes: list[VolumeFile], used: set[Path]) -> None:
    """Name whoever has no T1w scan, sessions without one, and volumes whose names are not understood."""
    noted = {finding.subject for finding in listing.findings if finding.kind == "problem" and finding.left_out}
    places = {finding.file for finding in listing.findings}
    by_top: dict[str, list[VolumeFile]] = {tidy(path.name): [] for path in folders if path.parent == root}
    for volume in volumes:
        by_top.setdefault(tidy(volume.path.relative_to(root).parts[0]), []).append(volume)
    for top, inside in sorted(by_top.items()):
        strange = [
            v for v in inside if v.path not in used and parse_name(v.stem).contrast.lower() not in OTHER_CONTRASTS
        ]
        who = parse_name(VolumeFile(root, top).stem).subject
        if not top.startswith("sub-"):
            if strange:
                reason = f"is no sub-* folder, but holds {strange[0].name}"
                listing.note("problem", who, top, reason, "rename it as BIDS has it, or move it to sourcedata")
        elif not any(volume.path in used for volume in inside):
            if who not in noted:
                others = strange or inside
                reason = "has no T1w image" + (f", but {others[0].name}" if others else "")
                rename = f"name it {who}_T1w.nii.gz if it is one, in {who}/anat"
                fetch = f"fetch it (datalad get {top})" if (root / ".datalad").is_dir() else "fetch it"
                listing.note("problem", who, top, reason, rename if others else f"{fetch}, or remove the folder")
        else:
            for volume in strange:
                if (place := relative(volume.path, root)) not in places:
                    remedy = f"name it {who}_..._T1w.nii.gz, in a folder anat, or move it to sourcedata"
                    listing.note("problem", who, place, "is not named as BIDS names images", remedy)
    sessions = {tidy(relative(VolumeFile.of(path).folder.parent, root)) for path in used}
    with_scan = {place.split("/")[0] for place in sessions}
    for folder in folders:
        place = tidy(relative(folder, root))
        who = place.split("/")[0]
        if re.fullmatch(r"sub-[^/]+/ses-[^/]+", place) and place not in sessions and who in with_scan:
            listing.note("quirk", who, place, "has no T1w image")


def _labelled(listing: Listing, root: Path, scans: list[Scan], labels: list[VolumeFile]) -> list[Scan]:
    """Scans with their label maps; maps without a scan are noted."""
    places: dict[str, list[VolumeFile]] = {}
    for label in labels:
        # derivatives/NAME/sub-01/ses-1/anat
        places.setdefault("/".join(label.path.relative_to(root).parts[2:-1]), []).append(label)
    result = []
    for scan in scans:
        found = places.pop(VolumeFile.of(scan.image).folder.relative_to(root).as_posix(), [])
        for other in found[1:]:
            reason = f"another label map: {found[0].name} is used, by name alone"
            listing.note_scan("problem", scan, reason, "remove one", False, relative(other.path, root))
        result.append(replace(scan, labels=tuple(LabelFile(label.path) for label in found[:1])))
    for place, found in sorted(places.items()):
        subject = next((part for part in place.split("/") if part.startswith("sub-")), "(labels)")
        for label in found:
            listing.note("problem", subject, relative(label.path, root), "label without image", "fetch the scan")
    return result
