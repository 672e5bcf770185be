# SPDX-License-Identifier: Apache-2.0
"""Raw DICOM, as ADNI's and AIBL's archive gives it: folders of 2-D slices, in whatever folders these lie.

What is learnt of each folder is kept, so that a second start or another shard does not read tens of thousands of files
again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from volta_components.data.identity import canonical_patient_id, cohort_of, grouped, is_worldwide
from volta_components.data.layouts.common import LayoutOptions, Listing, Scan, look, relative, slug
from volta_components.data.layouts.series import (
    MIN_SLICES,
    Folder,
    Image,
    distance,
    magnitude,
    may_be_dicom,
    read_folder,
    slices,
    why_not_whole,
    without_copies,
)
from volta_components.data.names import date_in, date_of_folders, split_visit
from volta_components.data.tables import parse_age, parse_sex
from volta_components.data.volumes import volume_suffix
from volta_components.data.walk import Tree, size_and_time, tidy
from volta_components.errors import InputError
from volta_components.files import read_json, write_json

_LOCALISER = re.compile(
    r"locali[sz]er|(?<![a-z])loc(?![a-z]|al.?shim)|scout|survey|surview|3.?plane|(?<![a-z])3?.?pl(?![a-z])",
    re.IGNORECASE,
)
_OTHER = re.compile(
    r"t2|flair|\bpd\b|dti|dwi|diff|trace|\badc\b|\bfa\b|asl|perf|cbf|fmri|rest|bold|\bepi\b|field.?map|b1|calib|"
    r"swi|tof|angio|mra|hippo|phase|shim|circle|average",
    re.IGNORECASE,
)
_T1 = re.compile(r"mp.?rage|ir.?f?spgr|f?spgr|bravo|\btfl|tfe|t1|ir-?prep|3d.?mpr", re.IGNORECASE)
_MP2RAGE = re.compile(r"mp2.?rage", re.IGNORECASE)
_REPEAT = re.compile(r"rep(eat)?|rpt|_r\d*$", re.IGNORECASE)
_CONTRAST = re.compile(r"\+ ?c\b|\bc\+|\bgd|gad|contrast|(?<![a-z])(km|ce|post)(?![a-z])", re.IGNORECASE)
# What anonymisers and test systems write for a PatientID.
_NOBODY = re.compile(
    r"((anon[a-z]*|de-?identified|removed|unknown|none|null|nil|n/?a|no.?(name|id)|x+|patient|subject|test|volunteer"
    r"|phantom|id|0+)?[\W_]*)*",
    re.IGNORECASE,
)
THIN = 2.0  # mm
# Ages of a table and a header may differ by so much: rounded, or of a day between two visits.
_YEARS_APART = 2.0


@dataclass(frozen=True)
class _Series:
    """One series of whatever folders.

    Attributes:
        uid: SeriesInstanceUID.
        images: each once.
        facts: of its first image.
        folders: that its images lie in.
        shared: whether its first folder holds other series too.
        problem: why it is no whole volume, and what to do; None if it is one.
    """

    uid: str
    images: tuple[Image, ...]
    facts: dict[str, Any]
    folders: tuple[Path, ...]
    shared: bool
    problem: tuple[str, str] | None

    def text(self, name: str) -> str:
        """What the header says under a name; empty where it says nothing."""
        return str(self.facts.get(name) or "").strip()

    @property
    def study(self) -> str:
        """StudyInstanceUID; without one, the series is a study of its own."""
        return self.text("StudyInstanceUID") or self.uid

    @property
    def description(self) -> str:
        return self.text("SeriesDescription") or self.text("ProtocolName") or "no description"

    @property
    def is_3d(self) -> bool:
        kind, gap = self.facts.get("MRAcquisitionType"), distance(self.images)
        return kind == "3D" or (kind is None and len(slices(self.images)) >= 60 and gap is not None and gap <= THIN)

    @property
    def has_agent(self) -> bool:
        """Whether a contrast agent was given, by its header or its name."""
        text = f"{self.description} {self.text('ProtocolName')}"
        return bool(self.text("ContrastBolusAgent") or _CONTRAST.search(text))

    @property
    def rank(self) -> tuple[object, ...]:
        """Of a session's T1s the lowest is taken: 3-D, thin slices, no contrast agent, whole, no repeat."""
        thickness = 0.0 if self.is_3d else float(self.text("SliceThickness") or 0)
        thick = max(distance(self.images) or 0.0, thickness)
        is_thick = 0 if thick <= THIN else round(thick)
        is_repeat = _REPEAT.search(self.description) is not None
        return not self.is_3d, is_thick, self.has_agent, self.problem is not None, is_repeat


def read(options: LayoutOptions) -> Listing:
    """List the T1 series (MPRAGE, IR-SPGR and the like) of a folder of DICOM files; say why each other was skipped.

    A series is taken together whatever folders its images lie in. The patient is the PatientID (``options.patients``),
    the session the day of the scan. Of several T1 series in a session, a 3-D one of thin slices without contrast agent
    that is no repeat is taken.

    Raises:
        InputError: if there is no such folder, or no DICOM file in it.
    """
    root = options.source
    listing = Listing(cohort=slug(options.name or root.resolve().name))
    tree = look(listing, root, options.follow_links)
    folders = grouped(filter(may_be_dicom, tree.files), lambda path: path.parent)
    if not folders:
        raise InputError(f"{root}: no DICOM file in it or below; for NIfTI files use --layout bids or folder")
    series = _all_series(listing, options, folders)
    who = _patients(listing, options.patients, series)
    listing.read_people(options.table, lambda text: _canonical(listing, text))
    listing.match_ids(who.values())
    groups: dict[tuple[str, str], list[_Series]] = {}
    skipped: dict[str, list[str]] = {}
    sessions = _sessions(series, who, root)
    single = Counter((who[one.uid], one.description) for one in series if len(slices(one.images)) == 1)
    for one in series:
        patient = who[one.uid]
        listing.meet(patient)
        if reason := why_not_t1(one.facts, one.images):
            if (count := single[patient, one.description]) >= MIN_SLICES and len(slices(one.images)) == 1:
                reason = f"{count} series of one slice each: every file has a SeriesInstanceUID of its own"
            what = f"series {one.description!r} skipped: {reason}"
            listing.note("skipped", patient, one.folders[0], what, patient_id=patient)
            if (why := f"{one.description!r}: {reason}") not in skipped.setdefault(patient, []):
                skipped[patient].append(why)
        else:
            groups.setdefault((patient, sessions[one.uid]), []).append(one)
    for (patient, session), several in sorted(groups.items()):
        _one_of_session(listing, patient, session, several)
    _note_without_t1(listing, tree, series, {patient for patient, _ in groups}, skipped)
    listing.note_rows_without_scans(listing.people, "DICOM files")
    cohorts = {cohort_of(scan.patient_id) for scan in listing.scans}
    if options.name is None and len(cohorts) == 1 and (only := cohorts.pop()):
        listing.cohort = only
    listing.found = {"series": len(series), "T1 sessions": len(groups), "patients": len(set(who.values()))}
    return listing.choose(options.sessions)


def _canonical(listing: Listing, text: str) -> str:
    """Canonical patient id; AIBL writes bare numbers."""
    prefix = "AIBL" if listing.cohort == "aibl" and text.isdigit() else ""
    return canonical_patient_id(f"{prefix}{text}")


# --- which series ----------------------------------------------------------------------------------------------------


def _all_series(listing: Listing, options: LayoutOptions, folders: dict[Path, list[Path]]) -> list[_Series]:
    """Read all headers and put together what belongs together; name what is damaged, absent, doubled or uneven."""
    root = options.source
    images: dict[tuple[str, str], list[Image]] = {}
    facts: dict[Path, dict[str, dict[str, Any]]] = {}
    with ThreadPoolExecutor(options.workers) as pool:
        catalogues = pool.map(lambda folder: _catalogue(folder, folders[folder], options), folders)
        bar = tqdm(catalogues, total=len(folders), unit="folder", desc="reading DICOM headers")
        for folder, found in zip(folders, bar, strict=True):
            _note_bad_files(listing, folder, found)
            facts[folder] = found.facts
            for image in found.images:
                images.setdefault((image.series, image.patient), []).append(image)
    result: list[_Series] = []
    for (uid, patient), several in sorted(images.items()):
        kept, copies = without_copies(several)
        for number, part in enumerate(_apart(kept, root)):
            part = magnitude(part)
            places = tuple(sorted({image.path.parent for image in part}))
            own = {**facts[places[0]][uid], "PatientID": patient}
            name = uid if not number and not any(other.uid == uid for other in result) else f"{uid} {len(result)}"
            problem = why_not_whole(part, own)
            one = _Series(name, tuple(part), own, places, len(facts[places[0]]) > 1, problem)
            if why_not_t1(own, part) is None:
                _note_folders(listing, one, [image for image in copies if image.uid in {i.uid for i in part}])
            result.append(one)
    return result


def _apart(images: list[Image], root: Path) -> list[list[Image]]:
    """Images of one series; by their first folders where these have different images under one SOPInstanceUID."""
    tops = grouped(images, lambda image: _first_part(image.path.parent, root))
    counts = Counter(image.uid for image in images)
    return list(tops.values()) if len(tops) > 1 and max(counts.values()) > 1 else [images]


def _note_folders(listing: Listing, one: _Series, copies: list[Image]) -> None:
    """Say that a series lies in several folders, or has copies of images."""
    who = _first_part(one.folders[0], listing.root)
    if copies:
        what = f"{len(copies)} doubled instances of series {one.description!r}"
        reason = f"{what}: copies with the same SOPInstanceUID; one of them is used"
        listing.note("quirk", who, copies[0].path.parent, reason, patient_id="")
    if len(one.folders) > 1:
        names = " and ".join(listing.place(folder) for folder in one.folders[:3])
        reason = f"series {one.description!r} lies in {len(one.folders)} folders, taken together: {names}"
        listing.note("quirk", who, one.folders[0], reason, patient_id="")


def _note_bad_files(listing: Listing, folder: Path, found: Folder) -> None:
    who = _first_part(folder, listing.root)
    for bad, what, remedy in (
        (found.absent, "have no content", next(iter(found.absent.values()), "")),
        (found.damaged, f"are damaged ({next(iter(found.damaged.values()), '')})", "download the series again"),
    ):
        if bad:
            count = len(found.images) + len(found.damaged) + len(found.absent)
            names = ", ".join(sorted(bad)[:3]) + (", ..." if len(bad) > 3 else "")
            reason = f"{len(bad)} of {count} DICOM files {what}: {names}"
            listing.note("problem", who, folder, reason, remedy, not found.images, "" if found.images else None)


def _catalogue(folder: Path, files: list[Path], options: LayoutOptions) -> Folder:
    """What a folder's files hold; kept for the next start."""
    stamp = [[tidy(path.name), *size_and_time(path)] for path in files]
    key = hashlib.sha256(json.dumps(["5", relative(folder, options.source), stamp]).encode()).hexdigest()[:32]
    cache = options.work / f"{key}.json" if options.work else None
    if cache and cache.exists():
        kept = read_json(cache)
        return Folder(**{**kept, "images": [_image(folder, image) for image in kept["images"]]})
    found = read_folder(files)
    names = [image.path.name for image in found.images]
    if cache and not found.absent and all(tidy(name) == name for name in names):
        kept = asdict(found)
        for image in kept["images"]:
            image["path"] = image["path"].name
        write_json(cache, kept)
    return found


def _image(folder: Path, kept: dict[str, Any]) -> Image:
    """An image as the cache has it."""
    lists = {name: tuple(kept[name]) for name in ("direction", "places")}
    return Image(**{**kept, **lists, "path": folder / kept["path"]})


def why_not_t1(facts: dict[str, Any], images: Sequence[Image] = ()) -> str | None:
    """Why a series is not taken, from the header of its first image and its slices; None for a native T1."""
    kinds = {str(kind).upper() for kind in facts.get("ImageType") or ()}
    text = " ".join(str(facts.get(key) or "") for key in ("SeriesDescription", "ProtocolName"))
    if facts.get("Modality", "MR") != "MR":
        return f"modality {facts['Modality']}"
    if "LOCALIZER" in kinds or _LOCALISER.search(text):
        return "localiser"
    if images and len(slices(images)) < MIN_SLICES and any(image.places for image in images):
        return f"only {len(slices(images))} slices: a localiser, or incomplete"
    is_uni = "UNI" in kinds or (_MP2RAGE.search(text) is not None and re.search(r"(?<![a-z])uni", text, re.IGNORECASE))
    if not is_uni and _MP2RAGE.search(text) and re.search(r"(?<![a-z])inv.?[12]", text, re.IGNORECASE):
        return "one of MP2RAGE's inversions, no T1"
    if ("DERIVED" in kinds or "SECONDARY" in kinds) and not is_uni:
        return f"derived (ImageType {'/'.join(map(str, facts['ImageType']))})"
    if kinds & {"P", "PHASE", "PHASE MAP"}:
        return "phase image"
    if _OTHER.search(text) and not re.search(r"mp.?rage", text, re.IGNORECASE):
        return "another contrast"
    sequence = " ".join(str(facts.get(key) or "") for key in ("SequenceName", "PulseSequenceName"))
    if not _T1.search(f"{text} {sequence}") and not _is_mprage(facts):
        return "not known as a T1 (MPRAGE, IR-SPGR and the like)"
    return None


def _is_mprage(facts: dict[str, Any]) -> bool:
    """Whether the physics are those of an inversion-prepared 3-D gradient echo."""
    try:
        inversion, echo = float(facts.get("InversionTime") or 0), float(facts.get("EchoTime") or 99)
    except ValueError:
        return False
    sequence = facts.get("ScanningSequence")
    return facts.get("MRAcquisitionType") == "3D" and "GR" in str(sequence) and 300 <= inversion <= 1500 and echo < 8


# --- who and when ----------------------------------------------------------------------------------------------------


def _first_part(folder: Path, root: Path) -> str:
    parts = folder.relative_to(root).parts
    return tidy(parts[0]) if parts else tidy(root.resolve().name)


def _patients(listing: Listing, source: str | None, series: list[_Series]) -> dict[str, str]:
    """The patient of each series; whatever is guessed is a problem that names both ways out.

    ``source`` is the option ``patients``.
    """
    tops = {one.uid: _first_part(one.folders[0], listing.root) for one in series}
    by_folder = {uid: _canonical(listing, top) for uid, top in tops.items()}
    if source == "folder":
        return by_folder
    who: dict[str, str] = {}
    guesses: dict[str, str] = {}
    for text, several in grouped(series, lambda one: one.text("PatientID")).items():
        patient = _canonical(listing, text)
        studies = {one.text("StudyInstanceUID"): tops[one.uid] for one in several}
        people, is_confirmed = _same_person(several)
        is_apart = len(set(studies.values())) > 1
        # Folders that are visits by their names do not say who.
        folders_say_who = any(split_visit(top)[0] and not date_in(top) for top in studies.values())
        if not text or (_NOBODY.fullmatch(text) and source is None):
            who |= {one.uid: by_folder[one.uid] for one in several}
            why = f"PatientID {text!r} says nothing" if text else "there is no PatientID"
        elif source == "id" or is_worldwide(patient) or not (people or (is_apart and not is_confirmed)):
            who |= {one.uid: patient for one in several}
            continue
        else:
            split = is_apart and folders_say_who
            who |= {one.uid: _canonical(listing, f"{tops[one.uid]}-{text}") if split else patient for one in several}
            places = ", ".join(sorted(set(studies.values()))[:4])
            why = (
                f"PatientID {text!r} has {people}" if people else f"PatientID {text!r} is in several folders ({places})"
            )
        guesses |= {one.uid: why for one in several}
    for several in grouped(series, lambda one: one.study).values():
        if len(others := sorted({who[one.uid] for one in several})) > 1:
            for one in several:
                guesses.setdefault(one.uid, f"one study (StudyInstanceUID) has the patients {' and '.join(others)}")
    noted = set()
    for one in series:
        patient = who[one.uid]
        if one.uid in guesses and (patient, guesses[one.uid]) not in noted:
            noted.add((patient, guesses[one.uid]))
            reason = f"{guesses[one.uid]}: taken for {patient!r}"
            remedy = "if folders are people, say --patients-from folder; if it is right, --patients-from id"
            listing.note("problem", patient, one.folders[0], reason, remedy, False, patient)
    return who


def _same_person(several: Iterable[_Series]) -> tuple[str, bool]:
    """What contradicts that series of one PatientID are of one person, and whether anything confirms it."""
    values: dict[str, set[str]] = {"sexes": set(), "birth dates": set(), "names": set()}
    for one in several:
        name = one.text("PatientName").strip("^ ").casefold()
        values["sexes"] |= {one.text("PatientSex").upper()[:1]} & {"F", "M"}
        values["birth dates"] |= {one.text("PatientBirthDate")} - {""}
        if name != one.text("PatientID").casefold() and not _NOBODY.fullmatch(name):
            values["names"].add(name)
    contradict = [f"{len(found)} {what}" for what, found in values.items() if len(found) > 1]
    return " and ".join(contradict), bool(values["birth dates"] or values["names"])


def _date(one: _Series, root: Path) -> str | None:
    """Day of the scan, by its header, else by its folders."""
    for name in ("AcquisitionDate", "AcquisitionDateTime", "SeriesDate", "StudyDate", "ContentDate"):
        if found := date_in(one.text(name)[:8]):
            return found
    return date_of_folders([tidy(part) for part in one.folders[0].relative_to(root).parts])


def _sessions(series: Sequence[_Series], who: dict[str, str], root: Path) -> dict[str, str]:
    """The session of each series: the day, or where that is not known, the study."""
    days = {one.uid: _date(one, root) for one in series}
    result = {uid: f"ses-{day.replace('-', '')}" for uid, day in days.items() if day}
    undated = [one for one in series if not days[one.uid]]
    for several in grouped(undated, lambda one: who[one.uid]).values():
        studies = sorted({one.study for one in several})
        for one in several:
            # Of several studies nobody knows which is the first; numbers would say so.
            letter = chr(ord("a") + studies.index(one.study))
            result[one.uid] = "ses-1" if len(studies) == 1 else f"ses-undated{letter}"
    return result


def _one_of_session(listing: Listing, patient: str, session: str, several: list[_Series]) -> None:
    """Take the best of a session's T1s; others are skipped, or problems where they are as good and of another kind."""
    several = sorted(several, key=lambda one: (one.rank, one.facts.get("SeriesNumber") or 0, one.uid))
    best = several[0]
    studies = {one.text("StudyInstanceUID") for one in several if one.rank == best.rank}
    for other in several[1:]:
        reason = f"series {other.description!r} skipped: of this session's T1s, {best.description!r} is used"
        reason += f" ({other.problem[0]})" if other.problem else ""
        is_tie = other.rank == best.rank and (other.description != best.description or len(studies) > 1)
        remedy = "which one is better is not known; remove the other" if is_tie else ""
        listing.note("problem" if is_tie else "skipped", patient, other.folders[0], reason, remedy, True, patient)
    if best.problem:
        names = " and ".join(listing.place(folder) for folder in best.folders[:3])
        listing.note("problem", patient, names, best.problem[0], best.problem[1], True, patient)
        return
    scan = _scan(listing, patient, session, best)
    if not best.is_3d:
        gap = f"{distance(best.images) or 0:.1f} mm"
        listing.note_scan("quirk", scan, f"no 3-D scan: {len(slices(best.images))} slices {gap} apart")
    if best.has_agent:
        listing.note_scan("quirk", scan, "with contrast agent, as it seems; there is no T1 without")
    listing.add(scan)


def _scan(listing: Listing, patient: str, session: str, series: _Series) -> Scan:
    """A series as a scan; what the table does not say of the person is taken from the header."""
    folder, date = series.folders[0], _date(series, listing.root)
    facts = listing.describe(patient, session, date)
    for fact, name, parse in (("sex", "PatientSex", parse_sex), ("age", "PatientAge", parse_age)):
        try:
            of_header = parse(series.text(name)) or None
        except ValueError as error:
            if facts[fact] is None:
                listing.note("quirk", patient, folder, f"{error} ({name}); left empty", patient_id=patient)
            continue
        known, facts[fact] = facts[fact], of_header if facts[fact] is None else facts[fact]
        if known is None or of_header is None:
            continue
        if known != of_header if fact == "sex" else abs(known - of_header) > _YEARS_APART:
            reason, remedy = (
                f"{fact} {known} by the table, {of_header} by the header ({name})",
                "find out whose scan it is",
            )
            listing.note("problem", patient, folder, reason, f"{remedy}; kept as the table says", False, patient)
    return Scan(
        subject_id=subject_of(patient),
        session=session,
        patient_id=patient,
        image=folder,
        source=listing.place(folder) + (f"#{series.uid.split()[0]}" if series.shared else ""),
        series=tuple(image.path for image in series.images),
        date=date,
        **facts,
    )


def subject_of(patient: str) -> str:
    """A patient's name in files: ``sub-`` and the letters and digits, as BIDS has it; whoever else is prepared.

    Numbers stay apart (``1.12`` is not ``11.2``). Other letters than A to Z leave a hash of the id.
    """
    if is_worldwide(patient):
        return "sub-" + re.sub(r"\W|_", "", f"{'ADNI' if cohort_of(patient) == 'adni' else ''}{patient}")
    plain = re.sub(r"(?<=\d)[\W_]+(?=\d)", "x", patient)
    name = re.sub(r"[^A-Za-z0-9]", "", plain)
    is_whole = name and name == re.sub(r"[\W_]", "", plain)
    return f"sub-{name}" if is_whole else f"sub-{name}x{hashlib.sha256(patient.encode()).hexdigest()[:8]}"


def _note_without_t1(
    listing: Listing, tree: Tree, series: list[_Series], with_t1: set[str], skipped: dict[str, list[str]]
) -> None:
    """Name everybody without a T1, and volumes that are no DICOM."""
    root = listing.root
    for patient, reasons in sorted(skipped.items()):
        if patient not in with_t1:
            some = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
            remedy = "if one is a T1, convert it with dcm2niix and use --layout folder"
            listing.note("problem", patient, "", f"has no T1 series ({some})", remedy, True, patient)
    tops = {_first_part(folder, root) for one in series for folder in one.folders}
    noted = {finding.file.split("/")[0] for finding in listing.findings if finding.left_out and finding.file}
    for folder in tree.folders:
        if folder.parent == root and (top := tidy(folder.name)) not in tops | noted:
            inside = [path for path in tree.files if folder in path.parents]
            if any(map(volume_suffix, inside)):  # named below
                continue
            reason = "has no DICOM file" + (f", only {tidy(inside[0].name)} and the like" if inside else " in it")
            listing.note("problem", top, top, reason, "unpack or fetch its files, or remove the folder")
    for volume in tree.volumes():
        top = _first_part(volume.path.parent, root)
        reason, remedy = "no DICOM file, so not read", "use --layout folder"
        if top in tops:
            listing.note("skipped", top, volume.path, reason, remedy, patient_id="")
        else:
            listing.note("problem", top, volume.path, reason, remedy)
