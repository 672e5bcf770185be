# SPDX-License-Identifier: Apache-2.0
import codecs

import openpyxl
import pandas as pd
import pytest

from volta_components.data.spreadsheets import read_table
from volta_components.data.tables import read_people
from volta_components.errors import InputError

ROWS = [
    {"participant_id": "sub-01", "sex": "F", "age": "61,5", "note": 'tall, "very"'},
    {"participant_id": "sub-02", "sex": "M", "age": "62", "note": "Müller"},
    {"participant_id": "sub-03", "sex": "", "age": "n/a", "note": ""},
]


def text_of(separator, end="\n", quote=True):
    def cell(value):
        return f'"{value.replace(chr(34), chr(34) * 2)}"' if quote and (separator in value or '"' in value) else value

    lines = [separator.join(ROWS[0]), *(separator.join(map(cell, row.values())) for row in ROWS)]
    return end.join(lines) + end


ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "utf-8 with mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16 without mark": lambda text: text.encode("utf-16-le"),
    "utf-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "with the end of a file of DOS": lambda text: text.encode() + b"\x1a",
    "utf-32": lambda text: text.encode("utf-32"),
    "old Windows": lambda text: text.encode("cp1252"),
}


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_are_read_however_they_were_saved(tmp_path, separator, end, encoding):
    path = tmp_path / "participants.tsv"
    path.write_bytes(ENCODINGS[encoding](text_of(separator, end)))
    assert read_table(path) == ROWS


def test_people_behind_a_sheet_of_notes_are_read(tmp_path):
    with pd.ExcelWriter(tmp_path / "t.xlsx") as book:
        pd.DataFrame({"notes": ["all about the study"]}).to_excel(book, sheet_name="Notes", index=False)
        pd.DataFrame(ROWS).to_excel(book, sheet_name="people", index=False)
    pd.DataFrame(ROWS).to_excel(tmp_path / "alone.xlsx", index=False)
    assert read_table(tmp_path / "t.xlsx") == read_table(tmp_path / "alone.xlsx") != []


@pytest.mark.parametrize("suffix", [".xlsx", ".tsv"])
def test_an_excel_sheet_is_told_by_its_content(tmp_path, suffix):
    pd.DataFrame(ROWS).to_excel(tmp_path / "t.xlsx", index=False)
    (tmp_path / "t.xlsx").rename(tmp_path / f"t{suffix}")
    assert [row["participant_id"] for row in read_table(tmp_path / f"t{suffix}")] == ["sub-01", "sub-02", "sub-03"]


def test_text_that_is_called_xls_is_read_as_text(tmp_path):
    (tmp_path / "t.xls").write_text(text_of("\t"))
    assert read_table(tmp_path / "t.xls") == ROWS


@pytest.mark.parametrize(
    "text",
    ["sep=;\nid;sex\n1;F\n", "\n\nid,sex\n1,F\n", "id\tsex\n1\tF\n\n\n", '"id","sex"\n"1","F"\n', "id;sex;\n1;F;\n"],
)
def test_what_spreadsheets_put_around_a_table_is_left_out(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    assert read_table(tmp_path / "t.csv") == [{"id": "1", "sex": "F"}]


def test_a_quotation_mark_that_is_never_closed_swallows_nobody(tmp_path):
    (tmp_path / "t.tsv").write_text('id\tname\n1\t"tall\n2\tb\n3\tc\n')
    assert [row["id"] for row in read_table(tmp_path / "t.tsv")] == ["1", "2", "3"]


def test_a_decimal_comma_in_a_table_of_commas_is_no_other_age(tmp_path):
    (tmp_path / "t.csv").write_text("id,age,sex\n1,61,5,F\n2,62,M\n")
    said = []
    assert read_table(tmp_path / "t.csv", lambda *words: said.append(words)) == [{"id": "2", "age": "62", "sex": "M"}]
    assert said[0][0] == "1" and "line 2 has 4 cells where the header has 3 columns" in said[0][1]
    with pytest.raises(InputError, match="line 2 has 4 cells"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("id,sex,age\n1,F,61,5\n2,M,62,5\n")
    with pytest.raises(InputError, match=r"t.csv: line 2 has 4 cells .* no row fits; quote cells"):
        read_people(tmp_path / "t.csv", lambda *words: None)


def test_two_columns_of_one_name_are_named_where_they_differ(tmp_path):
    (tmp_path / "t.csv").write_text("id,age,Age\n1,61,62\n")
    said = []
    rows = read_table(tmp_path / "t.csv", lambda *words: said.append(words))
    assert rows[0]["age"] == "61" and "2 columns are named 'age' and differ" in said[0][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x01\x02\x03" * 50, "binary file|not text"),
        (b"\xff\xfea", "not text"),
        (b"PK\x03\x04 no workbook", "not a readable Excel sheet"),
        (b"/annex/objects/SHA256E-s10--ab.tsv\n", "not fetched"),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(InputError, match=rf"t.tsv: .*({message})"):
        read_people(tmp_path / "t.tsv")


def test_a_table_that_was_not_fetched_names_what_fetches_it(tmp_path):
    (tmp_path / "participants.tsv").symlink_to(".git/annex/objects/aa/K/K")
    with pytest.raises(InputError, match="datalad get"):
        read_table(tmp_path / "participants.tsv")


@pytest.mark.parametrize("above", ["# exported 2020\n", "\tDemographics\t\n", "My study, all sites\n\n", "Subject\n"])
@pytest.mark.parametrize("separator", ["\t", ";", ","])
def test_titles_above_the_header_are_left_out(tmp_path, above, separator):
    path = tmp_path / "participants.csv"
    path.write_text(above + text_of(separator))
    assert read_table(path) == ROWS


def test_titles_above_the_header_of_a_sheet_are_left_out(tmp_path):
    lines = [["My study", "", "", ""], list(ROWS[0]), *(row.values() for row in ROWS)]
    pd.DataFrame(lines).to_excel(tmp_path / "t.xlsx", index=False, header=False)
    assert [row["participant_id"] for row in read_table(tmp_path / "t.xlsx")] == ["sub-01", "sub-02", "sub-03"]


def test_a_web_page_is_no_table(tmp_path):
    (tmp_path / "t.xls").write_text("<html><table><tr><td>participant_id</td></tr></table></html>")
    with pytest.raises(InputError, match="not a table but a web page"):
        read_table(tmp_path / "t.xls")


def test_formulas_without_their_values_are_named_rather_than_read_as_nothing(tmp_path):
    pd.DataFrame(ROWS).to_excel(tmp_path / "t.xlsx", index=False)
    book = openpyxl.load_workbook(tmp_path / "t.xlsx")
    book.active["C3"] = "=2020-1958"
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match=r"t.xlsx: formulas .* \(C3\); open it in"):
        read_table(tmp_path / "t.xlsx")


def test_merged_cells_of_several_rows_are_refused_by_name(tmp_path):
    lines = [["My study", "", "", ""], list(ROWS[0]), *(row.values() for row in ROWS)]
    pd.DataFrame(lines).to_excel(tmp_path / "t.xlsx", index=False, header=False)
    book = openpyxl.load_workbook(tmp_path / "t.xlsx")
    book.active.merge_cells("A1:D1")  # a title
    book.active.merge_cells("C3:D3")
    book.create_sheet("notes").merge_cells("A1:B9")
    book.save(tmp_path / "t.xlsx")
    assert len(read_table(tmp_path / "t.xlsx")) == 3
    book.active.unmerge_cells("C3:D3")
    book.active.merge_cells("A3:A5")
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match=r"t.xlsx: cells of several rows are merged \(A3:A5\)"):
        read_table(tmp_path / "t.xlsx")


def test_of_several_sheets_with_ids_the_one_that_says_most_is_read_and_the_others_are_named(tmp_path):
    with pd.ExcelWriter(tmp_path / "t.xlsx") as book:
        pd.DataFrame({"participant_id": ["sub-01"], "MMSE": [30]}).to_excel(book, sheet_name="tests", index=False)
        pd.DataFrame(ROWS).to_excel(book, sheet_name="men", index=False)
        pd.DataFrame(ROWS).to_excel(book, sheet_name="women", index=False)
    said = []
    assert read_table(tmp_path / "t.xlsx", lambda *words: said.append(words))[0]["age"] == "61,5"
    assert [what for _, what, _ in said] == ["of several sheets with ids 'men' is read, but not 'tests', 'women'"]
    with pytest.raises(InputError, match=r"t.xlsx: of several sheets"):
        read_table(tmp_path / "t.xlsx")
