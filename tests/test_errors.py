# SPDX-License-Identifier: Apache-2.0
"""Messages about many bad inputs."""

from __future__ import annotations

import sys

import pytest

from volta_components.errors import InputError, check_counts, explain_input_errors, find_input_error


def test_many_bad_inputs_in_columns() -> None:
    rows = [("sub-A", "a/long/file.nii", "truncated"), ("sub-long", "b.nii", "contains NaN")]
    error = InputError.many("2 of 9 volumes cannot be used", rows, "Fetch them again.")
    assert isinstance(error, ValueError)
    assert str(error).splitlines() == [
        "2 of 9 volumes cannot be used:",
        "  sub-A     a/long/file.nii  truncated",
        "  sub-long  b.nii            contains NaN",
        "Fetch them again.",
    ]


def test_a_long_list_is_cut_and_counted() -> None:
    lines = str(InputError.many("bad", [(str(i), "x") for i in range(120)], "Remedy.", limit=3)).splitlines()
    assert lines == ["bad:", "  0  x", "  1  x", "  2  x", "  ... and 117 more", "Remedy."]


def test_counts_are_whole_and_at_least_one() -> None:
    check_counts(epochs=1, batch_size=10_000)
    with pytest.raises(InputError) as caught:
        check_counts(epochs=0, batch_size="abc", window=True, steps=1.5, fine=2)
    rows = [line.split()[0] for line in str(caught.value).splitlines()[1:-1]]
    assert rows == ["--epochs", "--batch_size", "--window", "--steps"]


def test_no_rows() -> None:
    assert str(InputError.many("nothing", [], "Remedy.")) == "nothing:\nRemedy."


def test_bad_input_deep_down_is_told_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: seen.append(error))
    explain_input_errors()
    try:
        try:
            try:
                raise InputError("a.nii: truncated; fetch it again")
            except InputError as error:
                raise RuntimeError("failed to instantiate a component") from error
        except RuntimeError:
            raise KeyError("in the middle of it")  # noqa: B904
    except KeyError as error:
        sys.excepthook(type(error), error, error.__traceback__)
        assert find_input_error(error) is error.__context__.__cause__  # type: ignore[union-attr]
    assert capsys.readouterr().err == "\nerror: a.nii: truncated; fetch it again\n"
    assert not seen
    assert find_input_error(ValueError("a fault of ours")) is None
    other = ValueError("a fault of ours")
    sys.excepthook(ValueError, other, None)
    assert seen == [other]
    assert capsys.readouterr().err == ""
