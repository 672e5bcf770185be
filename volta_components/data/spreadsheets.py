# SPDX-License-Identifier: Apache-2.0
"""Tables as files: any usual encoding, separator and kind of workbook, as rows of text."""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import math
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from volta_components.data.columns import FACT_COLUMNS, ID_COLUMNS
from volta_components.data.identity import grouped
from volta_components.data.unusable import missing_content
from volta_components.errors import InputError

# A table's header is looked for in so many lines.
_TITLE_LINES = 5

Row = dict[str, str]
# Takes what is wrong with a table: whose row, what, what to do.
Complain = Callable[[str, str, str], None]


def read_table(path: Path, complain: Complain | None = None) -> list[Row]:
    """Rows of a CSV, TSV or Excel table, as text; whole numbers that Excel holds as floats lose their ``.0``.

    Text may be UTF-8, UTF-16 or of an old Windows, lines may end in any way, cells be separated by tabs, commas,
    semicolons or bars, told from the header. What is an Excel sheet is told from the content, not the name.
    Of several sheets with ids, the one that says most of people is read. ``complain`` is called for rows, columns and
    sheets that are left out; without it, they are an error.

    Raises:
        InputError: if it cannot be read.
    """

    def tell(who: str, what: str, remedy: str) -> None:
        if complain is None:
            raise InputError(f"{path}: {what}; {remedy}")
        complain(who, what, remedy)

    content = _content(path)
    kinds = (b"PK\3\4", b"\xd0\xcf\x11\xe0", b"\x09\x00", b"\x09\x02", b"\x09\x04", b"\x09\x08")
    named_excel = path.suffix.lower() in {".xls", ".xlsx"}
    is_excel = content.startswith(kinds) or (named_excel and not _is_text(content))
    return _rows(path, _excel(path, tell) if is_excel else _delimited(path, content), tell)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if len(content) < 1024 and (why := missing_content(path)):
            raise InputError(f"{path}: {why[0]}; {why[1]}")
        return content
    except FileNotFoundError as error:
        reason, remedy = missing_content(path) or ("no such file", "give the table of subjects as --table")
        raise InputError(f"{path}: {reason}; {remedy}") from error
    except PermissionError as error:
        raise InputError(f"{path}: permission denied; make it readable (chmod u+r)") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in _decoded(content)
    except UnicodeDecodeError:
        return False


def _decoded(content: bytes) -> str:
    marks = {
        codecs.BOM_UTF8: "utf-8-sig",
        codecs.BOM_UTF32_LE: "utf-32",
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    for mark, name in marks.items():
        if content.startswith(mark):
            return content.decode(name)
    even, odd = content[:400:2].count(0), content[1:400:2].count(0)
    if even or odd:
        return content.decode("utf-16-le" if odd > even else "utf-16-be")
    for name in ("utf-8", "cp1252"):
        try:
            return content.decode(name)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")


Lines = list[tuple[int, list[str]]]


def _delimited(path: Path, content: bytes) -> Lines:
    """Cells of a text, with the number of each line."""
    try:
        text = _decoded(content).rstrip("\x1a")  # the end of a file of DOS
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8, UTF-16 or of Windows; save it as CSV in UTF-8") from error
    if re.search(r"[\0-\x08\x0e-\x1f]", text):
        raise InputError(f"{path}: not a table but a binary file; save it as CSV, TSV or Excel sheet")
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
    # Excel's own word for the separator.
    hint = re.match(r'"?sep=(.)"?\n', text, re.IGNORECASE)
    text = text[hint.end() :] if hint else text
    if text.startswith("<"):
        raise InputError(f"{path}: not a table but a web page (HTML or XML); open it and save it as CSV or Excel sheet")
    first = [line for line in text.split("\n", 20)[:20] if line.strip()][:_TITLE_LINES]
    place = _header([(0, re.split(r'[\t;,|"]+', line)) for line in first])
    header = first[place or 0] if first else ""
    header = re.sub(r'"[^"]*"', "", header)
    separator = hint[1] if hint else max("\t;,|", key=header.count)
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        reader = csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting, skipinitialspace=separator != "\t")
        try:
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
        except csv.Error:
            continue
        # A quotation mark that is never closed would swallow the lines after it.
        if not any("\n" in cell and separator in cell for _, cells in lines for cell in cells):
            return lines
    return [(number, [cell.strip('"') for cell in cells]) for number, cells in lines]


def _excel(path: Path, tell: Complain) -> Lines:
    import pandas as pd

    try:
        sheets = pd.read_excel(path, dtype=object, header=None, sheet_name=None)
    except Exception as error:  # xlrd and openpyxl raise anything at a damaged workbook
        raise InputError(
            f"{path}: not a readable Excel sheet ({error}); save it as .xlsx or CSV, without a password, or "
            "download it again"
        ) from error

    def text(cell: Any) -> str:
        if cell is None or cell is pd.NaT or (isinstance(cell, float) and math.isnan(cell)):
            return ""
        if isinstance(cell, float) and cell.is_integer():
            return str(int(cell))
        return str(cell).strip()

    if unsaved := _formulas_without_value(path):
        raise InputError(
            f"{path}: formulas whose values are not in the file ({_some(unsaved)}); open it in Excel or "
            "LibreOffice and save it, or save it as CSV"
        )
    every: dict[str, Lines] = {
        str(name): _filled(
            [(number, [text(cell) for cell in cells]) for number, cells in enumerate(frame.itertuples(index=False), 1)]
        )
        for name, frame in sheets.items()
    }
    # The people may stand behind a sheet of notes.
    with_ids = [name for name, lines in every.items() if _header(lines) is not None]
    if not with_ids:
        return next(iter(every.values()))
    read = max(with_ids, key=lambda name: _facts(every[name][_header(every[name]) or 0][1]))
    if others := [repr(name) for name in with_ids if name != read]:
        what = f"of several sheets with ids {read!r} is read, but not {', '.join(others)}"
        tell("(all)", what, "put what counts on one sheet, and save it as a table of its own")
    first = every[read][_header(every[read]) or 0][0]
    if merged := _merged_rows(path, read, first):
        raise InputError(
            f"{path}: cells of several rows are merged ({_some(merged)}), and only the first row has the value; "
            "split them, and write the value into each row"
        )
    return every[read]


def _some(cells: list[str]) -> str:
    return ", ".join(cells[:5]) + (f" and {len(cells) - 5} more" if len(cells) > 5 else "")


def _filled(lines: Lines) -> Lines:
    return [(number, cells) for number, cells in lines if any(cells)]


def _header(filled: Lines) -> int | None:
    """Which of the first lines names a column of ids, and most facts of people: headings of groups may be above it."""
    rows = [i for i, (_, cells) in enumerate(filled[:_TITLE_LINES]) if _has_ids(cells)]
    return max(rows, key=lambda i: _facts(filled[i][1]), default=None)


def _facts(cells: Iterable[str]) -> int:
    """How many facts of people columns of these names have."""
    columns = set(map(fold, cells))
    return sum(not columns.isdisjoint(map(fold, names)) for names in FACT_COLUMNS.values())


def _merged_rows(path: Path, sheet: str, header: int) -> list[str]:
    """Merged cells of several rows below the header, such as ``A2:A3``; a file holds the value of the first only."""
    if not zipfile.is_zipfile(path) or "xl/workbook.xml" not in zipfile.ZipFile(path).namelist():
        return []
    import openpyxl

    with path.open("rb") as stream:  # a name could end in .tsv
        ranges = openpyxl.load_workbook(stream)[sheet].merged_cells.ranges
    return sorted(str(cells) for cells in ranges if header < cells.min_row < cells.max_row)


def _formulas_without_value(path: Path) -> list[str]:
    """Cells whose formula nobody has computed: programs that write workbooks leave that to Excel; pandas reads nothing.

    A formula whose value is an empty text says that it is text.
    """
    if not zipfile.is_zipfile(path):
        return []
    cell = rb'<c r="([A-Z]+[0-9]+)"(?![^>]*\bt=)[^>]*><f(?:[^>]*/>|[^>]*>[^<]*</f>)(?:<v ?/>|<v></v>)?</c>'
    with zipfile.ZipFile(path) as book:
        sheets = sorted(name for name in book.namelist() if name.startswith("xl/worksheets/"))
        return [found.decode() for name in sheets for found in re.findall(cell, book.read(name))]


def _has_ids(cells: Iterable[str]) -> bool:
    """Whether one of the cells is the name of a column of ids."""
    return not {fold(cell) for cell in cells}.isdisjoint(map(fold, ID_COLUMNS))


def _rows(path: Path, lines: Lines, tell: Complain) -> list[Row]:
    """Lines of cells as rows by the names of the columns.

    The first line that is not empty has these, unless one of the next names a column of ids: a title stands above it.
    """
    filled = _filled(lines)
    if not filled:
        return []
    filled = filled[_header(filled) or 0 :]
    names = list(filled[0][1])
    while names and not names[-1]:
        names.pop()
    rows = []
    too_long = []
    remedy = "quote cells with commas in them, or save it with tabs"
    for number, cells in filled[1:]:
        if any(cells[len(names) :]):
            too_long.append(f"line {number} has {len(cells)} cells where the header has {len(names)} columns")
            tell(cells[0] or "(all)", too_long[-1], f"{remedy}; the row is left out")
            continue
        row: Row = {}
        for name, cell in itertools.zip_longest(names, cells[: len(names)], fillvalue=""):
            row.setdefault(name, cell)
        rows.append(row)
    if too_long and not rows:
        raise InputError(f"{path}: {too_long[0]}, and no row fits; {remedy}")
    columns = grouped((i for i, name in enumerate(names) if name), lambda i: fold(names[i]))
    for name, places in sorted(columns.items()):
        if any(len({cells[i] for i in places if i < len(cells)}) > 1 for _, cells in filled[1:]):
            tell("(all)", f"{len(places)} columns are named {name!r} and differ", "remove one; the first is used")
    return rows


@functools.lru_cache(1000)
def fold(column: str) -> str:
    """A column's name without case, separators and units of its values: ``age`` of ``Age (years)`` and ``age_yrs``."""
    units = (
        r"[(\[](in )?(years?|yrs?\.?|y|[mf]\s?/\s?[mf]|(fe)?male\s?/\s?(fe)?male)[)\]]|[\W_]+(in[\W_]+)?(years?|yrs?)$"
    )
    plain = re.sub(units, "", column.casefold())
    return re.sub(r"[\W_]+", "", plain) or column.casefold()
