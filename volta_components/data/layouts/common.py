# SPDX-License-Identifier: Apache-2.0
"""What all layout readers share: the records they make, and the choice among several scans of one person."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from volta_components.data.columns import FACT_COLUMNS
from volta_components.data.identity import canonical_patient_id, cohort_of, grouped
from volta_components.data.names import parse_name
from volta_components.data.sessions import contradictions, in_order, months_since_baseline, spelled_alike, years_between
from volta_components.data.spreadsheets import Row, fold
from volta_components.data.tables import People, pick, read_fact, read_people
from volta_components.data.volumes import volume_stem, volume_suffix
from volta_components.data.walk import Tree, VolumeFile, is_hidden, tidy, tidy_stem, walk
from volta_components.files import readable

LEFT, RIGHT = 1, 2  # values of the hippocampi in label maps
Kind = Literal["problem", "quirk", "choice", "skipped"]
MAX_KEY_BYTES = 150
_PART = r"\.(part|partial|crdownload|download|filepart|aria2|tmp|zip|7z|bz2|xz|zst)"
_UNFINISHED = re.compile(rf"\.(nii|mgz|mgh|mnc)(\.gz)?({_PART}| ?\(\d+\)(\.gz)?|~)$", re.IGNORECASE)
_HEADER = re.compile(r"\.hdr(\.gz)?$", re.IGNORECASE)
_TABLE = re.compile(r"\.(tsv|csv|xlsx?)(\.txt)?$", re.IGNORECASE)
_ARCHIVE = re.compile(r"\.(zip|tar|tgz|tar\.\w+|7z|rar)$", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """Something about the data set that its user should know.

    Attributes:
        kind: ``problem``: broken, missing, ambiguous or not understood, counts in the exit status; ``quirk``: known of
            this data set, handled; ``choice``: left out because of an option that the user gave; ``skipped``: no T1
            scan, or not the one of its session that the layout's rules take. Nobody is lost by what is skipped.
        subject: the person it is about.
        file: which file, relative to the source, or empty.
        reason: what was found.
        remedy: what the user can do, or what was done.
        left_out: whether the scan is missing from the result because of it.
        patient_id: canonical; empty where it is about nobody in particular.
    """

    kind: Kind
    subject: str
    file: str
    reason: str
    remedy: str = ""
    left_out: bool = True
    patient_id: str = ""


@dataclass(frozen=True)
class LabelFile:
    """One label file of a scan; its foreground becomes ``value``, or keeps its own values (1 left, 2 right)."""

    path: Path
    value: int | None = None


@dataclass(frozen=True)
class Scan:
    """One scan to prepare.

    Attributes:
        subject_id, session: name the prepared files; together unique.
        patient_id: canonical (:func:`volta_components.data.identity.canonical_patient_id`).
        image: the volume file, or the first folder of DICOM files.
        source: ``image`` relative to the source, with forward slashes.
        labels: its label files.
        series: for DICOM, the files of the series; empty for a volume file.
        date: of the scan, ``YYYY-MM-DD``, where known.
        mask: its brain mask, to be applied; None for none.
        visit: which of the patient's prepared scans it is in the order of time, from 0; None where that is not known.
        site, sex, diagnosis, age: where known. Sex is ``F`` or ``M``; age in years.
    """

    subject_id: str
    session: str | None
    patient_id: str
    image: Path
    source: str
    labels: tuple[LabelFile, ...] = ()
    series: tuple[Path, ...] = ()
    date: str | None = None
    mask: Path | None = None
    visit: int | None = None
    site: str | None = None
    sex: str | None = None
    diagnosis: str | None = None
    age: float | None = None

    @property
    def key(self) -> str:
        """Stem of the prepared files; file systems hold no more than 255 bytes."""
        name = self.subject_id if self.session is None else f"{self.subject_id}_{self.session}"
        encoded = name.encode()
        if len(encoded) <= MAX_KEY_BYTES:
            return name
        short = encoded[: MAX_KEY_BYTES - 10].decode(errors="ignore")
        return f"{short}-{hashlib.sha256(encoded).hexdigest()[:8]}"


@dataclass
class Listing:
    """What a layout reader found.

    Attributes:
        cohort: name of the data set, lower case.
        scans: to prepare, unsorted.
        findings: about everything else.
        people: everybody with a scan, a folder or a row: canonical id, and the name in the data set.
        found: counts to print beside the paper's, such as ``{"rows": 619, "male": 342}``.
        swapped: subjects whose left and right label files are known to be swapped.
        root: of the data set; findings name files relative to it.
        table: of people; without rows where there is none.
        of_baseline: patients and sessions whose diagnosis is from a column of the baseline.
    """

    cohort: str
    scans: list[Scan] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    people: dict[str, str] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    swapped: frozenset[str] = frozenset()
    root: Path = Path()
    table: People = field(default_factory=People)
    of_baseline: set[tuple[str, str | None]] = field(default_factory=set)

    def meet(self, patient_id: str, subject: str | None = None) -> None:
        """Count somebody among the people found: at the end it must be said what became of everyone."""
        if patient_id:
            self.people.setdefault(patient_id, subject or patient_id)

    def note(
        self,
        kind: Kind,
        subject: str,
        file: Path | str,
        reason: str,
        remedy: str = "",
        left_out: bool | None = None,
        patient_id: str | None = None,
    ) -> None:
        """Add a finding; only quirks keep the scan unless told otherwise.

        A path is named relative to the root; text is taken as it is. The patient follows from the subject unless given;
        a subject in brackets, as ``(all)``, is nobody.
        """
        if patient_id is None:
            patient_id = "" if subject.startswith("(") else canonical_patient_id(subject)
        self.meet(patient_id, subject)
        lost = kind != "quirk" if left_out is None else left_out
        place = self.place(file) if isinstance(file, Path) else file
        finding = Finding(kind, subject, place, reason, remedy, lost, patient_id)
        if finding not in self.findings[-100:]:  # of a person with many scans, once
            self.findings.append(finding)

    def note_scan(
        self,
        kind: Kind,
        scan: Scan,
        reason: str,
        remedy: str = "",
        left_out: bool | None = None,
        file: Path | str | None = None,
    ) -> None:
        """Add a finding about a scan, or about another file of it."""
        self.note(kind, scan.subject_id, file or scan.source, reason, remedy, left_out, scan.patient_id)

    def place(self, path: Path) -> str:
        """A file of the data set, as it is named in findings and datalists."""
        return relative(path, self.root)

    def add(self, scan: Scan) -> None:
        """Add a scan, and its patient to the people found."""
        self.meet(scan.patient_id, scan.subject_id)
        self.scans.append(scan)

    # --- the table of people ------------------------------------------------------------------------------------------

    def read_people(self, path: Path | None, name: Callable[[str], str] = canonical_patient_id) -> None:
        """Read a table of people, if there is one, ids brought to one form by ``name``; note what is wrong with it.

        Without one, tables beside the scans are noted: one may be of the people, under another name.

        Raises:
            InputError: if the table cannot be read or has no column of ids.
        """
        if path is None:
            for other in sorted(self.root.iterdir()):
                if _TABLE.search(other.name) and not is_hidden(other.name):
                    remedy = "give it as --table if it is of the people"
                    self.note("quirk", "(all)", other, "a table that is not read", remedy)
            return

        def complain(who: str, what: str, remedy: str) -> None:
            self.note("problem", who, path.name, what, remedy, False, "")

        self.table = read_people(path, complain, name)
        columns = sorted({column for rows in self.table.rows.values() for row in rows for column in row})
        read = {fact for fact, names in FACT_COLUMNS.items() if {*map(fold, columns)} & {*map(fold, names)}}
        if not read and len(columns) > 1:
            reason = f"no {', no '.join(FACT_COLUMNS)} is read of its columns {', '.join(columns[:8])}"
            self.note("quirk", "(all)", path.name, reason, "name columns so if they have these")
            return
        for fact, names in FACT_COLUMNS.items():
            words = {name.casefold() for name in names}
            found = [column for column in columns if not words.isdisjoint(re.split(r"[\W_]+", column.casefold()))]
            if found and fact not in read:
                reason = f"{fact} is not read from {', '.join(found[:4])}"
                self.note("quirk", "(all)", path.name, reason, f"name the column {fact} if it is")

    def match_ids(self, patients: Iterable[str]) -> None:
        """Match ids that are spelled differently in scans and table; note each."""
        for patient, spelled in self.table.find(patients):
            self.note("quirk", patient, self.table.file, f"taken for {spelled!r} of the table", patient_id=patient)

    def describe(
        self, patient_id: str, session: str | None = None, date: str | None = None, more: Row | None = None
    ) -> dict[str, Any]:
        """Sex, age, diagnosis and site of a patient at a session; cells of the session's own table (``more``) win.

        What cannot be read is noted and left empty.
        """
        row, differ = self.table.row(patient_id, session, date)

        def complain(reason: str, remedy: str) -> None:
            who = self.people.get(patient_id, patient_id)
            self.note("problem", who, self.table.file, reason, remedy, False, patient_id)

        if self.table.rows and row is None:
            complain("has no row", "add one; kept with what else is known")
        own = {name for name in FACT_COLUMNS if more and pick(more, *FACT_COLUMNS[name])}
        if missing := [name for name in differ if name not in own]:
            where = f"session {session}" if session or date else "one row"
            reason = f"{' and '.join(missing)}: rows differ or are of other sessions, and none is surely this scan's"
            complain(reason, f"keep one row, or fill in one of its own ({where}); left empty")
        of_baseline = self.table.baseline_facts(patient_id) - own
        if "diagnosis" in of_baseline:
            self.of_baseline.add((patient_id, session))
        facts: dict[str, Any] = {}
        for name in FACT_COLUMNS:
            try:
                # Not cell by cell: the two tables may name one fact differently.
                facts[name] = read_fact(name, (more if name in own else row) or {})
            except ValueError as error:
                facts[name] = None
                form = {"sex": "M, F or n/a", "age": "years"}[name]
                complain(str(error), f"write {form} in the table; kept without {name}")
        if facts["age"] and "age" in of_baseline:
            facts["age"] = round(facts["age"] + (months_since_baseline(session or "") or 0) / 12, 2)
        if facts["sex"] and "sex" in own and row:
            with contextlib.suppress(ValueError):
                if (other := read_fact("sex", row) or facts["sex"]) != facts["sex"]:
                    complain(f"sex {other} here, {facts['sex']} in the session's own table", "correct one; left empty")
                    facts["sex"] = None
        if facts["site"] is None and cohort_of(patient_id) == "adni":
            facts["site"] = patient_id[:3]
        return facts

    def note_rows_without_scans(self, patients: Iterable[str], what: str) -> None:
        """Note everybody in the table who has nothing else; of ADNIMERGE, which has all of ADNI, how many these are."""
        absent = self.table.without(patients)
        if self.table.is_adnimerge:
            if absent:
                names = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
                reason, remedy = f"{len(absent)} people have rows but no {what}: {names}", "it has everybody of ADNI"
                self.note("quirk", "(all)", self.table.file, reason, remedy)
            return
        for patient in absent:
            who, remedy = self.table.spelled[patient], f"fetch the {what}, or drop the row"
            self.note("problem", who, self.table.file, f"has a row but no {what}", remedy, True, patient)

    # --- one scan of several ------------------------------------------------------------------------------------------

    def one_of_session(self, scans: Sequence[Scan], rank: Callable[[Scan], tuple[Any, ...]]) -> list[Scan]:
        """Keep one scan of each patient and session, the one of lowest rank.

        Others are skipped by name. Where the rank does not decide, the first by name is kept, and that is a problem.
        """
        kept = []
        for group in grouped(scans, lambda scan: (scan.patient_id, scan.session)).values():
            first, *others = sorted(group, key=lambda scan: (rank(scan), scan.image.name, scan.source))
            kept.append(first)
            if "ce" in parse_name(VolumeFile.of(first.image).stem).entities:
                self.note_scan("quirk", first, "with contrast agent, by its name; there is no T1 without")
            for other in others:
                is_beside = other.image.parent == first.image.parent
                used = f"{readable(first.image.name) if is_beside else first.source} is used"
                same = other.image.name.removesuffix(".gz") == first.image.name.removesuffix(".gz")
                if same and is_beside:
                    self.note_scan("quirk", other, f"same scan, compressed and not: {used}", left_out=True)
                elif rank(other) == rank(first):
                    reason = f"another T1w of this session: {used}, by name alone"
                    remedy = "which one is better is not known; remove the other"
                    if not is_beside:
                        remedy += ", or prepare each folder on its own if these are different people"
                    self.note_scan("problem", other, reason, remedy)
                else:
                    self.note_scan("quirk", other, f"another T1w of this session: {used}", left_out=True)
        return kept

    def _of_sessions(self, scans: Iterable[Scan], sessions: tuple[str, ...]) -> list[Scan]:
        """Keep each patient's wanted sessions; the others are noted as left out by choice.

        The first session is the one of the first date, else of the first name (``M6`` before ``M12``, ``pre`` before
        all), else of the lowest age. Where none of these decides, what is not used is a problem.
        """
        kept: list[Scan] = []
        is_named = sessions not in (("all",), ("baseline",))
        wanted = {*sessions, *map(spelled_alike, sessions)} if is_named else set()
        remedy = "--sessions all takes every one"
        asked = f"is not asked for (--sessions {','.join(sessions)})"
        met = set()
        when = [attrgetter(name) for name in ("session", "date", "age")]
        for group in grouped(scans, lambda scan: scan.patient_id).values():
            ordered, tied = in_order(group, *when)
            if wrong := contradictions(group, *when):
                reason = f"the names of its sessions and their {' and '.join(wrong)} say different orders"
                self.note_scan("problem", ordered[0], reason, "correct the table, or rename the sessions", False)
            unsure = next((part for part in tied if ordered[0] in part), [])
            taken = []
            for scan in ordered:
                names = {scan.session, spelled_alike(scan.session or "")}
                met |= names
                if sessions == ("all",) or (sessions == ("baseline",) and scan is ordered[0]) or names & wanted:
                    taken.append(scan)
                elif sessions == ("baseline",) and scan in unsure:
                    names_of = [other.session or other.source for other in unsure]
                    reason = f"which of {' and '.join(names_of)} is the first is not known; {names_of[0]} is used"
                    how = "give their dates (acq_time in the sessions' table), number them, or name one with --sessions"
                    if any(re.fullmatch(r"(ses-)?\d{8}", name) for name in names_of):
                        how = f"write dates as YYYYMMDD; or {how}"
                    self.note_scan("problem", scan, reason, how)
                else:
                    self.note_scan("choice", scan, f"session {scan.session} {asked}", remedy)
            if not unsure:
                taken = [self._at_later_session(ordered[0], scan) for scan in taken]
            if len(taken) > 1 and not tied:
                taken = [replace(scan, visit=visit) for visit, scan in enumerate(taken)]
            kept += taken
        if is_named:
            for name in sessions:
                if spelled_alike(name) not in met and name not in met:
                    self.note("problem", "(all)", "", f"nobody has a session {name}", "name one that there is", False)
        return kept

    def _at_later_session(self, first: Scan, scan: Scan) -> Scan:
        """A scan without what is of the first session only; years are added to an age that stands for both."""
        is_later = scan is not first or (months_since_baseline(scan.session or "") or 0) > 0
        if is_later and scan.diagnosis and (scan.patient_id, scan.session) in self.of_baseline:
            reason = f"diagnosis {scan.diagnosis} is the baseline's, not surely that of session {scan.session}"
            self.note_scan("problem", scan, reason, "add a row of this session; left empty", False, self.table.file)
            scan = replace(scan, diagnosis=None)
        if scan.age is None or scan.age != first.age:
            return scan
        if first.date and scan.date:
            years = years_between(first.date, scan.date)
        else:
            start, end = (months_since_baseline(one.session or "") for one in (first, scan))
            years = 0.0 if start is None or end is None else (end - start) / 12
        if years <= 1.1:  # ages may be rounded
            return scan
        reason = f"session {scan.session} is {years:.1f} years after {first.session}, and its age is the same"
        self.note_scan("quirk", scan, reason, "the years are added", file=self.table.file or None)
        return replace(scan, age=round(scan.age + years, 2))

    def _without_doubles(self, scans: Iterable[Scan]) -> list[Scan]:
        """Keep the first of scans that share subject and session; the others are problems."""
        kept: dict[str, Scan] = {}
        for scan in sorted(scans, key=lambda scan: (scan.key, scan.source)):
            if scan.key in kept:
                other = kept[scan.key].source
                reason = f"double subject: {other} has the same id and session"
                self.note_scan("problem", scan, reason, "remove or rename one")
            else:
                kept[scan.key] = scan
        return list(kept.values())

    def choose(self, sessions: tuple[str, ...]) -> Listing:
        """The end of every reader: each id and session once, and of each patient the sessions that are asked for."""
        self.scans = self._of_sessions(self._without_doubles(self.scans), sessions)
        return self


@dataclass(frozen=True)
class LayoutOptions:
    """What a reader is told.

    Attributes:
        source: root of the data set.
        sessions: ``baseline`` (the first with a scan), ``all``, or names.
        labels: ``auto`` (take those there are), ``require`` or ``none``.
        table: a table of subjects to read instead of the layout's own, or None.
        name: the cohort's name, where the user gave one; tells whose numbers bare ids are (``aibl``).
        patients: for DICOM, what says who a scan is of: ``id``, ``folder``, or None for the id where it can be trusted.
        work: a folder to keep what was learnt of DICOM folders.
        workers: threads for reading DICOM headers.
        follow_links: also follow links that leave the source.
    """

    source: Path
    sessions: tuple[str, ...] = ("baseline",)
    labels: Literal["auto", "require", "none"] = "auto"
    table: Path | None = None
    name: str | None = None
    patients: Literal["id", "folder"] | None = None
    work: Path | None = None
    workers: int = 1
    follow_links: bool = False


def relative(path: Path, root: Path) -> str:
    """``path`` relative to ``root`` with forward slashes, readable, as it goes into tables and datalists."""
    return readable(Path(os.path.relpath(path, root)).as_posix())


def slug(text: str) -> str:
    """Lower case, with everything but letters and digits as single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "dataset"


def participants(root: Path) -> Path | None:
    """``participants.tsv`` in a folder, else the same as CSV or Excel sheet, in any case; None for none."""
    found = {path.name.casefold(): path for path in sorted(root.iterdir())}
    names = (f"participants.{kind}" for kind in ("tsv", "csv", "xlsx", "xls"))
    return next((found[name] for name in names if name in found), None)


def look(listing: Listing, root: Path, follow_links: bool = False) -> Tree:
    """Walk over the source, the listing's root; say which links are left out, and what cannot be looked into.

    Nobody is lost by what lies beside the subjects of a BIDS data set, where there are no scans: heudiconv keeps the
    DICOM files of each as an archive in ``sourcedata``.

    Raises:
        InputError: if the folder is missing, is none, or cannot be listed.
    """
    tree = walk(root, follow_links)
    listing.root = root
    aside = tree.aside()

    def may_be_scan(path: Path) -> bool:
        return path.relative_to(root).parts[0] not in aside

    for link in tree.outside:
        reason = "a link that leaves the source"
        if may_be_scan(link) and (volume_suffix(link) or link.is_dir() or not link.suffix):
            remedy = "follow such links with --follow-links, or copy the files"
            listing.note("problem", tidy_stem(link), link, reason, remedy)
        else:
            listing.note("quirk", "(links)", link, reason, "--follow-links follows it")
    for link, other in tree.again:
        reason = f"a link to {relative(other, root)}"
        if link.is_dir() or tidy(link.name) == tidy(other.name):
            listing.note("quirk", "(links)", link, f"{reason}, which is taken once")
        elif volume_suffix(link) and may_be_scan(link):
            remedy = "remove the link, or put the scan itself there"
            listing.note("problem", tidy_stem(link), link, f"{reason}, which has another name", remedy)
    for folder in tree.locked:
        top, reason, remedy = relative(folder, root).split("/")[0], "permission denied", "make it readable (chmod u+rx)"
        if may_be_scan(folder):
            listing.note("problem", top, folder, reason, remedy)
        else:
            listing.note("quirk", "(folders)", folder, reason, remedy)
    stems = {path.with_name(volume_stem(path)) for path in tree.files if volume_suffix(path)}
    for path in filter(may_be_scan, tree.files):
        who = tidy_stem(path)
        if path.is_symlink() and not path.exists() and not path.suffix:
            listing.note("problem", who, path, "a link to nothing", "mend the link, or remove it")
        elif _UNFINISHED.search(path.name):
            remedy = "finish or unpack it, or remove it"
            listing.note("problem", who.split(".")[0], path, "no volume by its name: a part, or packed", remedy)
        elif (half := _HEADER.sub("", path.name)) != path.name and path.with_name(half) not in stems:
            reason, remedy = "half of a pair: its voxels are missing", f"add {half}.img, or remove it"
            listing.note("problem", parse_name(tidy(half)).subject, path, reason, remedy)
        elif _ARCHIVE.search(path.name):
            what, stem = "an archive, not looked into", _ARCHIVE.sub("", path.name)
            if any(folder.parent == path.parent and folder.name.startswith(stem) for folder in tree.folders):
                listing.note("quirk", "(archives)", path, what, f"beside {stem}, which it was unpacked to, it seems")
            else:
                listing.note("problem", tidy(stem), path, what, "unpack it if it holds scans; if not, move it away")
    for folder in filter(may_be_scan, filter(volume_suffix, tree.folders)):
        inside = [path for path in tree.files if path.parent == folder and volume_suffix(path)]
        if len(inside) != 1:
            reason = f"a folder with the name of a file, which holds {len(inside)} volumes"
            listing.note("problem", tidy_stem(folder), folder, reason, "put the one volume in its place")
    return tree
