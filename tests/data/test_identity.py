# SPDX-License-Identifier: Apache-2.0
import pytest

from volta_components.data.identity import (
    canonical_patient_id,
    cohort_of,
    exact_person,
    is_worldwide,
    look_alikes,
    loose_person,
    same_people,
    who,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000123_20252_2_0", "1000123"),
        ("002_S_0295", "002_S_0295"),
        ("sub-ADNI002S0295", "002_S_0295"),
        ("ADNI_002_S_0295_13722_ACPC.mnc", "002_S_0295"),
        ("ADNI_002_S_0295_MR_MP-RAGE__br_raw_20060418193538653_1_S13408_I13722.dcm", "002_S_0295"),
        ("sub-ADNI002S10295", "002_S_10295"),
        ("BraTS-GLI-00005-100", "BraTS-GLI-00005"),
        ("BraTS-GLI-00005-101-t1n.nii.gz", "BraTS-GLI-00005"),
        ("BraTS-MEN-RT-0001-1", "BraTS-MEN-RT-0001"),
        ("IXI002-Guys-0828-T1", "IXI002"),
        ("sub-IXI002", "IXI002"),
        ("sub-AIBL0123", "AIBL123"),
        ("sub-AIBL123", "AIBL123"),
        ("sub-0001", "sub-0001"),
        ("sub-PH0001", "sub-PH0001"),
    ],
)
def test_every_form_of_an_id_becomes_one(text, expected):
    assert canonical_patient_id(text) == expected


def test_different_patients_stay_different():
    ids = ["002_S_0295", "002_S_0296", "012_S_0295", "BraTS-GLI-00005", "BraTS-MET-00005", "IXI002", "IXI020", "AIBL2"]
    assert len({canonical_patient_id(text) for text in ids}) == len(ids)


def test_which_ids_mean_one_person_everywhere():
    assert is_worldwide("002_S_0295") and is_worldwide("BraTS-GLI-00005") and not is_worldwide("sub-0001")
    assert [cohort_of(text) for text in ("002_S_0295", "BraTS-PED-00001", "IXI002", "AIBL7", "sub-1")] == [
        "adni",
        "brats",
        "ixi",
        "aibl",
        None,
    ]


@pytest.mark.parametrize(
    "spellings",
    [
        ("IXI492", "ixi492", "IXI-492", "sub-IXI0492", "ixi_492_T1"),
        ("AIBL1400", "sub-aibl-1400", "aibl_01400"),
        ("BraTS-GLI-00728", "brats-gli-00728-000", "BraTS_GLI_728", "sub-BraTSGLI00728101"),
        ("OAS1_0001", "oas1-0001", "OASIS-1-0001"),
        ("BraTS2021_00005", "brats2021-00005"),
        ("002_S_0295", "002-s-0295", "adni002s0295"),
    ],
)
def test_public_ids_are_known_in_any_spelling(spellings):
    assert {canonical_patient_id(text) for text in spellings} == {spellings[0]}
    assert (
        canonical_patient_id("pixi2") == "pixi2" and canonical_patient_id("brats_training_001") == "brats_training_001"
    )


def test_ids_that_look_alike_are_found_and_others_are_not():
    assert look_alikes(["sub-1", "sub-01", "P_3", "p3"]) == [["P_3", "p3"], ["sub-01", "sub-1"]]
    assert look_alikes(["1_1", "11", "sub-10", "sub-1", "002_S_0295", "002_S_0296"]) == []
    assert look_alikes(["SUB-7667", "7667", "subject 07667", "clinic-7667", "7667.0"], "clinic") != []
    # One letter in two forms of Unicode.
    assert len(look_alikes(["sub-M\u00fcller", "sub-Mu\u0308ller"])) == 1
    assert look_alikes(["A1", "B1", "sub-A", "control-1", "patient-1"]) == []


def test_numbers_of_different_cohorts_stay_apart_and_a_public_cohort_names_its_own():
    assert loose_person("sub-002", "ixi") == loose_person("IXI002", "anything") == loose_person("2", "IXI")
    people = [
        ("sub-7", "a"),
        ("sub-7", "b"),
        ("BraTS-GLI-00007", "a"),
        ("BraTS-MET-00007", "a"),
        ("7", "ixi"),
        ("7", "aibl"),
    ]
    assert len({loose_person(*person) for person in people}) == len(people)
    # Neither is a cohort whose name only contains a public one.
    assert loose_person("7", "not_ixi") != loose_person("IXI007")


@pytest.mark.parametrize("patient", ["sub-01", "P01", "01", "sub-mine-01"])
def test_a_merged_id_is_that_of_before_the_merge(patient):
    assert who({"patient_id": f"mine-{patient}", "cohort": "mine"}) == (patient, "mine")
    assert exact_person(f"mine-{patient}", "mine") == exact_person(patient, "mine")
    assert loose_person(f"mine-{patient}", "mine") == loose_person(patient, "mine")
    assert loose_person(f"mine-{patient}", "yours") != loose_person(patient, "yours")
    assert who({"patient_id": "-5"}) == ("-5", "") and who({"patient_id": "mine-", "cohort": "mine"})[0] == "mine-"


def test_who_may_be_one_person_by_id_or_by_voxels():
    items = [
        {"patient_id": "sub-1", "cohort": "a"},
        {"patient_id": "SUB_01", "cohort": "a", "sha256": "v"},
        {"patient_id": "x", "cohort": "b", "voxels_sha256": "v", "source_sha256": "w"},
        {"patient_id": "y", "cohort": "c", "source_sha256": "w"},
        {"patient_id": "sub-01", "cohort": "c"},
    ]
    assert same_people(items) == {
        "sub-1": "SUB_01",
        "SUB_01": "SUB_01",
        "x": "SUB_01",
        "y": "SUB_01",
        "sub-01": "sub-01",
    }
