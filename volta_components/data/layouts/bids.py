# SPDX-License-Identifier: Apache-2.0
"""Any BIDS data set with T1w images, among them Clinica's ADNI, AIBL and IXI, and this package's phantoms.

The walk is over ``sub-*/[ses-*/]anat/*_T1w.nii[.gz]`` and a few tables. PyBIDS would index every file of the data set
into a database first (minutes on ADNI) and brings SQLAlchemy models, formulaic and more for what is one walk here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from volta_components.data.columns import DATE_COLUMNS
from volta_components.data.identity import canonical_patient_id, cohort_of, grouped, is_worldwide
from volta_components.data.layouts.common import LabelFile, LayoutOptions, Listing, Scan, look, participants, slug
from volta_components.data.names import OTHER_CONTRASTS, date_in, date_of_cell, parse_name
from volta_components.data.spreadsheets import Row, read_table
from volta_components.data.tables import in_units, is_missing, pick, session_row, with_dates
from volta_components.data.volumes import NIFTI_SUFFIXES, conversion, volume_stem
from volta_components.data.walk import ASIDE, VolumeFile, tidy
from volta_components.errors import InputError

_LABEL = re.compile(r"hippocampus.*_dseg$")
# What the name of a label map says of the map, not of its image.
_OF_LABELS = frozenset({"desc", "label", "space", "res", "den", "atlas", "seg", "hemi"})


def read(options: LayoutOptions) -> Listing:
    """List the T1w scans of a BIDS folder.

    Sex, site, age and diagnosis come from ``participants.tsv`` (see ``participants``) and each subject's
    ``*_sessions.tsv`` (the session's own row wins). Label maps are files ``*hippocampus*_dseg.nii[.gz]`` of any
    derivative, at the scan's place, which do not name another run, acquisition or reconstruction than the scan's.

    Raises:
        InputError: if there is no such folder, or no ``sub-*`` folder in it.
    """
    root = options.source
    listing = Listing("")
    tree = look(listing, root, options.follow_links)
    subjects = [path.name for path in tree.folders if path.parent == root and path.name.startswith("sub-")]
    if not subjects:
        raise InputError(f"{root}: no sub-* folder, so not a BIDS data set; give its root, or another --layout")
    listing.cohort = _cohort(root, subjects)
    listing.found["subjects"] = len(subjects)
    patients = [canonical_patient_id(tidy(name)) for name in subjects]
    for patient, name in zip(patients, subjects, strict=True):
        listing.meet(patient, tidy(name))
    _read_participants(listing, options.table)
    listing.match_ids(patients)
    by_top = grouped(tree.volumes(), lambda volume: volume.path.relative_to(root).parts[0])
    volumes = [volume for top, inside in by_top.items() if top not in ASIDE for volume in inside]
    scans = _scans(listing, volumes)
    _others(listing, tree.folders, volumes, {scan.image for scan in scans})
    every, scans = scans, listing.one_of_session(scans, plainness)
    if options.labels != "none":
        labels = [v for v in by_top.get("derivatives", []) if _LABEL.search(v.stem)]
        scans = _labelled(listing, scans, every, labels)
    for scan in scans:
        listing.add(scan)
    listing.note_rows_without_scans(patients, "folder")
    listing.choose(options.sessions)
    _join_anatomies(listing)
    return listing


def _join_anatomies(listing: Listing) -> None:
    """All phantoms of one anatomy are one patient: none of them may be scored by what was trained on another."""
    for place, scan in enumerate(listing.scans):
        anatomy = (listing.table.row(scan.patient_id)[0] or {}).get("anatomy_id", "")
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


def _read_participants(listing: Listing, given: Path | None) -> None:
    path = given or participants(listing.root)
    if path is None:
        listing.note("problem", "(all)", "participants.tsv", "is missing", "sex and site stay unknown", False)
    listing.read_people(
        path, lambda text: canonical_patient_id(re.sub(r"^(sub[-_])?", "sub-", text, flags=re.IGNORECASE))
    )


def _scans(listing: Listing, volumes: Iterable[VolumeFile]) -> list[Scan]:
    """Scans that lie where BIDS has them; those whose name and folder contradict each other are left out."""
    root = listing.root
    rows_of = functools.cache(functools.partial(_rows_of, listing))
    scans = []
    for volume in volumes:
        subject, session = _subject_and_session(listing.place(volume.folder))
        name = parse_name(volume.stem)
        if subject is None or name.contrast.lower() != "t1w" or not volume.name.lower().endswith(NIFTI_SUFFIXES):
            continue
        if name.subject != subject or (session or name.session) != name.session:
            names = f"{name.subject} {name.session or ''}".strip()
            reason = f"its name says {names}, its folder {f'{subject} {session or str()}'.strip()}"
            remedy = "rename it, or move it to the folder that it belongs to"
            listing.note("problem", subject, volume.path, reason, remedy)
            continue
        session = session or name.session
        patient = canonical_patient_id(subject)
        if name.is_other:
            listing.note(
                "skipped", subject, volume.path, f"no T1 scan by its name (part-{name.part})", patient_id=patient
            )
            continue
        table = root / subject / f"{subject}_sessions.tsv"
        own = rows_of(subject, table) if session else []
        row = session_row(own, session)
        if own and row is None:
            known = sorted(str(pick(r, "session_id")) for r in own)
            reason, remedy = f"{session} has no row of its own among {', '.join(known)}", "name the session alike in it"
            if len(set(known)) < len(known):
                reason, remedy = f"none of its rows is surely that of {session}: {', '.join(known)}", "keep one of each"
            remedy += "; kept with what participants.tsv says"
            listing.note("problem", subject, table, reason, remedy, False)
        when = pick(row or {}, *DATE_COLUMNS) or _scan_time(volume, rows_of)
        date = date_of_cell(when or "") or date_in(session or "")
        if when and not date_of_cell(when):
            reason, remedy = f"date {when!r} cannot be read for certain", "write it as 2020-06-25; kept without it"
            listing.note("problem", subject, volume.path, reason, remedy, False)
        more = {column: cell for column, cell in (row or {}).items() if not is_missing(cell)}
        facts = listing.describe(patient, session, date, more)
        scans.append(Scan(subject, session, patient, volume.path, listing.place(volume.path), date=date, **facts))
    return scans


def _subject_and_session(folder: str) -> tuple[str | None, str | None]:
    """What a folder such as ``sub-01/ses-1/anat`` says; None for another one."""
    match = re.fullmatch(r"(sub-[^/]+)/(?:(ses-[^/]+)/)?anat", tidy(folder))
    return (match[1], match[2]) if match else (None, None)


def _scan_time(volume: VolumeFile, rows_of: Callable[[str, Path], list[Row]]) -> str | None:
    """When an image was acquired, by the ``*_scans.tsv`` of its session, or of its subject if there are no sessions."""
    folder, image = volume.folder.parent, volume.path.name
    name = f"{folder.parent.name}_{folder.name}" if folder.name.startswith("ses-") else folder.name
    for row in rows_of(name.split("_")[0], folder / f"{name}_scans.tsv"):
        if (pick(row, "filename") or "").endswith(f"anat/{image}"):
            return pick(row, *DATE_COLUMNS)
    return None


def _rows_of(listing: Listing, subject: str, path: Path) -> list[Row]:
    """Rows of a subject's table; empty where there is none or it cannot be read."""

    def complain(_: str, what: str, remedy: str) -> None:
        listing.note("problem", subject, path, what, remedy, False)

    if not path.exists() and not path.is_symlink():
        return []
    try:
        rows = read_table(path, complain)
        sidecar = path.with_suffix(".json")
        sidecar = sidecar if sidecar.is_file() else listing.root / f"{path.stem.split('_')[-1]}.json"
        return with_dates(in_units(rows, sidecar, complain))
    except InputError as error:
        complain(subject, str(error).removeprefix(f"{path}: "), "mend it; kept without it")
        return []


def plainness(scan: Scan) -> tuple[object, ...]:
    """Of a session's T1w images the lowest is taken: no contrast agent, plainest name, first run."""
    parts = parse_name(VolumeFile.of(scan.image).stem).entities
    numbers = [int(re.sub(r"\D", "", parts.get(key, "")) or 0) for key in ("run", "echo", "inv")]
    return "ce" in parts, len(set(parts) - {"run", "echo", "inv"}), *numbers


def _others(listing: Listing, folders: Iterable[Path], volumes: list[VolumeFile], used: set[Path]) -> None:
    """Name whoever has no T1w scan, sessions without one, and volumes whose names are not understood."""
    root = listing.root
    noted = {finding.subject for finding in listing.findings if finding.kind == "problem" and finding.left_out}
    places = {finding.file for finding in listing.findings}
    by_top: dict[str, list[VolumeFile]] = {tidy(path.name): [] for path in folders if path.parent == root}
    for volume in volumes:
        by_top.setdefault(tidy(volume.path.relative_to(root).parts[0]), []).append(volume)
    for top, inside in sorted(by_top.items()):
        strange = [
            v for v in inside if v.path not in used and parse_name(v.stem).contrast.lower() not in OTHER_CONTRASTS
        ]
        who = parse_name(volume_stem(Path(top))).subject
        if not top.startswith("sub-"):
            if strange:
                reason = f"is no sub-* folder, but holds {strange[0].name}"
                listing.note("problem", who, top, reason, "rename it as BIDS has it, or move it to sourcedata")
        elif not any(volume.path in used for volume in inside):
            if who not in noted:
                others = strange or inside
                reason = "has no T1w image" + (f", but {others[0].name}" if others else "")
                rename = f"name it {who}_T1w.nii.gz if it is one, in {who}/anat"
                rename = conversion(strange[0].path) or rename if strange else rename
                fetch = f"fetch it (datalad get {top})" if (root / ".datalad").is_dir() else "fetch it"
                listing.note("problem", who, top, reason, rename if others else f"{fetch}, or remove the folder")
        else:
            for volume in strange:
                if listing.place(volume.path) not in places:
                    rename = f"name it {who}_..._T1w.nii.gz, in a folder anat, or move it to sourcedata"
                    remedy = conversion(volume.path)
                    reason = "is no NIfTI file" if remedy else "is not named as BIDS names images"
                    listing.note("problem", who, volume.path, reason, remedy or rename)
    sessions = {tidy(listing.place(VolumeFile.of(path).folder.parent)) for path in used}
    with_scan = {place.split("/")[0] for place in sessions}
    for folder in folders:
        place = tidy(listing.place(folder))
        who = place.split("/")[0]
        if re.fullmatch(r"sub-[^/]+/ses-[^/]+", place) and place not in sessions and who in with_scan:
            listing.note("quirk", who, place, "has no T1w image")


def _labelled(listing: Listing, scans: list[Scan], every: list[Scan], labels: list[VolumeFile]) -> list[Scan]:
    """Scans with their label maps; maps without a scan, or of an image of ``every`` that is not used, are noted."""
    places = grouped(every, lambda scan: VolumeFile.of(scan.image).folder.relative_to(listing.root).as_posix())
    used = {scan.image: scan for scan in scans}
    found: dict[Path, VolumeFile] = {}
    for label in labels:
        # Of derivatives/NAME/sub-01/ses-1/anat, what follows NAME.
        place = "/".join(label.path.relative_to(listing.root).parts[2:-1])
        images = _images_of(label, places.get(place, []))
        subject = next((part for part in place.split("/") if part.startswith("sub-")), "(labels)")
        mine = [used[one.image] for one in images if one.image in used]
        if remedy := conversion(label.path):
            listing.note("problem", subject, label.path, "label of a format that is not read", remedy, False)
        elif not images:
            listing.note("problem", subject, label.path, "label without image", "fetch the scan")
        elif len({VolumeFile.of(one.image).stem for one in images}) > 1:
            remedy = "name it with the run-, acq- or rec- of its image"
            listing.note("problem", subject, label.path, "label of several images", remedy, False)
        elif not mine:
            reason = f"label of {images[0].image.name}, which is not the T1w that is used of this session"
            listing.note("problem", subject, label.path, reason, "move the other T1w to sourcedata, or label it", False)
        elif mine[0].image in found:
            reason = f"another label map: {found[mine[0].image].name} is used, by name alone"
            listing.note_scan("problem", mine[0], reason, "remove one", False, label.path)
        else:
            found[mine[0].image] = label
    return [replace(s, labels=(LabelFile(found[s.image].path),)) if s.image in found else s for s in scans]


def _images_of(label: VolumeFile, images: list[Scan]) -> list[Scan]:
    """Images with exactly a label's ``run-``, ``acq-`` and the like in their names, else those with these and more."""

    def parts(volume: VolumeFile) -> set[tuple[str, str]]:
        entities = parse_name(volume.stem).entities.items()
        return {(key, value.lstrip("0")) for key, value in entities if key not in _OF_LABELS}

    mine = parts(label)
    same = [one for one in images if parts(VolumeFile.of(one.image)) == mine]
    return same or [one for one in images if parts(VolumeFile.of(one.image)) >= mine]
