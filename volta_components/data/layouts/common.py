# SPDX-License-Identifier: Apache-2.0
"""What all layout readers share: the records they make, and the reading of tables, sexes and ages."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from volta_components.data.identity import canonical_patient_id, cohort_of
from volta_components.data.volumes import volumes_below
from volta_components.errors import InputError

LEFT, RIGHT = 1, 2  # values of the hippocampi in label maps
Kind = Literal["problem", "quirk", "choice"]
MISSING = {"", "n/a", "na", "nan", "none", "null", "unknown", "-4", "-1", "."}
# Names of one thing in the public tables, brought to Clinica's.
DIAGNOSES = {"HC": "CN", "NL": "CN", "NC": "CN", "NORMAL": "CN", "CONTROL": "CN", "DEMENTIA": "AD", "DAT": "AD"}
_SEXES = {"m": "M", "male": "M", "man": "M", "f": "F", "female": "F", "woman": "F"}


@dataclass(frozen=True)
class Finding:
    """Something about the data set that its user should know.

    Attributes:
        kind: ``problem``: broken or missing, counts in the exit status; ``quirk``: known of this data set, handled;
            ``choice``: left out because of an option or by the layout's own rules.
        subject: whom it is about.
        file: which file, relative to the source, or empty.
        reason: what was found.
        remedy: what the user can do, or what was done.
        left_out: whether the scan is missing from the result because of it.
    """

    kind: Kind
    subject: str
    file: str
    reason: str
    remedy: str = ""
    left_out: bool = True


@dataclass(frozen=True)
class LabelFile:
    """One label file of a scan.

    Attributes:
        path: the file.
        value: what its foreground becomes in the merged map; None keeps the file's own values (0, 1 left, 2 right).
    """

    path: Path
    value: int | None = None


@dataclass(frozen=True)
class Scan:
    """One scan to prepare.

    Attributes:
        subject_id, session: name the prepared files; together unique.
        patient_id: canonical (:func:`volta_components.data.identity.canonical_patient_id`).
        image: the volume file, or a folder of DICOM files.
        source: ``image`` relative to the source, with forward slashes.
        labels: its label files.
        series: for DICOM, the UID of the one series in the folder; None for a volume file.
        site, sex, diagnosis, age: where known. Sex is ``F`` or ``M``; age in years.
    """

    subject_id: str
    session: str | None
    patient_id: str
    image: Path
    source: str
    labels: tuple[LabelFile, ...] = ()
    series: str | None = None
    site: str | None = None
    sex: str | None = None
    diagnosis: str | None = None
    age: float | None = None

    @property
    def key(self) -> str:
        """Stem of the prepared files."""
        return self.subject_id if self.session is None else f"{self.subject_id}_{self.session}"


@dataclass
class Listing:
    """What a layout reader found.

    Attributes:
        cohort: name of the data set, lower case.
        scans: to prepare, unsorted.
        findings: about everything else.
        found: counts to print beside the paper's, such as ``{"rows": 619, "male": 342}``.
        swapped: subjects whose left and right label files are known to be swapped.
    """

    cohort: str
    scans: list[Scan] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    swapped: frozenset[str] = frozenset()

    def note(
        self, kind: Kind, subject: str, file: str, reason: str, remedy: str = "", left_out: bool | None = None
    ) -> None:
        """Add a finding; only quirks keep the scan unless told otherwise."""
        self.findings.append(
            Finding(kind, subject, file, reason, remedy, kind != "quirk" if left_out is None else left_out)
        )


@dataclass(frozen=True)
class LayoutOptions:
    """What a reader is told.

    Attributes:
        source: root of the data set.
        sessions: ``baseline`` (the first with a scan), ``all``, or names.
        labels: ``auto`` (take those there are), ``require`` or ``none``.
        table: a table of subjects to read instead of the layout's own, or None.
        name: the cohort's name, where the user gave one; tells whose numbers bare ids are (``aibl``).
        work: a folder to keep what was learnt of DICOM folders.
        temporary: a folder of this run's own, on the file system of ``work``, for files that are not whole yet.
        workers: threads for reading DICOM headers.
    """

    source: Path
    sessions: tuple[str, ...] = ("baseline",)
    labels: Literal["auto", "require", "none"] = "auto"
    table: Path | None = None
    name: str | None = None
    work: Path | None = None
    temporary: Path | None = None
    workers: int = 1


def relative(path: Path, root: Path) -> str:
    """``path`` relative to ``root`` with forward slashes, as it goes into tables and datalists."""
    return Path(os.path.relpath(path, root)).as_posix()


def slug(text: str) -> str:
    """Lower case, with everything but letters and digits as single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "dataset"


def read_delimited(path: Path) -> list[dict[str, str]]:
    """Rows of a TSV or CSV table (tab, comma or semicolon, told from its first line), cells stripped.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_bytes().decode("latin-1")
    except PermissionError as error:
        raise InputError(f"{path}: permission denied; make it readable (chmod u+r)") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    first = text.split("\n", 1)[0]
    delimiter = max("\t,;", key=first.count)
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    return [
        {str(k).strip(): (v or "").strip() for k, v in row.items() if k is not None and not isinstance(v, list)}
        for row in rows
    ]


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV, TSV or Excel table, as text; whole numbers that Excel holds as floats lose their ``.0``.

    Raises:
        InputError: if it cannot be read.
    """
    if path.suffix.lower() not in {".xls", ".xlsx"}:
        return read_delimited(path)
    import pandas as pd

    try:
        frame = pd.read_excel(path, dtype=object)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except PermissionError as error:
        raise InputError(f"{path}: permission denied; make it readable (chmod u+r)") from error
    except Exception as error:  # xlrd and openpyxl raise anything at a damaged workbook
        raise InputError(f"{path}: not a readable Excel sheet ({error}); download it again") from error

    def text(cell: Any) -> str:
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return ""
        if isinstance(cell, float) and cell.is_integer():
            return str(int(cell))
        return str(cell).strip()

    return [
        {str(k).strip(): text(v) for k, v in zip(frame.columns, row, strict=True)}
        for row in frame.itertuples(index=False)
    ]


def pick(row: Mapping[str, str], *names: str) -> str | None:
    """The first of the named columns (case does not matter) whose cell is not missing."""
    lower = {key.lower(): value for key, value in row.items()}
    for name in names:
        value = lower.get(name.lower(), "")
        if value.strip().lower() not in MISSING:
            return value.strip()
    return None


def parse_sex(text: str | None, codes: Mapping[str, str] | None = None) -> str | None:
    """``F``, ``M`` or None where it is missing.

    Args:
        text: the cell.
        codes: further codes of the table, such as ``{"1": "M", "2": "F"}``.

    Raises:
        ValueError: if the code is unknown.
    """
    if text is None or text.strip().lower() in MISSING:
        return None
    key = text.strip().lower()
    sex = (codes or {}).get(key) or _SEXES.get(key)
    if sex is None:
        raise ValueError(f"unknown sex code {text!r}")
    return sex


def parse_age(text: str | None) -> float | None:
    """Years, or None where it is missing; HIPAA's ``90+`` is 90.

    Raises:
        ValueError: if it is no number of years.
    """
    if text is None or text.strip().lower() in MISSING:
        return None
    try:
        age = float(text.strip().rstrip("+").replace(",", "."))
    except ValueError:
        raise ValueError(f"age {text!r} is not a number") from None
    if not 0 <= age <= 130:
        raise ValueError(f"age {text!r} is out of range (0 to 130 years)")
    return round(age, 4)


def parse_diagnosis(text: str | None) -> str | None:
    """Upper case, brought to Clinica's names (CN, SMC, EMCI, LMCI, MCI, AD); None where it is missing."""
    if text is None or text.strip().lower() in MISSING:
        return None
    key = text.strip().upper()
    return DIAGNOSES.get(key, key)


def describe(listing: Listing, subject: str, file: str, row: Mapping[str, str], **columns: tuple[str, ...]) -> dict:
    """Sex, age, diagnosis and site out of a table's row; what cannot be read is noted and left empty.

    Args:
        listing: takes the notes.
        subject: whom the row is about.
        file: the table, for the notes.
        row: cells by column name.
        columns: names of the columns for ``sex``, ``age``, ``diagnosis``, ``site``.
    """
    result: dict[str, Any] = {"site": pick(row, *columns.get("site", ())) if columns.get("site") else None}
    result["diagnosis"] = parse_diagnosis(pick(row, *columns.get("diagnosis", ("diagnosis",))))
    for name, parse in (("sex", parse_sex), ("age", parse_age)):
        try:
            result[name] = parse(pick(row, *columns.get(name, (name,))))
        except ValueError as error:
            result[name] = None
            listing.note("problem", subject, file, str(error), f"correct the table; kept without {name}", False)
    return result


def select_sessions(listing: Listing, scans: Iterable[Scan], sessions: tuple[str, ...]) -> list[Scan]:
    """Keep each patient's wanted sessions; the others are noted as left out by choice."""
    if sessions == ("all",):
        return list(scans)
    kept: list[Scan] = []
    patients: dict[str, list[Scan]] = {}
    for scan in scans:
        patients.setdefault(scan.patient_id, []).append(scan)
    for group in patients.values():
        group.sort(key=lambda scan: (scan.session or "", scan.subject_id, scan.source))
        for scan in group:
            wanted = scan is group[0] if sessions == ("baseline",) else (scan.session or "") in sessions
            if wanted:
                kept.append(scan)
            else:
                listing.note(
                    "choice",
                    scan.subject_id,
                    scan.source,
                    f"session {scan.session} is not asked for (--sessions {','.join(sessions)})",
                    "--sessions all takes every one",
                )
    return kept


def drop_doubles(listing: Listing, scans: Iterable[Scan]) -> list[Scan]:
    """Keep the first of scans that share subject and session; the others are problems."""
    kept: dict[str, Scan] = {}
    for scan in sorted(scans, key=lambda scan: (scan.key, scan.source)):
        if scan.key in kept:
            listing.note(
                "problem",
                scan.subject_id,
                scan.source,
                f"double subject: {kept[scan.key].source} has the same id and session",
                "remove or rename one",
            )
        else:
            kept[scan.key] = scan
    return list(kept.values())


def find_volumes(root: Path) -> list[Path]:
    """All volume files under a folder, sorted; hidden ones and those of hidden folders are left alone.

    Raises:
        InputError: if the folder is missing or cannot be listed.
    """
    check_folder(root)
    return volumes_below(root)


def check_folder(root: Path) -> None:
    """Raise InputError unless ``root`` is a folder that can be listed."""
    if not root.exists():
        raise InputError(f"{root}: no such folder; give the data set's root as --source")
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; give the data set's root as --source")
    if not os.access(root, os.R_OK | os.X_OK):
        raise InputError(f"{root}: permission denied; make it readable (chmod u+rx)")


# Columns of the tables that come with the data sets (ADNIMERGE, the image archive's search results, BIDS and others).
ID_COLUMNS = (
    "participant_id",
    "subject_id",
    "PTID",
    "Subject",
    "Subject ID",
    "patient_id",
    "ID",
    "name",
    "file",
    "RID",
)
SEX_COLUMNS = ("sex", "PTGENDER", "gender")
AGE_COLUMNS = ("age", "age_bl", "age_at_scan", "Age at scan")
DIAGNOSIS_COLUMNS = ("diagnosis", "DX_bl", "DX", "diagnosis_sc", "Research Group", "group", "label")
SITE_COLUMNS = ("site", "site_id", "acquisition_site", "institution", "scanner")


def read_people(listing: Listing, path: Path, prefix: str = "") -> dict[str, dict[str, str]]:
    """Rows of a table of people by canonical patient id; of several rows (visits) the first with a value counts.

    Args:
        listing: takes notes of rows that contradict each other.
        path: CSV, TSV or Excel.
        prefix: put before ids that are bare numbers, such as ``AIBL``.

    Raises:
        InputError: if the table cannot be read or has no column of ids.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; give the table of subjects as --table")
    rows = read_table(path)
    if rows and not any(pick(row, *ID_COLUMNS) for row in rows):
        raise InputError(
            f"{path}: no column of subject ids among {', '.join(rows[0])}; name one of them {ID_COLUMNS[0]}"
        )
    people: dict[str, dict[str, str]] = {}
    for row in rows:
        text = pick(row, *ID_COLUMNS)
        if text is None:
            continue
        person = canonical_patient_id(f"{prefix}{text}" if text.isdigit() else text)
        known = people.setdefault(person, {})
        for key, value in row.items():
            if value.strip().lower() in MISSING:
                continue
            if known.setdefault(key, value) != value and key.lower() in {name.lower() for name in SEX_COLUMNS}:
                listing.note(
                    "problem",
                    person,
                    path.name,
                    f"rows differ in {key}: {known[key]!r}, {value!r}",
                    "the first is used",
                    False,
                )
    return people


def describe_person(listing: Listing, patient_id: str, file: str, row: Mapping[str, str] | None) -> dict[str, Any]:
    """Sex, age, diagnosis and site out of a row of :func:`read_people`; an ADNI patient's site is in the id."""
    facts = describe(
        listing,
        patient_id,
        file,
        row or {},
        sex=SEX_COLUMNS,
        age=AGE_COLUMNS,
        diagnosis=DIAGNOSIS_COLUMNS,
        site=SITE_COLUMNS,
    )
    if facts["site"] is None and cohort_of(patient_id) == "adni":
        facts["site"] = patient_id[:3]
    return facts
