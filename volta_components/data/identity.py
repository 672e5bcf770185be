# SPDX-License-Identifier: Apache-2.0
"""Who a scan is of: one canonical patient id out of the many forms in which data sets write it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
K = TypeVar("K")

# No letter before the name of a data set, but for BIDS' own: "pixi2" is nobody of IXI.
_FIRST = r"(?:(?<![A-Za-z])|(?<=sub))"
_ADNI = re.compile(r"(?<!\d)(\d{3})[-_ ]?S[-_ ]?(\d{4,5})(?!\d)", re.IGNORECASE)
_BRATS = re.compile(
    _FIRST
    + r"BraTS[-_ ]?(?!(?:train|valid|test))([A-Za-z]+(?:[-_ ][A-Za-z]+)*)[-_ ]?(\d{5}(?=\d{3}(?!\d))|\d{1,6}(?!\d))",
    re.IGNORECASE,
)
# Of the years before 2023: BraTS2021_00000, BraTS20_Training_001, Brats18_CBICA_AAB_1.
_OLD_BRATS = re.compile(
    r"BraTS[-_ ]?((?:20)?(?:1[3-9]|2[0-2])(?:[-_ ][A-Za-z0-9]+)*[-_ ]\d+)(?=[-_. ]|$)", re.IGNORECASE
)
_OASIS = re.compile(_FIRST + r"OAS(?:IS)?[-_ ]?([1-4])[-_ ]?(\d{4})(?!\d)", re.IGNORECASE)
_IXI = re.compile(_FIRST + r"IXI[-_ ]?0*(\d{1,4})(?!\d)", re.IGNORECASE)
_AIBL = re.compile(_FIRST + r"AIBL[-_ ]?(\d+)", re.IGNORECASE)
_ANATOMY = re.compile(r"ANATOMY[0-9a-f]{12}")
# UK Biobank: person, field, visit, number.
_BIOBANK = re.compile(r"(\d{7})_\d{4,5}_(\d)_\d")
_SUBJECT = re.compile(r"^(?:(?:subject|subj|sub)(?=[\W\d_])[\W_]*)+")


def canonical_patient_id(text: str) -> str:
    """Bring any form of a patient's id to one.

    ====================================================================== =================
    written as                                                             canonical
    ====================================================================== =================
    ``sub-ADNI002S0295``, ``002_S_0295``, ``ADNI_002_S_0295_13722_ACPC``    ``002_S_0295``
    ``BraTS-GLI-00005-100``, ``brats_gli_5``, ``sub-BraTSGLI00005100``     ``BraTS-GLI-00005``
    ``BraTS2021_00005_t1``, ``Brats18_CBICA_AAB_1``                        ``BraTS2021_00005``, ``BraTS18_CBICA_AAB_1``
    ``OAS1_0001_MR2``, ``sub-OASIS10001``                                  ``OAS1_0001``
    ``sub-IXI002``, ``IXI002-Guys-0828-T1``, ``ixi-2``                     ``IXI002``
    ``sub-AIBL0123``, ``aibl_123``                                         ``AIBL123``
    ``1000123_20252_2_0`` (UK Biobank: person, field, visit, number)       ``1000123``
    anything else, such as ``sub-0001``                                    as it is
    ====================================================================== =================

    Time points of one patient come out the same, and so does one patient's scan in two data sets (HarP's are ADNI's).

    Args:
        text: an id, or a file or folder name that holds one.
    """
    if match := _ADNI.search(text):
        return f"{match[1]}_S_{match[2]}"
    if match := _BRATS.search(text):
        task = re.sub(r"[_ ]", "-", match[1].upper()).replace("GOAT", "GoAT")
        return f"BraTS-{task}-{int(match[2]):0{4 if task.endswith('-RT') else 5}d}"
    if match := _OLD_BRATS.search(text):
        return "BraTS" + re.sub(r"[- ]", "_", match[1])
    if match := _OASIS.search(text):
        return f"OAS{match[1]}_{match[2]}"
    if match := _IXI.search(text):
        return f"IXI{int(match[1]):03d}"
    if match := _AIBL.search(text):
        return f"AIBL{int(match[1])}"
    if person := biobank(text):
        return person[0]
    return text


def biobank(text: str) -> tuple[str, str] | None:
    """Person and visit of a name as UK Biobank gives it (``1000123_20252_2_0``); None for any other."""
    match = _BIOBANK.fullmatch(text)
    return (match[1], match[2]) if match else None


_COHORTS = {"adni": (_ADNI,), "brats": (_BRATS, _OLD_BRATS), "ixi": (_IXI,), "aibl": (_AIBL,), "oasis": (_OASIS,)}


def is_worldwide(patient_id: str) -> bool:
    """Whether a canonical id names one patient whatever the data set.

    ``sub-0001`` does not; ``002_S_0295`` does, and so does the id of the anatomy that a phantom grew from.
    """
    return cohort_of(patient_id) is not None or _ANATOMY.fullmatch(patient_id) is not None


def unfit_id(ids: Iterable[object]) -> str | None:
    """Why one of a scan's ids cannot be taken, or None: ids go into tables, names of files and configs.

    Control characters garble the former, and MONAI runs what begins with ``$`` in the latter.
    """
    for text in map(str, ids):
        if "$" in text:
            return f"id {text!r} has a $"
        if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in text):
            return f"id {text!r} has control characters"
    return None


def cohort_of(patient_id: str) -> str | None:
    """The public data set that a canonical id belongs to, in lower case, or None if the id does not show it."""
    names = (name for name, patterns in _COHORTS.items() if any(each.fullmatch(patient_id) for each in patterns))
    return next(names, None)


def is_old_brats(patient_id: str) -> bool:
    """Whether a canonical id is of BraTS before 2023, whose patients have other names since then."""
    return _OLD_BRATS.fullmatch(patient_id) is not None


def own_id(patient_id: str, cohort: str = "") -> str:
    """The canonical id without the cohort's name, which ``volta3d merge`` puts before ids that clash."""
    canonical = canonical_patient_id(patient_id)
    return (cohort and canonical.removeprefix(f"{cohort}-")) or canonical


def exact_person(patient_id: str, cohort: str = "") -> str:
    """Who somebody is, among all data sets: the canonical id, with the cohort where ids are unique only within it."""
    own = own_id(patient_id, cohort)
    return own if not cohort or is_worldwide(own) else f"{cohort}/{own}"


def are_phantoms(items: Iterable[Mapping[str, Any]], cohort: str) -> bool:
    """Whether all items are of phantoms, by the names of their cohorts; ``cohort`` is that of items without one."""
    cohorts = {str(item.get("cohort") or cohort).lower() for item in items}
    return bool(cohorts) and all("phantom" in name for name in cohorts)


def who(item: Mapping[str, Any]) -> tuple[str, str]:
    """Patient (see ``own_id``) and cohort of an item; an empty text where the cohort is not known."""
    cohort = str(item.get("cohort") or "")
    return own_id(str(item["patient_id"]), cohort), cohort


def loose_person(patient_id: str, cohort: str = "") -> str:
    """The same for everybody who may be one person by their ids: without case, separators, prefixes and zero padding.

    ``sub-07`` and ``7`` of a cohort come out the same, and so do ``IXI007`` and ``7`` of the cohort ``ixi``; numbers
    of different cohorts do not.
    """
    canonical = own_id(patient_id, cohort)
    if not is_worldwide(canonical):
        # The id as it would be under the name of its cohort, which may be a public one.
        named = canonical_patient_id(f"{cohort}-{_bare(canonical)}")
        where = cohort_of(named)
        if where is None or not cohort.casefold().startswith(where[:3]):
            place = loose(cohort)
            return f"{place}/{loose(canonical).removeprefix(f'{place} ')}"
        canonical = named
    return loose(canonical)


def loose(text: str) -> str:
    """An id without what spreadsheets and people change in it: case, leading zeros, separators, ``sub-``.

    A separator counts only between two numbers: ``1_1`` is not ``11``.
    """
    plain = re.sub(r"\.0$", "", _bare(canonical_patient_id(text)))
    joined = re.sub(r"(?<=[^\W\d_])[\W_]+(?=[^\W\d_])", "", plain)
    runs = re.findall(r"\d+|[^\W\d_]+", joined)
    return " ".join(str(int(run)) if run.isdecimal() else run for run in runs) or plain


def _bare(text: str) -> str:
    """Lower case, in one Unicode form, without the word for a subject in front."""
    return _SUBJECT.sub("", unicodedata.normalize("NFKC", text).casefold())


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by what ``key`` says of them; groups, and the items of each, in the order in which they come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def look_alikes(patients: Iterable[str], cohort: str = "") -> list[list[str]]:
    """Ids of a cohort that are one but for case, leading zeros, separators and prefixes: ``sub-1`` and ``sub-01``."""
    groups = grouped(sorted(set(patients)), lambda patient: loose_person(patient, cohort))
    return [group for group in groups.values() if len(group) > 1]


def voxel_hashes(item: Mapping[str, Any]) -> set[str]:
    """Hashes of an item's voxels, source and prepared file: equal ones are of one scan, whatever the ids."""
    return {str(item[key]) for key in ("voxels_sha256", "source_sha256", "sha256") if item.get(key)}


def same_people(items: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Who may be one person: ids that look alike within a cohort, and ids of the same voxels.

    Args:
        items: of datalists, with ``patient_id`` and, where known, ``cohort`` and hashes.

    Returns:
        For each ``patient_id`` the first one, in the order of the alphabet, of those that may be the same person.
    """
    from scipy.cluster.hierarchy import DisjointSet  # which takes a while to import

    people = DisjointSet()
    holder: dict[str, str] = {}
    for item in items:
        patient = item["patient_id"]
        people.add(patient)
        for key in (f"id {loose_person(*who(item))}", *voxel_hashes(item)):
            people.merge(patient, holder.setdefault(key, patient))
    first = {patient: min(group, key=str) for group in people.subsets() for patient in group}
    return {patient: first[patient] for patient in people}
