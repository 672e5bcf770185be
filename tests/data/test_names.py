# SPDX-License-Identifier: Apache-2.0
import pytest

from volta_components.data.names import Name, date_in, date_of_cell, maybe_one_person, parse_name, split_visit


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("sub-01_ses-1_run-2_T1w", Name("sub-01", "ses-1", {"run": "2"}, "T1w")),
        ("sub-01", Name("sub-01")),
        ("sub-05-run-1", Name("sub-05", None, {"run": "1"})),
        ("sub-05-ses-2-run-1-T1w", Name("sub-05", "ses-2", {"run": "1"}, "T1w")),
        ("sub-1_2", Name("sub-1")),
        ("sub-01_desc-hippocampus_dseg", Name("sub-01", None, {"desc": "hippocampus"}, "dseg")),
        ("anna T1", Name("anna", None, {}, "T1")),
        ("bert_ses-2", Name("bert", "ses-2")),
        ("p2_T1w", Name("p2", None, {}, "T1w")),
        ("p_001", Name("p_001")),
        ("T1", Name("T1")),
    ],
)
def test_names_are_taken_apart(stem, expected):
    assert parse_name(stem) == expected


@pytest.mark.parametrize("stem", ["sub-01_T2w", "sub-01_task-rest_bold", "p1_FLAIR", "sub-01_UNIT1", "x-seg"])
def test_names_of_other_contrasts_say_so(stem):
    assert parse_name(stem).is_other


@pytest.mark.parametrize("stem", ["sub-01_T1w", "anna", "p1-T1", "x_mprage", "sub-01"])
def test_names_of_t1_scans_do_not(stem):
    assert not parse_name(stem).is_other


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("p01_visit2", ("p01", "visit2")),
        ("p01_scan_2", ("p01", "scan_2")),
        ("p01_m12", ("p01", "m12")),
        ("p01_2024-06-01", ("p01", "2024-06-01")),
        ("OAS1_0001_MR2", ("OAS1_0001", "MR2")),
        ("a_pre", ("a", "pre")),
        ("p3_2019", ("p3", "2019")),
        ("pt_2019", ("pt_2019", "")),
        ("anna", ("anna", "")),
        ("p_001", ("p_001", "")),
        ("scan1", ("", "scan1")),
    ],
)
def test_words_for_visits_are_split_off(name, parts):
    assert split_visit(name) == parts


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2006-04-18_08_20_30.0", "2006-04-18"),
        ("20060418", "2006-04-18"),
        ("ADNI_Br_20080410151230_S13408", None),
        ("2019-13-01", None),
        ("S13408", None),
    ],
)
def test_dates_are_found_in_names(text, date):
    assert date_in(text) == date


@pytest.mark.parametrize(
    ("cell", "date"),
    [
        ("2020-06-25T10:00:00", "2020-06-25"),
        ("25.06.2020", "2020-06-25"),
        ("6/25/2020", "2020-06-25"),
        ("2020/6/5", "2020-06-05"),
        ("2020-6-15 10:30", "2020-06-15"),
        ("2020/15/6", None),
        ("5/5/2020", "2020-05-05"),
        ("20-Jun-2020", "2020-06-20"),
        ("Jun 20, 2020", "2020-06-20"),
        ("1877-06-15T13:45:30", "1877-06-15"),
        ("1877-06-45", None),
        ("05.06.2020", None),
        ("6/5/2018", None),
        ("31.02.2020", None),
        ("summer", None),
    ],
)
def test_dates_in_cells_are_read_where_they_are_certain(cell, date):
    assert date_of_cell(cell) == date


@pytest.mark.parametrize(
    "pair",
    [
        ["P1a", "P1b"],
        ["S01_01", "S01_02"],
        ["eva_1", "eva_2"],
        ["anna_2019", "anna_2021"],
        # What tools make of a scan, and copies.
        ["p1", "p1_Warped"],
        ["s01", "wms01"],
        ["c1s01", "s01"],
        ["Copy of eva", "eva"],
        ["eva", "eva (1)"],
        ["100307", "100307_3T_T1w_MPR1"],
        ["anna_MPRAGE_20200101101010_3", "anna_T1_20200101101010_5"],
        ["1000123_orig", "1000123_restored"],
    ],
)
def test_names_that_may_be_of_one_person_are_found(pair):
    assert maybe_one_person([*pair, "bob"]) == [pair]


@pytest.mark.parametrize(
    "names",
    [
        ["p1", "p2"],
        ["p_1", "p_2"],
        ["sms01", "sms02", "hc01"],
        ["study_T1_001", "study_T1_002"],
        ["2019_anna", "2019_carl", "2020_bert"],
        [f"{k}_{i}" for k in ("con", "pat") for i in range(9)],
    ],
)
def test_numbers_of_people_are_no_visits(names):
    assert maybe_one_person(names) == []


@pytest.mark.parametrize(
    ("stem", "subject", "contrast"),
    [
        ("bert_T2_20200102101010_6", "bert", "T2"),
        ("bert_localizer_1", "bert", "localizer"),
        ("ADNI_002_S_0295_MR_Field_Mapping_br_raw_1", "ADNI_002_S_0295_MR", "Field_Mapping"),
        ("IXI002-Guys-0828-DTI-00", "IXI002-Guys-0828", "DTI"),
        ("aseg", "aseg", ""),
    ],
)
def test_other_sequences_are_known_wherever_the_name_has_them(stem, subject, contrast):
    name = parse_name(stem)
    assert (name.subject, name.contrast, name.is_other) == (subject, contrast, True)


@pytest.mark.parametrize("stem", ["pd_001", "p1_t2_scan", "Scout", "dwi_study_T1_01", "anna_FLAIR_and_MPRAGE_3"])
def test_words_that_may_be_something_else_are_no_sequence(stem):
    assert not parse_name(stem).is_other


def test_names_of_uk_biobank_have_person_and_visit():
    assert split_visit("1000123_20252_3_0") == ("1000123", "3")
