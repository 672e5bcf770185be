# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest

from volta_components.data.sessions import contradictions, in_order, place, spelled_alike


def ordered(*sessions):
    """Sessions in order of time, from any order of input; None where the order is not known."""
    results = {(tuple(found), bool(tied)) for part in itertools.permutations(sessions) for found, tied in [order(part)]}
    assert len(results) == 1, "the order of the input must not matter"
    found, tied = results.pop()
    return None if tied else list(found)


def order(sessions):
    return in_order(sessions, lambda session: session)


@pytest.mark.parametrize(
    "sessions",
    [
        ["ses-M48", "ses-M108"],
        ["ses-M6", "ses-M12", "ses-M48", "ses-M108"],
        ["ses-9", "ses-10"],
        ["ses-pre", "ses-post"],
        ["ses-baseline", "ses-1", "ses-2"],
        ["bl", "m06", "m12", "y2"],
        ["ses-sc", "ses-bl", "ses-m03"],
        ["screening", "baseline", "followup"],
        ["visit1", "visit2", "visit10"],
        ["w2", "m1", "m2"],
        ["ses-20060418", "ses-20070101"],
        ["1st", "2nd", "3rd"],
        ["bl", "fu1", "fu2", "fu10"],
    ],
)
def test_names_of_sessions_are_put_in_order_of_time(sessions):
    assert ordered(*sessions) == sessions


@pytest.mark.parametrize(
    "sessions",
    [
        ["ses-A", "ses-B"],
        ["pre", "baseline"],
        ["2", "ses-20240101"],
        ["left", "right"],
        ["M6", "V2"],
        ["ses-01012011", "ses-05062010"],
        ["ses-3T", "ses-7T"],
    ],
)
def test_an_order_that_names_do_not_tell_is_not_guessed(sessions):
    assert ordered(*sessions) is None


def test_dates_come_before_names_and_ages_after_them():
    scans = [("ses-2", "2019-01-01", 61), ("ses-1", "2020-01-01", 62)]
    get = [lambda s: s[0], lambda s: s[1], lambda s: s[2]]
    assert in_order(scans, *get)[0] == scans
    assert in_order(scans, get[0], lambda _: None, get[2])[0] == scans[::-1]
    letters = [("ses-B", None, 61), ("ses-A", None, 62)]
    assert in_order(letters, *get) == (letters, [])
    # A date that one of them lacks tells nothing.
    assert in_order([("ses-2", "2019-01-01", 1), ("ses-1", None, 2)], get[0], get[1])[0][0][0] == "ses-1"


def test_sessions_of_one_day_are_told_apart_by_name():
    scans = [("ses-2", "2020-01-01"), ("ses-1", "2020-01-01"), ("ses-9", "2019-01-01")]
    assert [s for s, _ in in_order(scans, lambda s: s[0], lambda s: s[1])[0]] == ["ses-9", "ses-1", "ses-2"]


@pytest.mark.parametrize(
    "spellings",
    [
        ["M6", "ses-M006", "m06", "6m", "month6"],
        ["bl", "ses-baseline", "M0", "ses-M000"],
        ["1", "ses-01", "visit1", "V1", "ses-001"],
        ["2006-04-18", "ses-20060418"],
        ["ses-A", "a"],
    ],
)
def test_spellings_of_one_session_are_alike(spellings):
    assert len({spelled_alike(name) for name in spellings}) == 1


def test_different_sessions_are_not_alike():
    names = ["M6", "M12", "1", "2", "A", "B", "bl", "sc", "post", "20060418", "20060419", "fu1", "fu2"]
    assert len({spelled_alike(name) for name in names}) == len(names)


def test_a_year_is_twelve_months():
    assert place("y1") == place("M12") == ("month", 12.0)


@pytest.mark.parametrize(
    ("scans", "wrong"),
    [
        ([("ses-01", None, 72), ("ses-02", None, 70)], ["ages"]),
        ([("ses-01", "2020-01-01", None), ("ses-02", "2019-01-01", None)], ["dates"]),
        ([("ses-01", "2019-01-01", 70), ("ses-02", "2020-01-01", 71)], []),
        ([("ses-01", None, 70.3), ("ses-02", None, 70)], []),
        ([("ses-B", None, 70), ("ses-A", None, 72)], []),
    ],
)
def test_names_that_contradict_ages_or_dates_are_found(scans, wrong):
    assert contradictions(scans, lambda s: s[0], lambda s: s[1], lambda s: s[2]) == wrong
