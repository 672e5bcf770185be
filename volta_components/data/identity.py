# SPDX-License-Identifier: Apache-2.0
"""Who a scan is of: one canonical patient id out of the many forms in which data sets write it."""

from __future__ import annotations

import re

_ADNI = re.compile(r"(?<!\d)(\d{3})_?S_?(\d{4,5})(?!\d)")
_BRATS = re.compile(r"(BraTS-[A-Za-z]+(?:-[A-Za-z]+)*-\d{4,6})(?:-(\d{3}))?(?!\d)")
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
        return match[1]
    if match := _IXI.search(text):
        return f"IXI{int(match[1]):03d}"
    if match := _AIBL.search(text):
        return f"AIBL{int(match[1])}"
    return text


def is_worldwide(patient_id: str) -> bool:
    """Whether a canonical id names one patient whatever the data set.

    ``sub-0001`` does not; ``002_S_0295`` does, and so does the id of the anatomy that a phantom grew from.
    """
    return any(pattern.fullmatch(patient_id) for pattern in (_ADNI, _BRATS, _IXI, _AIBL, _ANATOMY))


def cohort_of(patient_id: str) -> str | None:
    """The public data set that a canonical id belongs to, in lower case, or None when the id does not tell."""
    for name, pattern in (("adni", _ADNI), ("brats", _BRATS), ("ixi", _IXI), ("aibl", _AIBL)):
        if pattern.fullmatch(patient_id):
            return name
    return None
