# SPDX-License-Identifier: Apache-2.0
"""Messages about many bad inputs."""

from __future__ import annotations

import errno
import sqlite3
import sys
from multiprocessing import Pipe
from pathlib import Path

import pytest

from volta_components.errors import (
    InputError,
    check_counts,
    describe,
    explain_input_errors,
    find_fault,
    find_input_error,
    find_unknown_argument,
)
from volta_components.files import atomic_path
from volta_components.method.masking import GroupMask


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
    # What PyTorch says of an error in a loading process, here of one that a transform of MONAI's has wrapped.
    traceback = (
        "Caught RuntimeError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n  File ...\n"
        "volta_components.data.unusable.UnusableVolume: /data/a.nii: truncated; fetch it again\n\nThe above exception "
        "was the direct cause of the following exception:\n\nTraceback (most recent call last):\nRuntimeError: applying"
    )
    assert str(find_input_error(RuntimeError(traceback))) == "/data/a.nii: truncated; fetch it again"
    assert find_input_error(RuntimeError(traceback.replace("volta_components.data.unusable.", ""))) is None
    other = ValueError("a fault of ours")
    sys.excepthook(ValueError, other, None)
    assert seen == [other]
    assert capsys.readouterr().err.startswith(
        "\nerror: ValueError: a fault of ours; this was not foreseen: please report"
    )


def test_a_misspelt_argument_of_a_component_is_the_users() -> None:
    """As MONAI wraps what ``--views#mask#cells 3`` gives."""

    def unknown_of(target: str) -> BaseException:
        try:
            try:
                GroupMask(**{"coverage": 0.5, "cells": 3})
            except TypeError as error:
                raise RuntimeError(f"Failed to instantiate component '{target}' with keywords: cells") from error
        except RuntimeError as error:
            return error

    said = "GroupMask has no cells; check its spelling, in the config files and on the command line"
    assert describe(unknown_of("volta_components.method.masking.GroupMask")) == (said, True)
    # What a component gives to another one is a fault of ours.
    assert find_unknown_argument(unknown_of("volta_components.method.views.ViewGenerator")) is None
    assert find_unknown_argument(TypeError("GroupMask.__init__() got an unexpected keyword argument 'cells'")) is None


def test_it_is_explained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    explain_input_errors()
    first = sys.excepthook
    explain_input_errors()
    assert sys.excepthook is first


def wrapped(error: BaseException) -> BaseException:
    """As ``monai.bundle`` raises it."""
    try:
        try:
            raise error
        except BaseException as inner:
            raise RuntimeError("Failed to evaluate ConfigExpression") from inner
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/checkpoint.pt"), "/runs/checkpoint.pt: no space left"),
        (OSError(errno.EROFS, "Read-only file system", "/runs"), "/runs: read-only file system; make it writable"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs"), "/runs: permission denied; make it writable"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/gone/a.nii"), "/gone/a.nii: no such file; put it back"),
        (sqlite3.OperationalError("database or disk is full"), "a database cannot grow, as its disk is full; free sp"),
        (MemoryError(), "the memory is full; free some"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "(DataLoader worker (pid 7) is killed",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "the GPU's memory is full; lower --batch_size"),
    ],
)
def test_faults_of_the_machine_have_a_remedy(error: BaseException, words: str) -> None:
    message, is_known = describe(wrapped(error))
    assert is_known
    assert words in message
    assert "Failed to evaluate" not in message


def test_what_was_not_foreseen_is_named_by_its_cause() -> None:
    message, is_known = describe(wrapped(KeyError("colour")))
    assert not is_known
    assert message.startswith("KeyError: 'colour'; ")
    assert find_fault(RuntimeError("Caught ValueError in DataLoader worker process 0.")) is None
    assert find_fault(ConnectionResetError("of a server")) is None
    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(EOFError) as caught:  # what a loading process leaves that dies while it hands a volume over
        ours.recv()
    assert "a process that loads volumes has ended (EOFError)" in str(find_fault(caught.value))


def test_a_file_that_could_not_be_written_is_named(tmp_path: Path) -> None:
    """Writing fails without saying in which file."""
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "checkpoint.pt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (find_fault(caught.value) or "").startswith(f"{tmp_path}/checkpoint.pt: no space left on device; free space")
