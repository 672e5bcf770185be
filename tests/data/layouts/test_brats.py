# SPDX-License-Identifier: Apache-2.0
import pytest

from volta_components.data.layouts.brats import read
from volta_components.data.layouts.common import LayoutOptions


def listed(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return read(LayoutOptions(root, sessions=("all",)))


def found(listing, kind="problem"):
    return {f.subject: f.reason for f in listing.findings if f.kind == kind}


@pytest.mark.parametrize(
    ("file", "patient", "session"),
    [
        ("BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz", "BraTS-GLI-00005", "100"),
        ("BraTS-GLI-00005-101/BraTS-GLI-00005-101-t1n.nii", "BraTS-GLI-00005", "101"),
        ("a/b/BraTS-MET-00001-000/BraTS-MET-00001-000-t1n.nii.gz", "BraTS-MET-00001", "000"),
        ("BraTS-GoAT-00000/BraTS-GoAT-00000-t1n.nii.gz", "BraTS-GoAT-00000", None),
        ("BraTS-PED-00001-000/BraTS-PED-00001-000_t1n.nii.gz", "BraTS-PED-00001", "000"),
        ("BraTS-GLI-00009-000/BraTS-GLI-00009-000-t1n.nii.gz/00000057_brain_t1.nii", "BraTS-GLI-00009", "000"),
        ("brats-ssa-00002-000/brats-ssa-00002-000-t1n.nii.gz", "BraTS-SSA-00002", "000"),
        ("BraTS2021_00000/BraTS2021_00000_t1.nii.gz", "BraTS2021_00000", None),
        ("BraTS20_Training_001/BraTS20_Training_001_t1.nii", "BraTS20_Training_001", None),
        ("Brats18_CBICA_AAB_1/Brats18_CBICA_AAB_1_t1.nii.gz", "BraTS18_CBICA_AAB_1", None),
    ],
)
def test_cases_of_every_year_and_spelling(tmp_path, file, patient, session):
    listing = listed(tmp_path, file)
    assert [(scan.patient_id, scan.session) for scan in listing.scans] == [(patient, session)]
    assert not found(listing)


@pytest.mark.parametrize(
    ("case", "file", "reason"),
    [
        ("BraTS-MEN-RT-0000-1", "BraTS-MEN-RT-0000-1_t1c.nii.gz", "has no t1n (only t1c)"),
        ("BraTS-GLI-00010-000", None, "has no t1n (its folder is empty)"),
        ("BraTS-GLI-00011-000", "00000057_brain_t1.nii", "has no t1n (but 00000057_brain_t1.nii)"),
        ("BraTS2021_00001", "BraTS2021_00001_t1ce.nii.gz", "has no t1n (only t1ce)"),
    ],
)
def test_cases_without_a_native_t1_are_named(tmp_path, case, file, reason):
    (tmp_path / case).mkdir()
    whole = "BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz"
    listing = listed(tmp_path, whole, *([f"{case}/{file}"] if file else []))
    assert found(listing) == {case: reason} and len(listing.scans) == 1


def test_files_that_are_not_understood_are_named(tmp_path):
    listing = listed(tmp_path, "BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz", "patient7/t1.nii.gz")
    assert found(listing) == {"patient7": "is not named as BraTS names images"}


def test_years_that_name_the_same_people_differently_are_not_mixed_silently(tmp_path):
    files = ["BraTS2021_00000/BraTS2021_00000_t1.nii.gz", "BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz"]
    listing = listed(tmp_path, *files)
    assert len(listing.scans) == 2 and "whose patients have other names since then" in found(listing)["BraTS2021_00000"]


def test_a_file_in_the_folder_of_another_case_is_named(tmp_path):
    listing = listed(tmp_path, "BraTS-GLI-00014-000/BraTS-GLI-00015-000-t1n.nii.gz")
    assert found(listing)["BraTS-GLI-00015-000"] == "lies in the folder of BraTS-GLI-00014-000"
