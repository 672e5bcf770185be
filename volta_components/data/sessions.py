# SPDX-License-Identifier: Apache-2.0
"""Sessions in the order of time, and one session in its several spellings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date as Day
from typing import TypeVar

from volta_components.data.names import date_in

T = TypeVar("T")

# How many of them are a month.
_UNITS = {"m": 1.0, "w": 12 / 52, "d": 12 / 365, "y": 12.0}
_COUNTS = "ses sess session v visit tp timepoint t time wave scan run mr exam st nd rd th"
_SPELLINGS = {
    **dict.fromkeys(("m", "mo", "mon", "mth", "month", "months"), "m"),
    **dict.fromkeys(("w", "wk", "week", "weeks"), "w"),
    **dict.fromkeys(("d", "day", "days"), "d"),
    **dict.fromkeys(("y", "yr", "year", "years"), "y"),
    **dict.fromkeys(_COUNTS.split(), "number"),
}
_BEFORE = "bl bsl base baseline pre preop presurgery pretreatment before initial init first entry"
_AFTER = "post postop postsurgery posttreatment after fu followup last final end"
_FIRST = {**dict.fromkeys(("sc", "scr", "screen", "screening"), 0.0), **dict.fromkeys(_BEFORE.split(), 1.0)}
_LAST = frozenset(_AFTER.split())

# Where on which scale a session lies: sessions on one scale can be put in order.
Place = tuple[str, float]
Rank = tuple[float, float]


def place(session: str) -> Place | None:
    """Where in time the name of a session is: ``("month", 6)`` for ``ses-M06``; None where it does not say so.

    Scales: ``first`` (screening, baseline, pre), ``month`` (also years, weeks, days), ``number`` (2, v2, visit 2),
    ``date`` (days), ``last`` (post, follow-up), or the word before a number.
    """
    text = re.sub(r"^ses[-_]", "", session.strip().casefold())
    if day := date_in(text):
        return "date", float(day.replace("-", ""))
    text = re.sub(r"[^a-z0-9.]", "", text)
    if text in _FIRST:
        return "first", _FIRST[text]
    if text in _LAST:
        return "last", 0.0
    # Dates in another order, and strengths of the field, are no numbers of sessions.
    if re.fullmatch(r"\d{6}|\d{8}|(1|1\.5|15|3|7)t", text):
        return None
    match = re.fullmatch(r"([a-z]*)(\d+(?:\.\d+)?)([a-z]*)", text)
    if match is None:
        return None
    before, number, after = _SPELLINGS.get(match[1], match[1]), float(match[2]), _SPELLINGS.get(match[3], match[3])
    unit = before if before in _UNITS and not after else after if after in _UNITS and before in ("", "number") else None
    if unit:
        return "month", round(number * _UNITS[unit], 3)
    words = {before, after} - {"", "number"}
    return "|".join(sorted(words)) or "number", number


def months_since_baseline(session: str) -> float | None:
    """Months by a session's name: 0 for ``bl`` and ``screening``, 24 for ``m24``; None where it does not say so."""
    scale, number = place(session) or ("", 0.0)
    return {"first": 0.0, "month": number}.get(scale)


def years_between(start: str, end: str) -> float:
    """Years from one date (``YYYY-MM-DD``) to another."""
    return (Day.fromisoformat(end[:10]) - Day.fromisoformat(start[:10])).days / 365.25


def spelled_alike(session: str) -> Place | str:
    """What the spellings of one session have in common: ``M6``, ``ses-M006`` and ``m06``; ``bl`` and ``M0``."""
    found = place(session)
    if found is None:
        return re.sub(r"[^\w]|_", "", re.sub(r"^ses[-_]", "", session.casefold()))
    return ("month", 0.0) if found == ("first", 1.0) else found


def in_order(
    items: Iterable[T],
    session: Callable[[T], str | None],
    date: Callable[[T], str | None] = lambda _: None,
    age: Callable[[T], float | None] = lambda _: None,
) -> tuple[list[T], list[list[T]]]:
    """One patient's scans from the first to the last, and groups of those whose order is not known.

    Dates (``YYYY-MM-DD``) decide if all scans have one; else the names of the sessions; else the ages (years). If none
    of these decides, scans are in the order of their sessions' names.
    """

    def dates(group: Sequence[T]) -> list[Rank | None]:
        return [(0.0, float(day[:10].replace("-", ""))) if (day := date(item)) else None for item in group]

    def names(group: Sequence[T]) -> list[Rank | None]:
        places = [place(name) if (name := session(item)) else None for item in group]
        scales = {found[0] for found in places if found} - {"first", "last"}
        ends = {"first": 0.0, "last": 2.0}
        return [(ends.get(found[0], 1.0), found[1]) if found and len(scales) < 2 else None for found in places]

    def ages(group: Sequence[T]) -> list[Rank | None]:
        return [None if (years := age(item)) is None else (0.0, years) for item in group]

    groups = [sorted(items, key=lambda item: session(item) or "")]
    for ranks in (dates, names, ages):
        groups = [part for group in groups for part in _parted(group, ranks(group))]
    return [item for group in groups for item in group], [group for group in groups if len(group) > 1]


def contradictions(
    items: Iterable[T],
    session: Callable[[T], str | None],
    date: Callable[[T], str | None],
    age: Callable[[T], float | None],
) -> list[str]:
    """What says that one patient's sessions are not in the order of their names: ``dates``, ``ages``, both or none.

    Ages may differ by half a year, for they may be rounded.
    """
    placed = [(found, item) for item in items if (found := place(session(item) or ""))]
    wrong: set[str] = set()
    for ((scale, number), one), ((other_scale, later), other) in itertools.permutations(placed, 2):
        if scale != other_scale or number >= later:
            continue
        days, years = (date(one), date(other)), (age(one), age(other))
        if days[0] and days[1] and days[0] > days[1]:
            wrong.add("dates")
        if years[0] is not None and years[1] is not None and years[0] > years[1] + 0.5:
            wrong.add("ages")
    return sorted(wrong)


def _parted(group: list[T], ranks: Sequence[Rank | None]) -> list[list[T]]:
    """A group in order of ranks, parted where these differ; as it is where one has none."""
    parts: dict[Rank, list[T]] = {}
    for item, rank in zip(group, ranks, strict=True):
        if rank is None:
            return [group]
        parts.setdefault(rank, []).append(item)
    return [parts[rank] for rank in sorted(parts)]
