# SPDX-License-Identifier: Apache-2.0
"""What became of everybody who was found: nobody is lost without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from volta_components.data.identity import look_alikes
from volta_components.data.layouts import Listing


@dataclass(frozen=True)
class Books:
    """Everybody found, each once, by their names in the data set.

    They are prepared (with at least one volume), left out by the user's options and nothing else, or left out by
    problems: something is missing, ambiguous, broken or not understood.
    """

    prepared: tuple[str, ...]
    by_option: tuple[str, ...]
    problems: tuple[str, ...]

    def line(self) -> str:
        """The books in one line, with the first 20 names of those who are left out."""
        limit = 20

        def named(people: tuple[str, ...]) -> str:
            some = ", ".join(people[:limit]) + (f" and {len(people) - limit} more" if len(people) > limit else "")
            return f" ({some})" if people else ""

        total = len(self.prepared) + len(self.by_option) + len(self.problems)
        return (
            f"people: {total} found = {len(self.prepared)} prepared + {len(self.by_option)} left out by your options"
            f"{named(self.by_option)} + {len(self.problems)} left out by problems{named(self.problems)}"
        )


def balance(listing: Listing, items: Iterable[Mapping[str, Any]]) -> Books:
    """Say of everybody in a listing what became of them.

    Whoever is neither prepared nor left out by a finding gets one: a problem.

    Args:
        listing: what was found, with all findings.
        items: of the datalist, with ``patient_id``.
    """
    prepared = {str(item["patient_id"]) for item in items}
    for patient in prepared:
        listing.meet(patient)
    whole: list[str] = []
    by_option: list[str] = []
    problems: list[str] = []
    reasons = {(finding.patient_id, finding.kind) for finding in listing.findings if finding.left_out}
    for patient, name in sorted(listing.people.items()):
        has_problem = (patient, "problem") in reasons
        if patient in prepared:
            whole.append(name)
        elif (patient, "choice") in reasons and not has_problem:
            by_option.append(name)
        else:
            problems.append(name)
            if not has_problem:
                reason = "was found, but no volume came of it"
                listing.note("problem", name, "", reason, "please report it", True, patient)
    return Books(tuple(whole), tuple(by_option), tuple(problems))


def note_look_alikes(listing: Listing, patients: Iterable[str]) -> None:
    """Note ids that may be one person's: the same but for case, leading zeros, separators and prefixes."""
    for group in look_alikes(patients, listing.cohort):
        reason = f"{' and '.join(group)}: different people who share a fold, since their names are nearly the same"
        listing.note("problem", group[0], "", reason, "if they are one, name them alike", False, group[0])
