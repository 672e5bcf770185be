# SPDX-License-Identifier: Apache-2.0
"""``ANATOMIES=DIR make demo``: heads of anatomies, of which none is both pretrained and scored on."""

from __future__ import annotations

import os
import shlex
import shutil
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
def project(tmp_path: Path) -> Path:
    """The quick start's scripts in a folder of their own, and ``bin`` with a ``volta3d`` that writes down its words."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("demo.sh", "demo_anatomies.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks")
    stubs = {
        "volta3d": f'echo "$*" >> {shlex.quote(str(tmp_path / "log"))}',
        # Nothing is trained here.
        "python": f'test "$1" != benchmarks/demo_anatomies.py || exec {shlex.quote(sys.executable)} "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def demo(project: Path, anatomies: str) -> tuple[int, list[list[str]], str]:
    """Exit status, the commands that the quick start gives, and what it says of a mistake."""
    variables = {**os.environ, "ANATOMIES": anatomies, "PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    made = subprocess.run(
        ["bash", "benchmarks/demo.sh"], cwd=project, env=variables, capture_output=True, text=True, check=False
    )
    log = project / "log"
    commands = [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []
    return made.returncode, commands, made.stderr


def options(words: list[str]) -> dict[str, str]:
    return dict(zip(words[1::2], words[2::2], strict=True))


def phantoms_of(commands: list[list[str]]) -> list[dict[str, str]]:
    return [options(words) for words in commands if words[0] == "phantom"]


def sessions_of(commands: list[list[str]]) -> dict[str, set[str]]:
    """By bundle, what its cross-validations set."""
    found: dict[str, set[str]] = {}
    for words in commands:
        if words[0] == "crossval":
            found.setdefault(Path(options(words)["--bundle"]).name, set()).add(options(words).get("--set", ""))
    return found


def test_without_anatomies_heads_grow_from_the_template(project: Path) -> None:
    status, commands, error = demo(project, "")
    assert status == 0, error
    assert [("--anatomies" in given, "--leave-out" in given) for given in phantoms_of(commands)] == [(False, False)] * 2
    assert sessions_of(commands) == {"ixi_sex": {""}, "aibl_ad": {""}, "harp_hippocampus": {""}}


def test_with_anatomies_each_data_set_has_its_own(project: Path) -> None:
    """All heads of an anatomy, which is one patient, take part in the classification."""
    folder = folder_of(project / "maps", 20)
    status, commands, error = demo(project, str(folder))
    assert status == 0, error
    log = (project / "log").read_text()
    for names in leave_out(folder):
        assert f"--anatomies {folder} --leave-out {','.join(names)}\n" in log
    assert sessions_of(commands) == {"ixi_sex": {"sessions=all"}, "aibl_ad": {"sessions=all"}, "harp_hippocampus": {""}}


@pytest.mark.parametrize("count", [None, 0, 3])
def test_a_folder_that_will_not_do_is_named_before_anything_is_made(project: Path, count: int | None) -> None:
    folder = project / "maps" if count is None else folder_of(project / "maps", count)
    status, commands, error = demo(project, str(folder))
    assert status == 1 and commands == []
    assert error.startswith(f"make demo: ANATOMIES={folder}: ") and len(error.splitlines()) == 1
