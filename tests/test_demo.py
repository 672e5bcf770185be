# SPDX-License-Identifier: Apache-2.0
"""``ANATOMIES=DIR make demo``: heads of anatomies, of which none is both pretrained and scored on."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo_anatomies import leave_out
from volta_components.data.datalist import assign_folds
from volta_components.downstream.splits import split_items
from volta_components.errors import InputError

ROOT = Path(__file__).parents[1]


def folder_of(path: Path, count: int) -> Path:
    path.mkdir()
    for number in range(count):
        (path / f"head_{number:02d}.nii.gz").touch()
    return path


@pytest.mark.parametrize("count", [15, 20, 33])
def test_no_anatomy_is_on_both_sides_and_none_is_lost(tmp_path: Path, count: int) -> None:
    names = {f"head-{number:02d}" for number in range(count)}
    scored, pretrained = leave_out(folder_of(tmp_path / "maps", count))  # what is left out is on the other side
    assert set(scored) | set(pretrained) == names and not set(scored) & set(pretrained)
    assert len(scored) == 10 and len(pretrained) >= 5


@pytest.mark.parametrize("count", [0, 14])
def test_too_few_anatomies_are_named(tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match=r"holds (no label maps|14 label maps, and the quick start needs 15)"):
        leave_out(folder_of(tmp_path / "maps", count))


def test_ten_anatomies_are_enough_for_every_run_of_the_quick_start() -> None:
    """Each fold has somebody, and 40 % of the others still are some to train on and some to validate on."""
    people = [
        {
            "patient_id": f"ANATOMY{number % 10}",
            "session": str(number),
            "sex": "FM"[number // 10 % 2],
            "label": number % 2,
        }
        for number in range(120)
    ]
    for seed in range(20):
        folds = assign_folds(people, 5, seed)
        items = [{**item, "fold": folds[item["patient_id"]]} for item in people]
        for fold in range(5):
            parts = split_items(items, fold, fraction=0.4, stratify="sex")
            assert parts.training and parts.validation and parts.scored


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A ``bin`` whose ``volta3d`` writes down the words that it gets, and fails where the data would be prepared."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "volta3d").write_text(
        f'#!/bin/sh\necho "$*" >> {shlex.quote(str(tmp_path / "log"))}\ntest "$1" = phantom\n'
    )
    (binaries / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    for path in binaries.iterdir():
        path.chmod(0o755)
    return binaries


def demo(stub: Path, **environment: str) -> tuple[list[list[str]], str]:
    """The commands that the quick start gives, and what it says of a mistake."""
    variables = {**os.environ, **environment, "PATH": f"{stub}{os.pathsep}{os.environ['PATH']}"}
    made = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "demo.sh")], env=variables, capture_output=True, text=True, check=False
    )
    assert made.returncode != 0
    log = stub.parent / "log"
    return [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else [], made.stderr


def test_without_anatomies_heads_grow_from_the_template(stub: Path) -> None:
    commands, _ = demo(stub, ANATOMIES="")
    assert [words[0] for words in commands] == ["phantom", "phantom", "prepare"]
    assert not any("--anatomies" in words or "" in words for words in commands)


def test_with_anatomies_each_data_set_has_its_own(stub: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "maps", 20)
    pretrain, scored, _ = demo(stub, ANATOMIES=str(folder))[0]
    left_out = leave_out(folder)
    for words, names in zip((pretrain, scored), left_out, strict=True):
        options = dict(zip(words[1::2], words[2::2], strict=True))
        assert options["--anatomies"] == str(folder) and options["--leave-out"] == ",".join(names)


@pytest.mark.parametrize("count", [None, 0, 3])
def test_a_folder_that_will_not_do_is_named_before_anything_is_made(
    stub: Path, tmp_path: Path, count: int | None
) -> None:
    folder = tmp_path / "maps" if count is None else folder_of(tmp_path / "maps", count)
    commands, error = demo(stub, ANATOMIES=str(folder))
    assert commands == []
    assert error.startswith(f"make demo: ANATOMIES={folder}: ") and len(error.splitlines()) == 1
