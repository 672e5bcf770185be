# SPDX-License-Identifier: Apache-2.0
"""Raw DICOM, as ADNI's and AIBL's archive gives it: folders of 2-D slices, one folder a series or several mixed.

``dcm2niix`` reads the headers (``-b o`` writes a sidecar and no volume) and later converts the one series that was
chosen. What it learns of each folder is kept, so that a second start or another shard does not read tens of thousands
of files again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from volta_components.data.identity import canonical_patient_id, cohort_of
from volta_components.data.layouts.common import (
    LayoutOptions,
    Listing,
    Scan,
    check_folder,
    describe_person,
    drop_doubles,
    read_people,
    relative,
    select_sessions,
    slug,
)
from volta_components.data.volumes import UnusableVolume
from volta_components.errors import InputError
from volta_components.files import read_json, write_json

_LOCALISER = re.compile(r"loc(?!al.?shim)|scout|survey|surview|3.?pl(ane)?|plane", re.IGNORECASE)
_OTHER = re.compile(
    r"t2|flair|\bpd\b|dti|dwi|diff|trace|\badc\b|\bfa\b|asl|perf|cbf|fmri|rest|bold|\bepi\b|field.?map|b1|calib|"
    r"swi|tof|angio|mra|hippo|phase|shim|circle|average",
    re.IGNORECASE,
)
_T1 = re.compile(r"mp.?rage|ir.?f?spgr|f?spgr|bravo|\btfl|tfe|t1|ir-?prep|3d.?mpr", re.IGNORECASE)
_REPEAT = re.compile(r"rep(eat)?|rpt|_r\d*$", re.IGNORECASE)
_SUFFIXES = {".dcm", ".ima", ".dicom"}
_WARNINGS = re.compile(r"missing|interslice|gap|inconsisten|not stacked|slice(s)? (order|distance)", re.IGNORECASE)


@dataclass(frozen=True)
class _Series:
    """One series of a folder."""

    folder: Path
    uid: str
    facts: dict[str, Any]
    shared: bool

    @property
    def description(self) -> str:
        return str(self.facts.get("SeriesDescription") or self.facts.get("ProtocolName") or "no description")


def read(options: LayoutOptions) -> Listing:
    """List the T1 series (MPRAGE, IR-SPGR and the like) of a folder of DICOM files; say why each other was skipped.

    The patient is the PatientID, else the first folder below the root; the session is the day of the scan. Of several
    T1 series in a session, the first that is no repeat is taken.

    Raises:
        InputError: if there is no such folder, or no DICOM file in it.
    """
    root = options.source
    check_folder(root)
    folders = dicom_folders(root)
    if not folders:
        raise InputError(f"{root}: no DICOM file in it or below; NIfTI files want --layout bids or folder")
    listing = Listing(cohort=slug(options.name or root.resolve().name))
    prefix = "AIBL" if listing.cohort == "aibl" else ""
    people = read_people(listing, options.table, prefix) if options.table else {}
    groups: dict[tuple[str, str], list[_Series]] = {}
    count = 0
    with ThreadPoolExecutor(options.workers) as pool:
        catalogues = pool.map(lambda folder: _catalogue(folder, options), folders)
        bar = tqdm(catalogues, total=len(folders), unit="folder", desc="reading DICOM headers")
        for folder, (series, message) in zip(folders, bar, strict=True):
            place = relative(folder, root)
            if not series:
                listing.note("problem", _first_part(folder, root), place, message, "download the series again")
            for uid, facts in series:
                count += 1
                one = _Series(folder, uid, facts, len(series) > 1)
                patient = _patient(one, root, prefix)
                if reason := why_not_t1(facts):
                    listing.note("choice", patient, place, f"series {one.description!r} skipped: {reason}")
                    continue
                groups.setdefault((patient, _session(one, root)), []).append(one)
    for (patient, session), several in sorted(groups.items()):
        several.sort(key=lambda s: (bool(_REPEAT.search(s.description)), s.facts.get("SeriesNumber") or 0, s.uid))
        for other in several[1:]:
            listing.note(
                "choice",
                patient,
                relative(other.folder, root),
                f"series {other.description!r} skipped: of this session's T1s, {several[0].description!r} is used",
            )
        listing.scans.append(_scan(listing, options, patient, session, several[0], people.get(patient)))
    cohorts = {cohort_of(scan.patient_id) for scan in listing.scans}
    if options.name is None and len(cohorts) == 1 and (only := cohorts.pop()):
        listing.cohort = only
    listing.found = {"series": count, "T1 sessions": len(groups), "patients": len({p for p, _ in groups})}
    listing.scans = drop_doubles(listing, select_sessions(listing, listing.scans, options.sessions))
    return listing


def why_not_t1(facts: dict[str, Any]) -> str | None:
    """Why a series is not taken, from dcm2niix's sidecar; None for a native T1."""
    kinds = {str(kind).upper() for kind in facts.get("ImageType") or ()}
    text = " ".join(str(facts.get(key) or "") for key in ("SeriesDescription", "ProtocolName"))
    if facts.get("Modality", "MR") != "MR":
        return f"modality {facts['Modality']}"
    if "LOCALIZER" in kinds or (_LOCALISER.search(text) and not _T1.search(text)):
        return "localiser"
    if "DERIVED" in kinds or "SECONDARY" in kinds:
        return f"derived (ImageType {'/'.join(map(str, facts['ImageType']))})"
    if kinds & {"P", "PHASE", "PHASE MAP"}:
        return "phase image"
    if _OTHER.search(text) and not re.search(r"mp.?rage", text, re.IGNORECASE):
        return "another contrast"
    guess = " ".join(map(str, facts.get("BidsGuess") or ()))
    if not _T1.search(text) and facts.get("PulseSequenceType") != "MPRAGE" and "T1w" not in guess:
        return "not known as a T1 (MPRAGE, IR-SPGR and the like)"
    return None


def _first_part(folder: Path, root: Path) -> str:
    parts = folder.relative_to(root).parts
    return parts[0] if parts else root.resolve().name


def _patient(series: _Series, root: Path, prefix: str) -> str:
    text = str(series.facts.get("PatientID") or "").strip() or _first_part(series.folder, root)
    return canonical_patient_id(f"{prefix}{text}" if text.isdigit() else text)


def _session(series: _Series, root: Path) -> str:
    when = str(series.facts.get("AcquisitionDateTime") or "")[:10]
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", when):
        found = re.search(r"(\d{4})[-_](\d\d)[-_](\d\d)", relative(series.folder, root))
        when = "-".join(found.groups()) if found else ""
    return f"ses-{when.replace('-', '')}" if when else "ses-1"


def _scan(
    listing: Listing,
    options: LayoutOptions,
    patient: str,
    session: str,
    series: _Series,
    row: dict[str, str] | None,
) -> Scan:
    root = options.source
    place = relative(series.folder, root)
    if options.table and row is None:
        listing.note("problem", patient, options.table.name, "has no row", "kept with what DICOM says", left_out=False)
    facts = describe_person(listing, patient, options.table.name if options.table else place, row)
    if facts["sex"] is None and series.facts.get("PatientSex") in ("F", "M"):
        facts["sex"] = series.facts["PatientSex"]
    if facts["age"] is None and isinstance(series.facts.get("PatientAge"), int | float):
        facts["age"] = float(series.facts["PatientAge"]) or None
    return Scan(
        subject_id="sub-" + re.sub(r"[^A-Za-z0-9]", "", f"{'ADNI' if cohort_of(patient) == 'adni' else ''}{patient}"),
        session=session,
        patient_id=patient,
        image=series.folder,
        source=place + (f"#{series.uid}" if series.shared else ""),
        series=series.uid,
        **facts,
    )


def dicom_files(folder: Path) -> list[Path]:
    """The files directly in a folder, sorted; hidden ones and DICOMDIR are left out."""
    return sorted(
        Path(entry.path)
        for entry in os.scandir(folder)
        if entry.is_file() and not entry.name.startswith(".") and entry.name != "DICOMDIR"
    )


def dicom_folders(root: Path) -> list[Path]:
    """Folders that directly hold DICOM files, told by the suffix or by the magic word of one of their first files."""

    def is_dicom(path: Path) -> bool:
        if path.suffix.lower() in _SUFFIXES:
            return True
        try:
            with path.open("rb") as stream:
                return stream.read(132)[128:] == b"DICM"
        except OSError:
            return False

    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        first = [Path(folder, name) for name in sorted(files) if not name.startswith(".")][:3]
        if any(map(is_dicom, first)):
            found.append(Path(folder))
    return sorted(found)


def _catalogue(folder: Path, options: LayoutOptions) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Series of one folder as (uid, sidecar), and what dcm2niix said when there is none."""
    try:
        stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in dicom_files(folder)]
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"
    key = hashlib.sha256(json.dumps([relative(folder, options.source), stamp]).encode()).hexdigest()[:32]
    cache = options.work / f"{key}.json" if options.work else None
    if cache and cache.exists():
        kept = read_json(cache)
        return [(uid, facts) for uid, facts in kept["series"]], kept["message"]
    with tempfile.TemporaryDirectory(prefix="volta3d-", dir=options.temporary) as temporary:
        done = run_dcm2niix(folder, Path(temporary), "-b", "o")
        series: dict[str, dict[str, Any]] = {}
        for path in sorted(Path(temporary).glob("*.json")):
            facts = json.loads(path.read_text(encoding="utf-8", errors="replace"))
            series.setdefault(str(facts.get("SeriesInstanceUID") or path.stem), facts)
        message = "" if series else _complaint(done)
        if cache and options.temporary:
            whole = Path(temporary) / "catalogue"
            write_json(whole, {"series": sorted(series.items()), "message": message})
            cache.parent.mkdir(parents=True, exist_ok=True)
            whole.replace(cache)
    return sorted(series.items()), message


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
    said = [line for line in lines if line.startswith(("Error", "Warning: File", "FileSize"))] or lines[-1:]
    return f"no series can be read: dcm2niix says {said[0]!r}" if said else "no series can be read"


def run_dcm2niix(folder: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run dcm2niix on the files directly in a folder; outputs are named by series UID, identity is kept.

    Raises:
        InputError: if the program is not installed.
    """
    try:
        from dcm2niix import bin as program
    except ImportError:
        program = "dcm2niix"
    # -g i: the user's own dcm2niix defaults must not change what comes out
    fixed = ["-g", "i", "-ba", "n", "-d", "0", "-z", "n", "-f", "%j"]
    command = [program, *fixed, *options, "-o", str(output), str(folder)]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as error:
        raise InputError("dcm2niix is not installed; pip install dcm2niix") from error


def convert_series(folder: Path, uid: str, output: Path) -> tuple[Path, list[str]]:
    """Convert one series to NIfTI.

    Args:
        folder: that holds its files.
        uid: SeriesInstanceUID.
        output: an empty folder.

    Returns:
        The NIfTI file; warnings of dcm2niix about missing or uneven slices.

    Raises:
        UnusableVolume: if the series does not become exactly one volume.
    """
    done = run_dcm2niix(folder, output, "-b", "y")
    found = sorted(output.glob(f"{uid}*.nii"))
    if len(found) > 1:
        plain = [path for path in found if not re.search(r"_(ph|ROI|i\d{5}|real|imaginary)", path.stem[len(uid) :])]
        found = plain or found
    if not found:
        raise UnusableVolume(folder, _complaint(done), "download the series again")
    if len(found) > 1:
        raise UnusableVolume(
            folder, f"its series becomes {len(found)} volumes", "convert it yourself and use --layout folder"
        )
    lines = {line.strip() for line in done.stdout.splitlines() if line.startswith("Warning") and _WARNINGS.search(line)}
    return found[0], [f"dcm2niix: {line.removeprefix('Warning:').strip()}"[:200] for line in sorted(lines)]
