# SPDX-License-Identifier: Apache-2.0
"""What the name of a scan's file says: who, which session, which run, which contrast."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date

from volta_components.data.identity import biobank, loose

_OTHER_WORDS = """
t2w t2 flair t2star t2starw pd pdw pdt2 inplanet1 inplanet2 angio t1map t2map r1map r2starmap mtr mtrmap mts
mtsat mtvmap pdmap t1rho bold sbref cbv dwi dti adc fa md epi phasediff phase phase1 phase2 magnitude magnitude1
magnitude2 fieldmap fmap tb1afi tb1dam tb1ep tb1map tb1tfl rb1cor asl m0scan pet swi swan unit1 mp2rage megre mese irt1
vfa bet brain t2f t1c t1ce t1gd t1post t1km
"""
# Last words of names of masks and label maps.
MASKS = frozenset(
    {"aparc", "aseg", "brainmask", "defacemask", "dseg", "label", "labels", "mask", "probseg", "seg", "segmentation"}
)
# Last words of names that are no T1 scan: those of BIDS, and usual ones of other names.
OTHER_CONTRASTS = MASKS | frozenset(_OTHER_WORDS.split())
_T1 = re.compile(r"(t1w?|t1n|mprage|spgr|bravo|tfe|tfl)", re.IGNORECASE)
_T1_WORD = re.compile(r"(?<![a-z\d])(t1[a-z]*|mpr(age)?|spgr|bravo)(?![a-z\d])", re.IGNORECASE)
_SESSION = re.compile(r"[._-](ses-[A-Za-z0-9]+)(?=[._-]|$)")
# A session or run that hyphens part from the rest: ``sub-05-run-1-T1w``.
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+-(?:ses|run)-[A-Za-z0-9]", re.IGNORECASE)
_BEFORE_ENTITY = re.compile(r"-(?=(?:ses|run)-[A-Za-z0-9])", re.IGNORECASE)
_AFTER_ENTITY = re.compile(r"(_(?:ses|run)-[A-Za-z0-9]+)-", re.IGNORECASE)
# Words at the end of a name that distinguish visits and repeats of one person.
_WORD = (
    r"(?:ses|sess|session|visit|tp|timepoint|time|wave|scan|run|rep|repeat|rescan|retest|mr|bl|baseline|base|sc"
    r"|screening|fu|followup|pre|post)(?:[_. -]?\d{1,3})?"
)
_LETTER = (
    r"(?:v|m|mo|month|w|wk|week|y|yr|year|d|day|t)-?\d{1,4}|\d{1,3}(?:m|mo|months?|y|yr|years?|w|wk|weeks?|d|days?)"
)
_DATE = r"(?:19|20)\d\d-?[01]\d-?[0-3]\d(?:[T_-]?\d{6})?"
# A year is a visit only behind something with a digit: p3_2019 is, pt_2019 may be the 2019th patient.
_YEAR = re.compile(r"(.*\d.*?)[_. -]+((?:19[89]|20[0-4])\d)")
_VISIT = re.compile(rf"(.*?)((?:(?:^|[_. -]+)(?:{_WORD}|{_LETTER}|{_DATE}))+)", re.IGNORECASE)
# Sequences, in the middle of a name; a T1 is none of the others.
_SEQUENCE = re.compile(
    r"(?<![a-z\d])(t1[a-z]*|(ir-?)?f?spgr|bravo|(3d)?mpr(age)?\d*|t2[a-z]*|flair)(?![a-z\d])", re.IGNORECASE
)
_OTHER_SEQUENCE = re.compile(
    r"(?<=[_. -])((?i:locali[sz]er|scout|t2w|flair|dwi|dti|bold|asl|swi|tof|mra|field[_. -]?map(?:ping)?)|T2)"
    r"(?=[_. -]|$)"
)
# What SPM puts before a name, and Windows before that of a copy.
_MADE = re.compile(r"[smwrj]{0,4}(?:c[1-6])?|i?y_|Copy of ")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
# What may be a visit, or a number of a person.
_SHORT_END = re.compile(r"(.*\d)[a-f]|(.*[^\W_].*?)[_. -](?:\d{1,2}|(?:19|20)\d\d|[a-f])", re.IGNORECASE)


@dataclass(frozen=True)
class Name:
    """A scan's name, taken apart.

    Attributes:
        subject: who, as files of results are named; ``sub-XX`` where BIDS says so, otherwise the name without the word
            for the contrast.
        session: ``ses-XX``, or None.
        entities: the further parts of a BIDS name, such as ``{"run": "2"}``; empty for other names.
        contrast: the last word, such as ``T1w`` or ``dseg``; empty where it is none that is known.
    """

    subject: str
    session: str | None = None
    entities: dict[str, str] = field(default_factory=dict)
    contrast: str = ""

    @property
    def is_bids(self) -> bool:
        """Whether the name says by itself who the scan is of."""
        return self.subject.startswith("sub-")

    @property
    def part(self) -> str:
        """Which part of a complex image its name says it is, such as ``phase``; ``mag``, the usual one, if none."""
        return self.entities.get("part", "mag")

    @property
    def is_other(self) -> bool:
        """Whether the name says that this is no T1 scan."""
        if self.contrast:
            if self.part != "mag":
                return True
            return self.contrast.lower() != "t1w" if self.is_bids else not _T1.fullmatch(self.contrast)
        return self.subject.lower() in MASKS


def parse_name(stem: str) -> Name:
    """Take the name of a volume apart, without its suffix: ``sub-01_ses-1_run-2_T1w`` or ``anna T1``."""
    if _SUBJECT.match(stem):
        stem = _AFTER_ENTITY.sub(r"\1_", _BEFORE_ENTITY.sub("_", stem))
    words = stem.split("_")
    if re.match(r"sub-\w", words[0], re.IGNORECASE):
        parts = dict(word.split("-", 1) for word in words[1:] if "-" in word)
        session = f"ses-{value}" if (value := parts.pop("ses", "")) else None
        contrast = words[-1] if len(words) > 1 and "-" not in words[-1] and not words[-1].isdecimal() else ""
        return Name("sub-" + words[0][4:], session, parts, contrast)
    rest, last = match.groups() if (match := re.fullmatch(r"(.+?)[_. -]+([^_. -]+)", stem)) else (stem, "")
    contrast = last if _T1.fullmatch(last) or last.lower() in OTHER_CONTRASTS else ""
    subject = rest if contrast else stem
    if not contrast and (other := _OTHER_SEQUENCE.search(stem)) and not _T1_WORD.search(stem):
        subject, contrast = stem[: other.start()].rstrip("_. -"), other[0]
    found = _SESSION.search(subject)
    return Name(subject[: found.start()] if found else subject, found[1] if found else None, {}, contrast)


def split_visit(subject: str) -> tuple[str, str]:
    """A name, and the words at its end that distinguish visits of one person: ``p01`` and ``visit2`` of ``p01_visit2``.

    The name is empty where there is nothing else in it, the words where there are none.
    """
    if found := biobank(subject):
        return found
    match = _VISIT.fullmatch(subject) or _YEAR.fullmatch(subject)
    return (match[1], match[2].strip("_. -")) if match else (subject, "")


def maybe_one_person(subjects: Iterable[str]) -> list[list[str]]:
    """Groups of names that may be of one person: ``P1a`` and ``P1b``, ``eva_1`` and ``eva_2``, ``p`` and ``p_Warped``.

    Names that all have one stem are different people: ``p_1``, ``p_2``. Long rows are as well: ``con_1`` to ``con_20``.
    Not so where one name is another with something before or behind it, as tools name what they make of a scan.
    """
    names = sorted(set(subjects))
    rows: dict[str, dict[str, list[str]]] = {"end": {}, "sequence": {}, "number": {}}
    for name in names:
        end = _SHORT_END.fullmatch(name)
        rows["end"].setdefault(loose(end[1] or end[2]) if end else name, []).append(name)
        found = _SEQUENCE.search(name)
        rows["sequence"].setdefault(name[: found.start()].strip("_. -") if found else name, []).append(name)
        first = re.match(r"(?!(?:19|20)\d\d[_. -]|\dT[_. -])([^_. -]*\d[^_. -]*)[_. -]", name)
        rows["number"].setdefault(first[1] if first else name, []).append(name)
    groups = [
        group
        for kind in rows.values()
        for stem, group in kind.items()
        if stem and 1 < len(group) <= 4 and (len(kind) > 1 or re.search(r"\d", stem))
    ]
    known = frozenset(names)
    groups += [sorted((whole, name)) for name in names if (whole := _without_affix(name, known))]
    return sorted(map(list, {tuple(group) for group in groups}))


def _without_affix(name: str, known: frozenset[str]) -> str | None:
    """The one of the known names that a name is but for what a tool has put before or behind it; None for none."""
    wholes = [name[: match.start()] for match in re.finditer(r"[_. -]+", name)]
    wholes += [name[place:] for place in range(1, min(len(name), 10)) if _MADE.fullmatch(name[:place])]
    return next((whole for whole in wholes if whole in known), None)


def _date(year: str | int, month: str | int, day: str | int) -> str | None:
    """A date as ``YYYY-MM-DD``; None where there is no such day."""
    try:
        return date(int(year), int(month), int(day)).isoformat()
    except ValueError:
        return None


def date_in(text: str) -> str | None:
    """The date that a text begins with or has as a part of its own, as ``YYYY-MM-DD``: ``2006-04-18_08_20_30.0``."""
    matches = re.findall(r"(?<!\d)((?:19|20)\d\d)[-_./]?([01]\d)[-_./]?([0-3]\d)(?!\d)", text)
    return next((found for match in matches if (found := _date(*match))), None)


# Day and month in either order, and the year.
DAY_MONTH_YEAR = re.compile(r"(\d{1,2})[-./](\d{1,2})[-./]((?:19|20)\d\d)(?!\d)")


def date_of_cell(text: str) -> str | None:
    """The date in a table's cell, as ``YYYY-MM-DD``; None where it is none, or where day and month may be swapped.

    Read are ``2020-06-25``, ``2020/6/5``, ``25.06.2020``, ``6/25/2020``, ``5/5/2020``, ``20-Jun-2020``,
    ``Jun 20, 2020``, and dates that were moved to before 1926, as BIDS hides them (``1877-06-15``).
    """
    if found := date_in(text):
        return found
    text = text.strip().lower()
    if match := re.match(r"((?:1\d|20)\d\d)[-./](\d{1,2})[-./](\d{1,2})(?!\d)", text):
        return _date(*match.groups())
    if match := DAY_MONTH_YEAR.match(text):
        one, other, year = map(int, match.groups())
        pairs = {(month, day) for month, day in ((one, other), (other, one)) if month <= 12}
        return _date(year, *pairs.pop()) if len(pairs) == 1 else None
    word = r"([a-z]{3})[a-z]*"
    if match := re.match(rf"(?:(\d{{1,2}})[- .]*{word}|{word}[- .]*(\d{{1,2}}))[-,. ]+((?:19|20)\d\d)(?!\d)", text):
        month = match[2] or match[3]
        return _date(match[5], _MONTHS.index(month) + 1, match[1] or match[4]) if month in _MONTHS else None
    return None


def date_of_folders(parts: Sequence[str]) -> str | None:
    """The date in the names of folders, the innermost first."""
    return next((found for part in reversed(parts) if (found := date_in(part))), None)
