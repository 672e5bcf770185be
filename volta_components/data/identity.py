# SPDX-License-Identifier: Apache-2.0
"""Who a scan is of: one canonical patient id out of the many forms in which data sets write it."""

from __future__ import annotations

import re

_ADNI = re.compile(r"(?<!\d)(\d{3})_?S_?(\d{4,5})(?!\d)")
_BRATS = re.compile(r"BraTS-([A-Za-z]+(?:-[A-Za-z]+)*)-(\d{4,6})(?!\d)", re.IGNORECASE)
# Of the years before 2023: BraTS2021_00000, BraTS20_Training_001, Brats18_CBICA_AAB_1.
_OLD_BRATS = re.compile(r"BraTS((?:20)?(?:1[3-9]|2[0-2])(?:_[A-Za-z0-9]+)*_\d+)(?=[_.]|$)", re.IGNORECASE)
_OASIS = re.compile(r"OAS(?:IS)?([1-4])_?(\d{4})(?!\d)")
_IXI = re.compile(r"IXI(\d{1,4})(?!\d)")
_AIBL = re.compile(r"AIBL[-_]?(\d+)")
_ANATOMY = re.compile(r"ANATOMY[0-9a-f]{12}")


def canonical_patient_id(text: str) -> str:
    """Bring any form of a patient's id to one.

    ====================================================================== =================
    written as                                                             canonical
    ====================================================================== =================
    ``sub-ADNI002S0295``, ``002_S_0295``, ``ADNI_002_S_0295_13722_ACPC``    ``002_S_0295``
    ``BraTS-GLI-00005-100``                                                ``BraTS-GLI-00005``
    ``BraTS2021_00005_t1``, ``Brats18_CBICA_AAB_1``                        ``BraTS2021_00005``, ``BraTS18_CBICA_AAB_1``
    ``OAS1_0001_MR2``, ``sub-OASIS10001``                                  ``OAS1_0001``
    ``sub-IXI002``, ``IXI002-Guys-0828-T1``                                ``IXI002``
    ``sub-AIBL0123``                                                       ``AIBL123``
    anything else, such as ``sub-0001``                                    as it is
    ====================================================================== =================

    Time points of one patient come out the same, and so does one patient's scan in two data sets (HarP's are ADNI's).

    Args:
        text: an id, or a file or folder name that holds one.
    """
    if match := _ADNI.search(text):
        return f"{match[1]}_S_{match[2]}"
    if match := _BRATS.search(text):
        return f"BraTS-{match[1].upper().replace('GOAT', 'GoAT')}-{match[2]}"
    if match := _OLD_BRATS.search(text):
        return f"BraTS{match[1]}"
    if match := _OASIS.search(text):
        return f"OAS{match[1]}_{match[2]}"
    if match := _IXI.search(text):
        return f"IXI{int(match[1]):03d}"
    if match := _AIBL.search(text):
        return f"AIBL{int(match[1])}"
    return text


_COHORTS = {"adni": (_ADNI,), "brats": (_BRATS, _OLD_BRATS), "ixi": (_IXI,), "aibl": (_AIBL,), "oasis": (_OASIS,)}


def is_worldwide(patient_id: str) -> bool:
    """Whether a canonical id names one patient whatever the data set.

    ``sub-0001`` does not; ``002_S_0295`` does, and so does the id of the anatomy that a phantom grew from.
    """
    return cohort_of(patient_id) is not None or _ANATOMY.fullmatch(patient_id) is not None


def cohort_of(patient_id: str) -> str | None:
    """The public data set that a canonical id belongs to, in lower case, or None if the id does not show it."""
    for name, patterns in _COHORTS.items():
        if any(pattern.fullmatch(patient_id) for pattern in patterns):
            return name
    return None


def is_old_brats(patient_id: str) -> bool:
    """Whether a canonical id is of BraTS before 2023, whose patients have other names since then."""
    return _OLD_BRATS.fullmatch(patient_id) is not None
