# SPDX-License-Identifier: Apache-2.0
"""Random cohorts, as people name and tabulate them: nobody is lost, merged or split without a word."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volta_components.data.books import balance, note_look_alikes
from volta_components.data.layouts import LayoutOptions, Listing, Scan, reader
from volta_components.errors import InputError

NAMES = ["1", "01", "001", "2", "10", "A7", "a7", "PH-3", "anna", "Müller", "002S0295"]
SESSIONS = ["M0", "M6", "M006", "M12", "M48", "M108", "1", "2", "9", "10", "bl", "pre", "post", "A", "B", "20060418"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "cp1252"]


def scan(patient, **more):
    return Scan(patient, None, patient, Path("x.nii"), "x.nii", **more)


def test_books_name_everybody_once():
    listing = Listing("x", [scan("a"), scan("b"), scan("c")])
    for patient in "abcdef":
        listing.meet(patient)
    listing.note("choice", "b", "", "not asked for")
    listing.note("problem", "b", "", "kept without sex", "", False)
    listing.note("choice", "c", "", "not asked for")
    listing.note("problem", "c", "", "damaged")
    listing.note("skipped", "d", "", "another contrast")
    listing.note("problem", "e", "", "has a row but no scan")
    books = balance(listing, [{"patient_id": "a"}])
    assert (books.prepared, books.by_option, books.problems) == (("a",), ("b",), ("c", "d", "e", "f"))
    assert books.line() == (
        "people: 6 found = 1 prepared + 1 left out by your options (b) + 4 left out by problems (c, d, e, f)"
    )
    # Of whom nothing was said, it is said now.
    assert [f.subject for f in listing.findings if "no volume came of it" in f.reason] == ["d", "f"]


def test_ids_that_look_alike_are_named():
    listing = Listing("x")
    note_look_alikes(listing, ["sub-1", "sub-01", "sub-2"])
    assert [(f.kind, f.left_out) for f in listing.findings] == [("problem", False)]


@st.composite
def cohorts(draw):
    """People, their sessions, and how files and table write them."""
    people = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
    sessions = {
        name: draw(st.lists(st.sampled_from(SESSIONS), max_size=3, unique_by=lambda s: s.casefold())) for name in people
    }
    in_table = [name for name in people if draw(st.booleans())]
    return {
        "people": people,
        "sessions": sessions,
        "runs": {name: draw(st.integers(1, 2)) for name in people},
        "table": in_table if draw(st.booleans()) else None,
        "spell": draw(st.sampled_from(["{}", "sub-{}", "SUB_{}"])),
        "encoding": draw(st.sampled_from(ENCODINGS)),
        "separator": draw(st.sampled_from("\t,;")),
        "end": draw(st.sampled_from(["\n", "\r\n", "\r"])),
    }


def bids_files(cohort):
    for name in cohort["people"]:
        label = "".join(letter for letter in name if letter.isalnum())
        for session in cohort["sessions"][name] or [None]:
            parts = [f"sub-{label}", *([f"ses-{session}"] if session else [])]
            for run in range(cohort["runs"][name]):
                yield name, f"{'/'.join(parts)}/anat/{'_'.join(parts)}_run-{run + 1}_T1w.nii.gz"


def flat_bids_files(cohort):
    for name, file in bids_files(cohort):
        yield name, file.rsplit("/", 1)[1]


def flat_files(cohort):
    """Names that are not BIDS': a visit or a date at the end, or nothing."""
    for name in cohort["people"]:
        # Nobody can tell whether x_A and x_B are two people.
        for session in [word for word in cohort["sessions"][name] if word not in ("A", "B")] or [None]:
            word = (
                f"_{'visit' if session and session.isdigit() and len(session) < 3 else ''}{session}" if session else ""
            )
            yield name, f"{name}{word}_T1w.nii.gz"


def folder_files(cohort):
    """A folder each, with files of one name."""
    for name in cohort["people"]:
        yield name, f"{name}/mri/T1.mgz"


LAYOUTS = [("bids", bids_files), ("folder", flat_bids_files), ("folder", flat_files), ("folder", folder_files)]


@pytest.mark.parametrize(("layout", "files_of"), LAYOUTS, ids=lambda value: getattr(value, "__name__", value))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(cohort=cohorts(), sessions=st.sampled_from([("baseline",), ("all",), ("M6",)]))
def test_nobody_is_lost_merged_or_split_without_a_word(layout, files_of, cohort, sessions):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cohort"
        owner = {}
        for name, file in files_of(cohort):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
            owner[file] = name
        if cohort["table"] is not None:
            rows = [["participant_id", "sex"], *([cohort["spell"].format(name), "F"] for name in cohort["table"])]
            text = "".join(cohort["separator"].join(row) + cohort["end"] for row in rows)
            (root / "participants.tsv").write_bytes(text.encode(cohort["encoding"]))
        try:
            listing = reader(layout)(LayoutOptions(root, sessions=sessions))
        except InputError as error:
            # Only a table of nobody is refused as a whole.
            assert "no rows" in str(error) or "no column" in str(error)
            assert not cohort["table"]
            return
        check(listing, owner, root)


def check(listing, owner, root):
    items = [{"patient_id": scan.patient_id} for scan in listing.scans]
    note_look_alikes(listing, {scan.patient_id for scan in listing.scans})
    before = len(listing.findings)
    books = balance(listing, items)
    assert len(listing.findings) == before, "everybody must be accounted for by the reader itself"
    assert len(books.prepared) == len({item["patient_id"] for item in items})
    everybody = [*books.prepared, *books.by_option, *books.problems]
    assert len(everybody) == len(set(listing.people))
    # Every file is a scan, or something is said of it.
    said = {finding.file for finding in listing.findings}
    for file in owner:
        is_below = any(file.startswith(f"{place}/") for place in said)
        assert is_below or file in said or file in {scan.source for scan in listing.scans}
    # Who is who: what differs from the truth must be a problem.
    words = [f"{f.subject} {f.patient_id} {f.reason}" for f in listing.findings if f.kind in ("problem", "quirk")]
    problems = set(re.split(r"[ ,:']+", " ".join(words)))
    names = {}
    for scan in listing.scans:
        names.setdefault(scan.patient_id, set()).add(owner[scan.source])
    for patient, people in names.items():
        assert len(people) == 1 or patient in problems, f"{people} became {patient}"
    for person in set(owner.values()):
        ids = {patient for patient, people in names.items() if person in people}
        assert len(ids) <= 1 or any(patient in problems for patient in ids), f"{person} became {ids}"
    keys = [scan.key for scan in listing.scans]
    assert len(keys) == len(set(keys)) and all(key.encode() for key in keys)
