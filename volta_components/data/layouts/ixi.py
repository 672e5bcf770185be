# SPDX-License-Identifier: Apache-2.0
"""IXI as downloaded: ``IXI-T1/IXI002-Guys-0828-T1.nii.gz`` and ``IXI.xls``."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from volta_components.data.columns import AGE_COLUMNS, SEX_COLUMNS
from volta_components.data.layouts.common import LayoutOptions, Listing, Scan, look
from volta_components.data.spreadsheets import Row, read_table
from volta_components.data.tables import contents, parse_age, parse_sex, pick
from volta_components.data.walk import Tree
from volta_components.errors import InputError

_NAME = re.compile(r"IXI(\d{1,4})-([A-Za-z]+)-(\d+)-T1$")
# IXI's other contrasts.
_OTHER = re.compile(r"-(T2|PD|MRA|DTI(-\d+)?)$")
_CODES = {"1": "M", "2": "F"}
_IDS = ("IXI_ID", "IXI ID", "ID")


def read(options: LayoutOptions) -> Listing:
    """List IXI's T1 scans with sex and age.

    Rows without a scan, scans without a row and double ids are named. A person's equal rows are one; rows that differ
    in sex leave it unknown; of rows that differ in age, the first that has one is taken.

    Raises:
        InputError: if there is no such folder, no T1 scan, or no table.
    """
    root = options.source
    listing = Listing(cohort="ixi")
    tree = look(listing, root, options.follow_links)
    scans = []
    for volume in tree.volumes():
        if match := _NAME.search(volume.stem):
            scans.append((volume.path, match))
        elif not _OTHER.search(volume.stem):
            remedy = "name it as IXI does (IXI002-Guys-0828-T1.nii.gz), or move it away"
            listing.note("problem", volume.stem, volume.path, "is not named as IXI names scans", remedy)
    if not scans:
        raise InputError(f"{root}: no file like IXI002-Guys-0828-T1.nii.gz; unpack IXI-T1.tar there")
    table = options.table or _find_table(tree)
    rows = _people(listing, table)
    for path, match in scans:
        person = f"IXI{int(match[1]):03d}"
        sex, age = rows.get(person, (None, None))
        if person not in rows:
            listing.note("quirk", person, path, f"scan without a row in {table.name}")
        listing.add(Scan(person, None, person, path, listing.place(path), site=match[2], sex=sex, age=age))
    for person in sorted(set(rows) - {scan.subject_id for scan in listing.scans}):
        remedy = "IXI itself has some of these; check yours"
        listing.note("problem", person, table.name, "row without a T1 scan", remedy)
    sexes = [sex for sex, _ in rows.values()]
    listing.found = {
        "people in the table": len(rows),
        "male": sexes.count("M"),
        "female": sexes.count("F"),
        "T1 scans": len(scans),
        "T1 scans with sex": sum(scan.sex is not None for scan in listing.scans),
    }
    return listing.choose(("all",))


def _find_table(tree: Tree) -> Path:
    """IXI's own sheet (``IXI.xls``, ``IXI.csv``), the nearest to the top; else the one table whose name begins so."""
    kinds = {".xls", ".xlsx", ".csv", ".tsv"}
    found = [path for path in tree.files if path.name.startswith("IXI") and path.suffix.lower() in kinds]
    if not found:
        raise InputError(f"{tree.root}: IXI.xls is missing; download it beside the scans, or give it as --table")
    ranks = {path: (path.stem != "IXI", len(path.parts)) for path in found}
    first = [path for path in found if ranks[path] == min(ranks.values())]
    if len(first) > 1:
        names = ", ".join(path.relative_to(tree.root).as_posix() for path in first)
        raise InputError(f"{tree.root}: which of {names} is IXI's table is not known; give it as --table")
    return first[0]


def _people(listing: Listing, table: Path) -> dict[str, tuple[str | None, float | None]]:
    """Sex and age of each id."""

    def note(who: str, what: str, remedy: str, patient: str | None = None) -> None:
        listing.note("problem", who, table.name, what, remedy, False, patient)

    rows = read_table(table, functools.partial(note, patient=""))
    if not any(pick(row, *_IDS) for row in rows):
        raise InputError(f"{table}: no column IXI_ID; is it IXI's own table?")
    sex_columns = [key for key in rows[0] if key.upper().startswith("SEX")] + [*SEX_COLUMNS]
    parsers: dict[str, Callable[[Row], Any]] = {
        "sex": lambda row: parse_sex(pick(row, *sex_columns), _CODES),
        "age": lambda row: parse_age(pick(row, *AGE_COLUMNS)),
    }
    found: dict[str, dict[str, list[Any]]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        number = re.sub(r"\D", "", (pick(row, *_IDS) or "").split(".")[0])
        if not number:
            if what := contents(row):
                note("(all)", f"a row without an id ({what})", "fill in its id, or remove the row", "")
            continue
        person = f"IXI{int(number):03d}"
        counts[person] += 1
        values = found.setdefault(person, {"sex": [], "age": []})
        for name, parse in parsers.items():
            try:
                values[name] += [value] if (value := parse(row)) is not None else []
            except ValueError as error:
                note(person, str(error), f"correct the table; kept without {name}")
    people: dict[str, tuple[str | None, float | None]] = {}
    for person, values in found.items():
        sexes, ages = values["sex"], values["age"]
        if len(set(sexes)) > 1:
            note(person, f"{counts[person]} rows that differ in sex", "correct the table")
        elif counts[person] > 1:
            also = f"; ages {', '.join(f'{age:g}' for age in ages)}" if len(set(ages)) > 1 else ""
            listing.note("quirk", person, table.name, f"id is in {counts[person]} rows{also}", "the first age is used")
        if not ages:
            listing.note("quirk", person, table.name, "age is missing")
        people[person] = (sexes[0] if len(set(sexes)) == 1 else None, ages[0] if ages else None)
    return people
