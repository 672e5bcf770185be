# SPDX-License-Identifier: Apache-2.0
import pytest

from volta_components.data.identity import canonical_patient_id, cohort_of, is_worldwide


@pytest.mark.parametrize(
    ("text", "expected"),
    [
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
