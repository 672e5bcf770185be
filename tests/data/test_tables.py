# SPDX-License-Identifier: Apache-2.0

import pytest

from volta_components.data.tables import (
    is_missing,
    parse_age,
    parse_diagnosis,
    parse_sex,
    read_fact,
    read_people,
    session_row,
)
from volta_components.errors import InputError


@pytest.mark.parametrize("cell", ["-", "?", "n.a.", "N/A", " NaN ", "missing", ""])
def test_words_for_nothing_are_nothing(cell):
    assert is_missing(cell) and parse_sex(cell) is parse_age(cell) is parse_diagnosis(cell) is None


@pytest.mark.parametrize(
    ("cell", "years"),
    [("61,5", 61.5), ("90+", 90), ("> 89", 89), ("070Y", 70), ("018M", 1.5), ("61 years", 61), ("n/a", None)],
)
def test_ages(cell, years):
    assert parse_age(cell) == years


@pytest.mark.parametrize("cell", ["old", "-5", "200", "60-70", "1.234,5"])
def test_what_is_no_age_is_refused(cell):
    with pytest.raises(ValueError, match="age"):
        parse_age(cell)


def test_a_number_below_zero_is_told_to_be_out_of_range():
    with pytest.raises(ValueError, match="age '-9' is out of range"):
        parse_age("-9")


def test_sexes_and_diagnoses():
    assert [parse_sex(word) for word in ("male", "F", "n/a")] == ["M", "F", None]
    assert [parse_diagnosis(word) for word in ("Control", "Dementia", "mci", "")] == ["CN", "AD", "MCI", None]
    assert parse_diagnosis("Alzheimer’s disease") == "AD"  # as Word writes it


# --- people ----------------------------------------------------------------------------------------------------------


def people_of(tmp_path, text):
    (tmp_path / "people.csv").write_text(text)
    return read_people(tmp_path / "people.csv")


def test_ids_are_matched_in_other_spellings_unless_somebody_else_has_them(tmp_path):
    people = people_of(tmp_path, "id,sex\n1,F\nP_02,M\nsub-3,F\nsub-03,M\n4,F\n")
    assert people.find(["sub-01", "p2", "sub-3", "x"]) == [("p2", "P_02"), ("sub-01", "1")]
    assert people.row("sub-01")[0]["sex"] == "F" and people.row("x") == (None, [])
    assert people.without(["sub-01", "p2", "sub-3"]) == ["4", "sub-03"]


def test_two_columns_of_ids_that_match_different_scans_are_refused(tmp_path):
    people = people_of(tmp_path, "ID,file,sex\n1,p3.nii,F\n2,2.nii,M\n3,p1.nii,M\n")
    assert people.find(["1", "2", "3"]) == [] and people.find(["p1", "p3"]) == []
    people = people_of(tmp_path, "ID,file,sex\n1,2.nii.gz,F\n2,1.nii.gz,M\n")
    with pytest.raises(InputError, match=r"people.csv: somebody has the ids of two scans \(ID '1' and file '2'\)"):
        people.find(["1", "2"])
    people = people_of(tmp_path, "participant_id,ID,sex\n1,2,F\n2,1,M\n")
    assert people.find(["1", "2"]) == []


def test_ids_that_are_names_of_files_say_who_these_are_of(tmp_path):
    people = people_of(tmp_path, "file,sex\nraw/anna_T1.nii.gz,F\nsub-02_ses-1_T1w.nii.gz,M\np3.nii,F\n")
    assert people.without(["anna", "sub-02", "p3"]) == []


def test_the_socioeconomic_status_of_oasis_is_no_session(tmp_path):
    people = people_of(tmp_path, "Subject ID,Visit,M/F,Age,SES\nOAS2_0001,1,F,87,2\nOAS2_0001,2,F,88,2\n")
    assert [people.row("OAS2_0001", f"ses-MR{visit}")[0]["Age"] for visit in (1, 2)] == ["87", "88"]
    people = people_of(tmp_path, "ID,SES,age\n1,ses-1,60\n1,ses-2,62\n")
    assert people.row("1", "ses-2")[0]["age"] == "62"


def test_headings_of_groups_above_the_header_are_no_header(tmp_path):
    people = people_of(tmp_path, "Subject,,,Cognition,\nID,age_yrs,Sex,MMSE,CDR\n1,60,M,30,0\n")
    row, _ = people.row("1")
    assert (read_fact("age", row), read_fact("sex", row)) == (60, "M")


def test_years_since_the_first_date_are_added_to_the_age_at_the_baseline(tmp_path):
    """Where neither a column nor the name of a visit says which one is the baseline."""
    people = people_of(tmp_path, "ID,session,scan_date,age_bl\n1,2,2018-01-01,60\n1,1,2015-01-01,60\n")
    assert [read_fact("age", people.row("1", name)[0]) for name in ("ses-1", "ses-2")] == [60, 63]


@pytest.mark.parametrize(
    ("columns", "cells", "facts"),
    [
        ("age_bl,DX_bl", "60,CN", {"age", "diagnosis"}),
        ("age_bl,age,DX_bl,DX", "60,62,CN,MCI", set()),
        ("age_bl,Years_bl,DX_bl", "60,2,CN", {"diagnosis"}),
        ("age_bl,DX_bl,visit", "60,CN,m24", set()),
    ],
)
def test_what_is_known_of_the_baseline_only(tmp_path, columns, cells, facts):
    assert people_of(tmp_path, f"ID,{columns}\n1,{cells}\n").baseline_facts("1") == facts


VISITS = "PTID,VISCODE,EXAMDATE,sex,age\na,m12,2007-05-01,F,61\na,bl,2006-04-18,F,60\n"


@pytest.mark.parametrize(
    ("session", "date", "age"),
    [("ses-M012", None, "61"), ("ses-M00", None, "60"), ("ses-x", "2007-05-01", "61"), (None, None, "60")],
)
def test_of_several_rows_the_sessions_own_counts(tmp_path, session, date, age):
    row, unknown = people_of(tmp_path, VISITS).row("a", session, date)
    assert (row["age"], row["sex"], unknown) == (age, "F", [])


ADNIMERGE = [
    "PTID,VISCODE,EXAMDATE,DX_bl,AGE,PTGENDER,DX",
    "a,bl,2006-05-02,LMCI,76.3,Female,MCI",
    "a,m12,2007-05-10,LMCI,76.3,Female,",
    "a,m24,2008-05-20,LMCI,76.3,Female,Dementia",
]
BASELINES = {
    "": ("",) * 4,
    "EXAMDATE_bl": (",EXAMDATE_bl", *(",2006-05-02",) * 3),
    "Years_bl": (",Years_bl", ",0", ",1.02", ",2.05"),
}


@pytest.mark.parametrize("more", BASELINES)
@pytest.mark.parametrize(
    ("session", "date", "age", "diagnosis"),
    [
        ("ses-20060418", "2006-04-18", "76.3", "LMCI"),  # scanned before the examination
        ("ses-20080622", "2008-06-22", "78.35", "Dementia"),
        ("ses-M024", None, "78.35", "Dementia"),
        ("ses-20070501", "2007-05-01", "77.32", ""),  # that visit has no diagnosis, and the others differ
        (None, None, "76.3", "LMCI"),
    ],
)
def test_adnis_baseline_is_no_later_visits(tmp_path, more, session, date, age, diagnosis):
    text = "".join(f"{line}{cell}\n" for line, cell in zip(ADNIMERGE, BASELINES[more], strict=True))
    row, unknown = people_of(tmp_path, text).row("a", session, date)
    assert (float(row["age"]), row["diagnosis"]) == (pytest.approx(float(age), abs=0.02), diagnosis) and not unknown


def test_a_visit_does_not_have_the_diagnosis_of_another_one(tmp_path):
    people = people_of(tmp_path, "ID,VISCODE,sex,age,DX\na,bl,F,60,CN\na,m12,,61,\n")
    row, unknown = people.row("a", "ses-M12")
    assert (row["age"], row["sex"], row["DX"], unknown) == ("61", "F", "", ["diagnosis"])


def test_a_single_later_row_of_adnis_is_not_the_baseline(tmp_path):
    text = "PTID,VISCODE,DX_bl,AGE,DX\nb,m24,CN,60,MCI to Dementia\n"
    row, _ = people_of(tmp_path, text).row("b")
    assert (row["age"], parse_diagnosis(row["diagnosis"])) == ("62.00", "AD")


def test_ages_of_the_visits_themselves_are_kept(tmp_path):
    text = "PTID,VISCODE,DX_bl,age,DX\na,bl,CN,60,CN\na,m24,CN,62,MCI\n"
    row, _ = people_of(tmp_path, text).row("a", "ses-M24")
    assert (row["age"], row["diagnosis"]) == ("62", "MCI")


@pytest.mark.parametrize(("day", "age"), [("2006-07-17", "60"), ("2006-07-18", ""), ("2007-02-01", "61")])
def test_the_nearest_row_counts_up_to_90_days(tmp_path, day, age):
    row, unknown = people_of(tmp_path, VISITS).row("a", f"ses-{day.replace('-', '')}", day)
    assert row["age"] == age and unknown == ([] if age else ["age"])


def test_a_session_with_a_name_is_not_matched_by_a_near_date(tmp_path):
    assert people_of(tmp_path, VISITS).row("a", "ses-M003", "2006-06-18")[0]["age"] == ""


def test_what_no_row_surely_says_stays_unknown(tmp_path):
    row, unknown = people_of(tmp_path, VISITS).row("a", "ses-M24")
    assert (row["age"], row["sex"], unknown) == ("", "F", ["age"])
    row, unknown = people_of(tmp_path, "id,sex,age\na,F,60\na,M,60\n").row("a")
    assert (row["sex"], row["age"], unknown) == ("", "60", ["sex"])


def test_two_rows_of_one_session_are_none(tmp_path):
    rows = [{"session_id": "M6", "age": "1"}, {"session_id": "ses-M006", "age": "2"}]
    assert session_row(rows, "ses-M06") is None
    assert session_row(rows, "ses-M006")["age"] == "2"


def test_a_row_of_another_visit_gives_no_age_and_no_diagnosis(tmp_path):
    people = people_of(tmp_path, "id,session_id,sex,age,diagnosis\na,M24,F,62,AD\n")
    row, unknown = people.row("a", "ses-M000")
    assert (row["sex"], row["age"], row["diagnosis"], unknown) == ("F", "", "", ["age", "diagnosis"])
    row, unknown = people.row("a", "ses-M024")
    assert (row["age"], row["diagnosis"], unknown) == ("62", "AD", [])


def test_dates_of_several_rows_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "t.csv").write_text("id,EXAMDATE,age\na,05.06.2020,60\na,2021-06-25,61\n")
    said = []
    read_people(tmp_path / "t.csv", lambda *words: said.append(words))
    assert [(who, what) for who, what, _ in said] == [("a", "date '05.06.2020' cannot be read for certain")]


@pytest.mark.parametrize("column", ["age_at_scan", "Age at scan"])
@pytest.mark.parametrize(("other", "told"), [("age", True), ("age_bl", False)])
def test_the_age_at_the_scan_counts_first(tmp_path, column, other, told):
    (tmp_path / "t.csv").write_text(f"id,{other},{column}\na,50,60\nb,60,60.5\nc,61,\nd,61,old\n")
    said = []
    people = read_people(tmp_path / "t.csv", lambda *words: said.append(words))
    assert [read_fact("age", people.row(who)[0]) for who in "abc"] == [60, 60.5, 61]
    assert [words[:2] for words in said] == [("a", "age 50, but 60 at the scan")] * told


def test_no_years_are_added_to_an_age_at_the_scan(tmp_path):
    row, _ = people_of(tmp_path, "id,VISCODE,age_bl,age_at_scan\na,m24,60,62\n").row("a")
    assert row["age"] == "62"


def test_a_row_without_an_id_is_named_by_its_content(tmp_path):
    (tmp_path / "t.csv").write_text("id,session,sex,age\na,M0,F,60\n,M12,F,61\n,n/a,,\n")
    said = []
    people = read_people(tmp_path / "t.csv", lambda *words: said.append(words))
    assert list(people.rows) == ["a"] and [(who, what) for who, what, _ in said] == [
        ("(all)", "a row without an id (session M12, sex F, age 61)")
    ]
    with pytest.raises(InputError, match=r"t.csv: a row without an id"):
        read_people(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("other", "day"), [("5/22/2006", "2006-05-02"), ("22/5/2006", "2006-02-05"), ("5/6/2006", None), (None, None)]
)
def test_the_whole_column_tells_the_order_of_day_and_month(tmp_path, other, day):
    (tmp_path / "t.csv").write_text("id,EXAMDATE,age\na,5/02/2006,60\n" + (f"b,{other},61\n" if other else ""))
    said = []
    people = read_people(tmp_path / "t.csv", lambda *words: said.append(words))
    assert (session_row(people.rows["a"], None, "2006-05-02") is None) is (day is None)
    assert [day] == [row["EXAMDATE"] for row in people.rows["a"]] if day else said[0][1].startswith("date '5/02/2006'")
    assert bool(said) is (day is None)


def test_columns_are_known_with_units_and_in_other_spellings(tmp_path):
    path = tmp_path / "participants.csv"
    path.write_text("Subject-ID,Sex (M/F),Age [years]\nsub-01,F,60\nsub-01,F,61\nsub-02,M,70\n")
    people = read_people(path)
    row, differ = people.row("sub-02")
    assert (row["Sex (M/F)"], row["Age [years]"], differ) == ("M", "70", [])
    row, differ = people.row("sub-01")
    assert (row["Sex (M/F)"], row["Age [years]"], differ) == ("F", "", ["age"])


def test_oasis_has_a_column_of_sexes_without_the_word(tmp_path):
    path = tmp_path / "oasis_cross-sectional.csv"
    path.write_text("ID,M/F,Hand,Age\nOAS1_0001_MR1,F,R,74\nOAS1_0002_MR1,M,R,55\n")
    people = read_people(path)
    rows = [people.row(patient)[0] for patient in ("OAS1_0001", "OAS1_0002")]
    assert [read_fact("sex", row) for row in rows] == ["F", "M"]
