# SPDX-License-Identifier: Apache-2.0
"""IXI as downloaded: ``IXI-T1/IXI002-Guys-0828-T1.nii.gz`` and ``IXI.xls``."""

from __future__ import annotations

import re
from pathlib import Path

from volta_components.data.layouts.common import LayoutOptions, Listing, Scan, choose, look, relative
from volta_components.data.tables import parse_age, parse_sex, pick, read_table
from volta_components.data.walk import Tree
from volta_components.errors import InputError

_NAME = re.compile(r"IXI(\d{1,4})-([A-Za-z]+)-(\d+)-T1$")
# IXI's other contrasts.
_OTHER = re.compile(r"-(T2|PD|MRA|DTI(-\d+)?)$")
_CODES = {"1": "M", "2": "F"}


def read(options: LayoutOptions) -> Listing:
    """List IXI's T1 scans with sex and age.

    Rows without a scan, scans without a row and double ids are named. A person's equal rows are one; rows that differ
    in sex leave it unknown; of rows that differ in age, the first that has one is taken.

    Raises:
        InputError: if there is no such folder, no T1 scan, or no table.
    """
    root = options.source
    listing = Listing(cohort="ixi")
    tree = look(listing, root)
    scans = []
    for volume in tree.volumes():
        if match := _NAME.search(volume.stem):
            scans.append((volume.path, match))
        elif not _OTHER.search(volume.stem):
            remedy = "name it as IXI does (IXI002-Guys-0828-T1.nii.gz), or move it away"
            place = relative(volume.path, root)
            listing.note("problem", volume.stem, place, "is not named as IXI names scans", remedy)
    if not scans:
        raise InputError(f"{root}: no file like IXI002-Guys-0828-T1.nii.gz; unpack IXI-T1.tar there")
    table = options.table or _find_table(tree)
    rows = _people(listing, table)
    for path, match in scans:
        person = f"IXI{int(match[1]):03d}"
        sex, age, known = rows.get(person, (None, None, False))
        if not known:
            listing.note("quirk", person, relative(path, root), f"scan without a row in {table.name}")
        listing.add(Scan(person, None, person, path, relative(path, root), site=match[2], sex=sex, age=age))
    for person in sorted(set(rows) - {scan.subject_id for scan in listing.scans}):
        listing.note(
            "problem", person, table.name, "row without a T1 scan", "IXI itself has some of these; check yours"
        )
    sexes = [sex for sex, _, _ in rows.values()]
    listing.found = {
        "people in the table": len(rows),
        "male": sexes.count("M"),
        "female": sexes.count("F"),
        "T1 scans": len(scans),
        "T1 scans with sex": sum(scan.sex is not None for scan in listing.scans),
    }
    return choose(listing, ("all",))


def _find_table(tree: Tree) -> Path:
    kinds = {".xls", ".xlsx", ".csv", ".tsv"}
    found = [path for path in tree.files if path.name.startswith("IXI") and path.suffix.lower() in kinds]
    if not found:
        raise InputError(f"{tree.root}: IXI.xls is missing; download it beside the scans, or give it as --table")
    return found[0]


def _people(listing: Listing, table: Path) -> dict[str, tuple[str | None, float | None, bool]]:
    """Sex and age of each id, as ``(sex, age, True)``."""
    rows = read_table(
        table, lambda who, what, remedy: listing.note("problem", who, table.name, what, remedy, False, "")
    )
    if not rows or pick(rows[0], "IXI_ID", "IXI ID", "ID") is None:
        raise InputError(f"{table}: no column IXI_ID; is it IXI's own table?")
    sexes: dict[str, list[str]] = {}
    ages: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for row in rows:
        number = re.sub(r"\D", "", (pick(row, "IXI_ID", "IXI ID", "ID") or "").split(".")[0])
        if not number:
            continue
        person = f"IXI{int(number):03d}"
        counts[person] = counts.get(person, 0) + 1
        sex_column = next((key for key in row if key.upper().startswith("SEX")), "SEX_ID (1=m, 2=f)")
        sexes.setdefault(person, [])
        ages.setdefault(person, [])
        try:
            if (sex := parse_sex(pick(row, sex_column), _CODES)) is not None:
                sexes[person].append(sex)
        except ValueError as error:
            listing.note("problem", person, table.name, str(error), "correct the table; kept without sex", False)
        try:
            if (years := parse_age(pick(row, "AGE"))) is not None:
                ages[person].append(years)
        except ValueError as error:
            listing.note("problem", person, table.name, str(error), "correct the table; kept without age", False)
    people: dict[str, tuple[str | None, float | None, bool]] = {}
    for person, count in counts.items():
        sex = sexes[person][0] if sexes[person] else None
        age = ages[person][0] if ages[person] else None
        if count > 1:
            if len(set(sexes[person])) > 1:
                listing.note(
                    "problem", person, table.name, f"{count} rows that differ in sex", "correct the table", False
                )
                sex = None
            else:
                also = f"; ages {', '.join(f'{a:g}' for a in ages[person])}" if len(set(ages[person])) > 1 else ""
                listing.note("quirk", person, table.name, f"id is in {count} rows{also}", "the first age is used")
        if age is None:
            listing.note("quirk", person, table.name, "age is missing")
        people[person] = (sex, age, True)
    return people
