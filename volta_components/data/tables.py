# SPDX-License-Identifier: Apache-2.0
"""Tables of people as spreadsheets and archives write them, in any spelling."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from volta_components.data.columns import (
    AGE_COLUMNS,
    DATE_COLUMNS,
    DIAGNOSIS_COLUMNS,
    FACT_COLUMNS,
    ID_COLUMNS,
    SCAN_AGE,
    SESSION_COLUMNS,
    SEX_COLUMNS,
)
from volta_components.data.identity import canonical_patient_id, grouped, loose
from volta_components.data.names import DAY_MONTH_YEAR, date_in, date_of_cell, parse_name
from volta_components.data.sessions import in_order, months_since_baseline, spelled_alike, years_between
from volta_components.data.spreadsheets import Complain, Row, fold, read_table
from volta_components.data.volumes import volume_stem, volume_suffix
from volta_components.errors import InputError

MISSING = {"", "-", "--", ".", "?", "-1", "-4", "n/a", "n.a.", "na", "#n/a", "nan", "nat"}
MISSING |= {"none", "null", "unknown", "missing"}
# Names of one thing in the public tables, brought to Clinica's.
_HEALTHY = "HC NL NC NORMAL CONTROL CONTROLS HEALTHY CTRL CTL"
_DEMENTED = ("DEMENTIA", "DAT", "ALZHEIMER", "ALZHEIMERS", "ALZHEIMER'S DISEASE", "ALZHEIMER DISEASE")
DIAGNOSES = {**dict.fromkeys(_HEALTHY.split(), "CN"), **dict.fromkeys(_DEMENTED, "AD")}
_DIAGNOSES = """
CN SMC SCD EMCI LMCI MCI SMCI PMCI AD FTD BVFTD PPA DLB LBD PD PDD PSP CBS VAD VCI MSA ALS HD MS OTHER PATIENT
DEPRESSION SCZ BD ADHD ASD EPILEPSY STROKE TBI GLIOMA
"""
# Those that are surely not meant by the name of another.
KNOWN_DIAGNOSES = frozenset(_DIAGNOSES.split())
_SEXES = {"m": "M", "male": "M", "man": "M", "f": "F", "female": "F", "woman": "F"}

# A row is of a scan's visit if its date is at most this far from the scan's; visits are half a year apart in ADNI.
NEAR_DAYS = 90
_OF_BASELINE = {"diagnosis": ("DX_bl", "diagnosis_sc"), "age": ("age_bl",)}

# --- cells -----------------------------------------------------------------------------------------------------------


def is_missing(text: str | None) -> bool:
    """Whether a cell has no value."""
    return text is None or text.strip().lower() in MISSING


def pick(row: Mapping[str, str], *names: str) -> str | None:
    """The first of the named columns (see ``fold``) whose cell is not missing."""
    folded: Row = {}
    for key, cell in row.items():
        folded.setdefault(fold(key), cell)
    for name in names:
        value = folded.get(fold(name), "")
        if not is_missing(value):
            return value.strip()
    return None


def parse_sex(text: str | None, codes: Mapping[str, str] | None = None) -> str | None:
    """``F``, ``M`` or None where it is missing; a table may have codes of its own, such as ``{"1": "M", "2": "F"}``.

    Raises:
        ValueError: if the code is unknown.
    """
    if text is None or is_missing(text):
        return None
    key = text.strip().lower()
    sex = (codes or {}).get(key) or _SEXES.get(key)
    if sex is None:
        raise ValueError(f"unknown sex code {text!r}")
    return sex


def parse_age(text: str | None) -> float | None:
    """Years, or None where it is missing; HIPAA's ``90+`` is 90, ``>89`` 89, DICOM's ``018M`` one and a half.

    Raises:
        ValueError: if it is no number of years.
    """
    if text is None or is_missing(text):
        return None
    match = re.fullmatch(
        r"[>≥]?\s*(-?\d+(?:[.,]\d+)?|[.,]\d+)\s*(y|m|w|d|years?|yrs?)?\+?", text.strip(), re.IGNORECASE
    )
    if match is None:
        raise ValueError(f"age {text!r} is not a number")
    years = float(match[1].replace(",", ".")) / {"m": 12, "w": 365.25 / 7, "d": 365.25}.get((match[2] or "").lower(), 1)
    if not 0 <= years <= 130:
        raise ValueError(f"age {text!r} is out of range (0 to 130 years)")
    return round(years, 4)


def parse_diagnosis(text: str | None) -> str | None:
    """Upper case, brought to Clinica's names (CN, SMC, EMCI, LMCI, MCI, AD); None where it is missing.

    Of a change (``MCI to Dementia``, in older tables of ADNI), what it led to is taken.
    """
    if text is None or is_missing(text):
        return None
    key = text.strip().upper().replace("’", "'").split(" TO ")[-1]
    return DIAGNOSES.get(key, key)


# --- people ----------------------------------------------------------------------------------------------------------

_PARSERS: dict[str, Callable[[str], Any]] = {"sex": parse_sex, "age": parse_age, "diagnosis": parse_diagnosis}


def read_fact(name: str, row: Row) -> Any:
    """Sex, age, diagnosis or site by a row; None where it is missing.

    Raises:
        ValueError: if it cannot be read.
    """
    text = pick(row, *FACT_COLUMNS[name])
    return _PARSERS.get(name, str)(text) if text else None


@dataclass
class People:
    """A table of people, a row or several for each.

    Attributes:
        file: the table's name, for messages.
        rows: of each canonical patient id.
        spelled: how the table writes each of them.
        others: of a canonical patient id, those in further columns of ids, with the name of the column.
        also: ids of scans that are spelled in another way than in the table, and how they are spelled there.
        of_baseline: of those with one row, of no visit by name, the facts that it has of the baseline only.
    """

    file: str = ""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    others: dict[str, dict[str, str]] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    of_baseline: dict[str, set[str]] = field(default_factory=dict)

    def find(self, patients: Iterable[str]) -> list[tuple[str, str]]:
        """Match ids that are spelled in another way: ``sub-1``, ``SUB_01`` and ``1`` are ``sub-01`` if nobody else is.

        Returns:
            Id of the scan and id of the table, for each that was matched in this way.

        Raises:
            InputError: if two columns of ids match different scans.
        """
        known = set(patients)
        scanned = set(map(loose, known))
        for patient, others in self.others.items():
            either = {loose(other): f"{column} {other!r}" for other, column in others.items()}
            both = sorted(set(either) & scanned)
            if loose(patient) in both and len(both) > 1:
                names = " and ".join(either[one] for one in both)
                raise InputError(
                    f"{self.file}: somebody has the ids of two scans ({names}); remove the column that does not say "
                    "whose the scans are"
                )
        scans, table = (grouped(ids, loose) for ids in (known - set(self.rows), set(self.rows) - known))
        # Those that are in both belong to nobody else.
        taken = {loose(patient) for patient in known & set(self.rows)}
        for key, ids in scans.items():
            if len(ids) == len(table.get(key, [])) == 1 and key not in taken:
                self.also[ids[0]] = table[key][0]
        return sorted(self.also.items())

    def knows(self, name: str) -> bool:
        """Whether a name is in the table, in any spelling."""
        return bool(self.rows) and loose(name) in self._loose

    @property
    def is_adnimerge(self) -> bool:
        """Whether it is ADNI's own table, by its columns."""
        columns = {fold(column) for rows in itertools.islice(self.rows.values(), 1) for column in rows[0]}
        return {"ptid", "rid", "viscode", "colprot"} <= columns

    @functools.cached_property
    def _loose(self) -> set[str]:
        return {loose(patient) for patient in self.rows}

    def baseline_facts(self, patient: str) -> set[str]:
        """Which of diagnosis and age are known of the baseline only; of a patient in any spelling."""
        return self.of_baseline.get(self.also.get(patient, patient), set())

    def without(self, patients: Iterable[str]) -> list[str]:
        """Ids of the table without a scan."""
        return sorted(set(self.rows) - {self.also.get(patient, patient) for patient in patients})

    def row(self, patient: str, session: str | None = None, date: str | None = None) -> tuple[Row | None, list[str]]:
        """What the table says of a patient at a session.

        Of several rows the session's own counts (:func:`session_row`); without a session the first one. Where that
        cannot be told, and for the sex, only what all rows agree on is taken. Age and diagnosis are not taken from rows
        of other sessions.

        Returns:
            Cells by column, or None if there is no row; and what is unknown because the rows differ in it, or are of
            other sessions.
        """
        rows = self.rows.get(self.also.get(patient, patient))
        if rows is None:
            return None, []
        merged: Row = {}
        for row in rows:
            for column, cell in row.items():
                if is_missing(merged.get(column)):
                    merged[column] = cell
        differ = [name for name in FACT_COLUMNS if len({_plain(name, row) for row in rows} - {None}) > 1]
        own, elsewhere = session_row(rows, session, date), []
        if session is not None and all(pick(row, *SESSION_COLUMNS) for row in rows):
            # What only rows of other visits have: age and diagnosis may have been others then.
            others = {name for name in ("age", "diagnosis") if not pick(own or {}, *FACT_COLUMNS[name])} - {*differ}
            elsewhere = sorted(name for name in others if pick(merged, *FACT_COLUMNS[name]))
        differ += elsewhere
        if not differ:
            return merged, []
        if session is None and date is None:
            ordered, tied = in_order(rows, lambda row: pick(row, *SESSION_COLUMNS), _date_of)
            own = None if any(ordered[0] in group for group in tied) else ordered[0]
        unknown = {fold(column) for name in differ for column in FACT_COLUMNS[name]}
        merged = {column: "" if fold(column) in unknown else cell for column, cell in merged.items()}
        if own is None:
            return merged, differ
        sexes = set(map(fold, SEX_COLUMNS)) if "sex" in differ else set()
        own = {column: cell for column, cell in own.items() if not is_missing(cell) and fold(column) not in sexes}
        return merged | own, [name for name in differ if name in ("sex", *elsewhere)]


def _plain(name: str, row: Row) -> object:
    """A fact of a row in the one form in which it can be compared."""
    try:
        return read_fact(name, row) or None
    except ValueError:
        return pick(row, *FACT_COLUMNS[name])


def _date_of(row: Row) -> str | None:
    return date_of_cell(pick(row, *DATE_COLUMNS) or "")


def session_row(rows: Iterable[Row], session: str | None, date: str | None = None) -> Row | None:
    """The row of a session; None if there is none, or several.

    It is told by the session's name in any spelling, or by the date. For sessions without a name, the nearest date
    counts, up to ``NEAR_DAYS`` away.
    """
    rows = list(rows)
    if session is not None:
        named = [(row, name) for row in rows if (name := pick(row, *SESSION_COLUMNS))]
        exact = [row for row, name in named if name in (session, session.removeprefix("ses-"))]
        alike = [row for row, name in named if spelled_alike(name) == spelled_alike(session)]
        if found := exact or alike:
            return found[0] if len(found) == 1 else None
    dated = date_in(session or "")
    near = NEAR_DAYS if session is None or dated else 0
    day = date or dated
    apart = [(round(abs(years_between(day, own)) * 365.25), row) for row in rows if day and (own := _date_of(row))]
    nearest = min((days for days, _ in apart), default=None)
    same = [row for days, row in apart if days == nearest and days <= near]
    return same[0] if len(same) == 1 else None


def _of_own_visits(rows: list[Row]) -> list[Row]:
    """One person's rows with the diagnosis and the age of their own visits.

    ADNIMERGE repeats those of the baseline in every row, as ``DX_bl`` and ``AGE``. At later visits the diagnosis is
    ``DX``, and the years since the baseline are added to the age.
    """
    columns = {fold(column) for column in rows[0]}
    if columns.isdisjoint(map(fold, ("DX_bl", "age_bl", "EXAMDATE_bl", "Years_bl"))):
        return rows
    start = date_of_cell(pick(rows[0], "EXAMDATE_bl") or "")
    if not start and all(_months(row) is None for row in rows):
        start = min(filter(None, map(_date_of, rows)), default=None)
    start = start or next((_date_of(row) for row in rows if _months(row) == 0), None)
    is_repeated = len({pick(row, *AGE_COLUMNS) for row in rows} - {None}) == 1 and not columns >= {"age", "agebl"}
    repeated = {fold(column) for column in (*AGE_COLUMNS, *DIAGNOSIS_COLUMNS)}
    result = []
    for row in rows:
        years = max(0.0, _since_baseline(row, start))
        own = {column: cell for column, cell in row.items() if fold(column) not in repeated}
        of_visit = (name for name in DIAGNOSIS_COLUMNS if not years or name not in _OF_BASELINE["diagnosis"])
        own["diagnosis"] = pick(row, *of_visit) or ""
        own["age"] = pick(row, *AGE_COLUMNS) or ""
        with contextlib.suppress(ValueError):  # the reader of the age says what is wrong with it
            age = parse_age(own["age"])
            is_start = age is not None and years and is_repeated and not pick(row, SCAN_AGE)
            own["age"] = f"{(age or 0) + years:.2f}" if is_start else own["age"]
        result.append(own)
    return result


def with_dates(rows: list[Row]) -> list[Row]:
    """Rows whose dates have day and month in the order that other cells of the column prove, where they agree."""
    dates = set(map(fold, DATE_COLUMNS))
    for column in {column for row in rows for column in row if fold(column) in dates}:
        cells = {i: row.get(column, "").strip() for i, row in enumerate(rows)}
        found = {i: match for i, cell in cells.items() if (match := DAY_MONTH_YEAR.match(cell))}
        is_day_first, is_month_first = (any(int(match[n]) > 12 for match in found.values()) for n in (1, 2))
        if is_day_first != is_month_first:
            for i, match in found.items():
                day, month = (match[1], match[2]) if is_day_first else (match[2], match[1])
                rows[i][column] = f"{match[3]}-{int(month):02}-{int(day):02}"
    return rows


def _baseline_facts(row: Row) -> set[str]:
    """Which of diagnosis and age a row has in columns of the baseline only; none if it is of a visit by name."""
    if pick(row, *SESSION_COLUMNS):
        return set()
    # A date may have added years to the age: see _of_own_visits.
    of_visit = {name: {*FACT_COLUMNS[name]} - {*columns} for name, columns in _OF_BASELINE.items()}
    of_visit["age"] |= {"Years_bl", *DATE_COLUMNS}
    return {name for name, columns in _OF_BASELINE.items() if pick(row, *columns) and not pick(row, *of_visit[name])}


def _since_baseline(row: Row, start: str | None) -> float:
    """Years since the baseline, whose date is ``start``; 0 where nothing tells them."""
    with contextlib.suppress(ValueError):
        return float(pick(row, "Years_bl") or "")
    day = _date_of(row)
    return years_between(start, day) if start and day else (_months(row) or 0.0) / 12


def _months(row: Row) -> float | None:
    return months_since_baseline(pick(row, *SESSION_COLUMNS) or "")


# Years, months, weeks and days; the first letter is that of DICOM's ages.
_AGE_UNIT = re.compile(r"\b(y(?:(?:ea)?rs?)?|m(?:o(?:nth)?s?)?|w(?:(?:ee)?ks?)?|d(?:ays?)?)\b", re.IGNORECASE)


def in_units(rows: list[Row], sidecar: Path, complain: Complain | None = None) -> list[Row]:
    """Rows whose ages have the units of BIDS' JSON file beside a table; ages in units that are not known are left out.

    Raises:
        InputError: for such units, or if the file cannot be read, without ``complain``.
    """
    if not rows or not sidecar.is_file():
        return rows

    def tell(what: str, remedy: str) -> None:
        if complain is None:
            raise InputError(f"{sidecar}: {what}; {remedy}")
        complain("(all)", f"{sidecar.name}: {what}", remedy)

    try:
        described = json.loads(sidecar.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        tell("cannot be read", "mend it; ages are taken for years")
        return rows
    ages = set(map(fold, AGE_COLUMNS))
    for column, facts in described.items() if isinstance(described, dict) else ():
        if not isinstance(facts, dict) or is_missing(str(facts.get("Units") or "")) or fold(column) not in ages:
            continue
        units = {found[0].lower() for found in _AGE_UNIT.findall(str(facts["Units"]))}
        if units == {"y"}:
            continue
        unit = units.pop() if len(units) == 1 else ""
        if not unit:
            tell(f"{column} in units of {facts['Units']!r}", "write years, months, weeks or days; it is not used")
        for row in rows:
            for own in [name for name in row if fold(name) == fold(column)]:
                row[own] = re.sub(r"^[>≥]?\s*[\d.,]+(?=\+?$)", rf"\g<0>{unit}", row[own].strip()) if unit else ""
    return rows


def _compare_ages(row: Row, complain: Callable[[str, str], None]) -> None:
    """Complain if a row's plain age is not that of its scan: which one is wrong is not known."""
    with contextlib.suppress(ValueError):  # the reader of the age says what is wrong with it
        plain, of_scan = parse_age(pick(row, "age")), parse_age(pick(row, SCAN_AGE))
        if plain is not None and of_scan is not None and abs(plain - of_scan) > 1:
            complain(f"age {plain:g}, but {of_scan:g} at the scan", "correct one; the age at the scan is used")


def contents(row: Row) -> str:
    """The first cells of a row, by which it can be found; empty if all are missing."""
    return ", ".join([f"{column} {cell}" for column, cell in row.items() if not is_missing(cell)][:4])


def read_people(
    path: Path, complain: Complain | None = None, name: Callable[[str], str] = canonical_patient_id
) -> People:
    """Read a table of people; ``name`` gives the canonical id of what it has as an id. See :func:`read_table`.

    Raises:
        InputError: if the table cannot be read or has no column of ids.
    """
    rows = with_dates(in_units(read_table(path, complain), path.with_suffix(".json"), complain))
    if not rows or not any(pick(row, *ID_COLUMNS) for row in rows):
        columns = f"no column of subject ids among {', '.join(rows[0])}" if rows else "no rows below its header"
        raise InputError(f"{path}: {columns}; name the column of ids {ID_COLUMNS[0]}, or give another table as --table")
    people = People(path.name)

    def subject(text: str) -> str:
        """An id; of the name of a file, who it is of."""
        return parse_name(volume_stem(Path(text))).subject if volume_suffix(Path(text)) else text

    for row in rows:
        if re.fullmatch(r"[\d.]+", row.get("SES", "")):  # OASIS' socioeconomic status; BIDS' session is in lower case
            del row["SES"]
        if text := pick(row, *ID_COLUMNS):
            text = subject(text)
            people.rows.setdefault(name(text), []).append(row)
            people.spelled.setdefault(name(text), text)
            if not pick(row, ID_COLUMNS[0]):  # BIDS' own; others beside it may be anything
                more = {column: subject(found) for column in ID_COLUMNS if (found := pick(row, column))}
                people.others.setdefault(name(text), {}).update({name(found): column for column, found in more.items()})
        elif what := contents(row):
            what, remedy = f"a row without an id ({what})", "fill in its id, or remove the row"
            if complain is None:
                raise InputError(f"{path}: {what}; {remedy}")
            complain("(all)", what, f"{remedy}; it is left out")
    for patient, several in people.rows.items():
        if complain:
            for row in several:
                _compare_ages(row, functools.partial(complain, people.spelled[patient]))
        for row in several:
            cell = pick(row, *DATE_COLUMNS)
            if complain and cell and not date_of_cell(cell):
                complain(people.spelled[patient], f"date {cell!r} cannot be read for certain", "write it as 2020-06-25")
        if len(several) == 1:
            people.of_baseline[patient] = _baseline_facts(several[0])
        people.rows[patient] = _of_own_visits(several)
    return people
