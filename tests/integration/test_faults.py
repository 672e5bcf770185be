# SPDX-License-Identifier: Apache-2.0
"""Trainings in real processes that are broken off, damaged, exchanged, locked out: each ends with one error.

The faults are those of ``benchmarks/torture.py --faults``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prepared import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import torture
from torture_faults import FAULTS, Place, judge

pytestmark = pytest.mark.slow

CHOSEN = [name for name in FAULTS if name.startswith(("train", "resume"))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, weights and overlays; nobody may change them."""
    folder = tmp_path_factory.mktemp("torture") / "inputs"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW")]:
            patch.delenv(name)
        for name, value in torture.environment().items():
            patch.setenv(name, value)
        torture.set_up(folder)
        yield folder


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_ends_with_one_error_that_names_it(inputs: Path, tmp_path: Path, name: str) -> None:
    verdict = judge(name, FAULTS[name], Place(inputs, tmp_path / "fault"))
    assert not verdict.problem, verdict


def test_there_are_enough_faults() -> None:
    assert len(FAULTS) >= 60 and len(CHOSEN) >= 20


def test_a_fault_that_is_not_named_would_be_seen(tmp_path: Path) -> None:
    """Otherwise the tests above would say nothing."""
    place = Place(tmp_path, tmp_path / "fault")
    assert "status 0" in judge("a", lambda _: (0, "error: a.nii: cut", "a.nii"), place).problem
    assert "no last line" in judge("b", lambda _: (1, "Traceback\nValueError", "a.nii"), place).problem
    assert "is not named" in judge("c", lambda _: (1, "error: something", "a.nii"), place).problem
    assert "not foreseen" in judge("d", lambda _: (1, "error: a.nii; this was not foreseen", "a.nii"), place).problem
    assert "not foreseen" in judge("e", lambda _: (1, "error: a.nii\nTraceback", "a.nii"), place).problem
    assert not judge("f", lambda _: (1, "Traceback\nerror: a.nii: cut", "a.nii"), place).problem
