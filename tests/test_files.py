# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent."""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volta_components.errors import InputError
from volta_components.files import (
    FOREIGN_SECONDS,
    FolderLock,
    atomic_path,
    partial_prefix,
    plain_cell,
    read_json,
    remove_partials,
    safe_cell,
    sha256_file,
    sha256_json,
    write_csv,
    write_json,
)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "scan.nii.gz"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.endswith(".nii.gz")  # writers choose the format by the name
        temporary.write_bytes(b"voxels")
        assert not target.exists()
    assert target.read_bytes() == b"voxels"
    assert [item.name for item in target.parent.iterdir()] == ["scan.nii.gz"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from volta_components.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    if sys.argv[2] == 'die':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoint.pt")]
    writer = subprocess.Popen([*command, "live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        (at_work,) = tmp_path.glob(".partial-*")
        assert subprocess.run([*command, "die"]).returncode == -9
        assert len({*tmp_path.glob(".partial-*")}) == 2
        with atomic_path(tmp_path / "own.json") as own:  # this process's first file there
            assert {*tmp_path.iterdir()} == {at_work, own}
        assert subprocess.run([*command, "die"]).returncode == -9
        (left,) = {*tmp_path.glob(".partial-*")} - {at_work}
        assert remove_partials(tmp_path, tmp_path / "not there") == [left]
    finally:
        writer.communicate("")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "own.json"}


def test_files_of_other_machines_are_removed_when_nobody_has_written_for_a_day(tmp_path: Path) -> None:
    names = [".partial-0000abcd-1-x.pt", ".partial-x.pt", f"{partial_prefix()}x.pt", "whole.pt"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".partial-folder").mkdir()
    (tmp_path / ".partial-folder" / "part").touch()
    assert remove_partials(tmp_path) == []
    before = time.time() - FOREIGN_SECONDS - 60
    for path in tmp_path.iterdir():
        os.utime(path, (before, before))
    assert {path.name for path in remove_partials(tmp_path)} == {*names[:2], ".partial-folder"}
    assert {path.name for path in tmp_path.iterdir()} == {*names[2:]}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_json_comes_back(tmp_path: Path) -> None:
    content = {"name": "Zürich", "spacing": [1.0, 1.0], "none": None}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Zürich" in text
    assert text.endswith("}\n")


def test_bad_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    for content in (b"{", b"\xff\xfe\x00"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.json: not valid JSON"):
            read_json(tmp_path / "bad.json")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # The example of FIPS 180-2.
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"b": 1, "a": [1, "é"]}) == hashlib.sha256('{"a":[1,"é"],"b":1}'.encode()).hexdigest()
    assert sha256_json({"b": 1, "a": 2}) == sha256_json({"a": 2, "b": 1})


def test_a_table_has_empty_cells_where_nothing_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a" / "participants.tsv"
    write_csv(path, ["subject", "age", "sex"], [["sub-1", float("nan"), None], ["sub-2", 71.5, "F, M"]], delimiter="\t")
    assert path.read_bytes() == b"subject\tage\tsex\nsub-1\t\t\nsub-2\t71.5\tF, M\n"
    write_csv(path, ["sex"], [["F, M"]])
    assert path.read_text(encoding="utf-8") == 'sex\n"F, M"\n'


@given(st.text(alphabet="=+-@\t\r'\"aZ0.5e,;\n |ö", max_size=8))
def test_cells_run_nothing_in_a_spreadsheet_and_come_back(text: str) -> None:
    cell = safe_cell(text)
    assert plain_cell(cell) == text
    if cell[:1] in tuple("=+-@\t\r\n"):
        float(cell)


def test_tables_keep_numbers_and_quote_formulas(tmp_path: Path) -> None:
    rows = [["=cmd|' /C calc'!A0", -0.5, "-0.5"], ["sub-1", float("nan"), "@x"], ["'=1", None, "-2e-3"]]
    write_csv(tmp_path / "t.csv", ["+id", "a", "b"], rows)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as stream:
        cells = list(csv.reader(stream))
    assert cells == [
        ["'+id", "a", "b"],
        ["'=cmd|' /C calc'!A0", "-0.5", "-0.5"],
        ["sub-1", "", "'@x"],
        ["''=1", "", "-2e-3"],
    ]
    assert [plain_cell(row[0]) for row in cells[1:]] == [row[0] for row in rows]


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o640, 0o750), (0o077, 0o600, 0o700), (0, 0o640, 0o750)])
def test_what_commands_write_is_not_for_others(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    """A real process, so that the files of libraries are among them."""
    words = [
        sys.executable,
        "-m",
        "volta_components.cli",
        "phantom",
        "--output",
        str(tmp_path / "out"),
        "--subjects",
        "1",
    ]
    before = os.umask(umask)
    try:
        subprocess.run(words, check=True, capture_output=True)
    finally:
        os.umask(before)
    made = list((tmp_path / "out").rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {file}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {folder}


def test_runs_of_configs_are_not_for_others_either() -> None:
    code = "import os, volta_components.bundle; print(os.umask(0))"
    before = os.umask(0o002)
    try:
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    finally:
        os.umask(before)
    assert int(done.stdout) == 0o027


def test_a_child_of_the_process_that_has_a_lock_does_not_give_it_back(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / ".lock")
    lock.take("taken")
    child = multiprocessing.get_context("fork").Process(target=lock.release)
    child.start()
    child.join()
    assert child.exitcode == 0 and lock.is_held()
    lock.release()
    assert not (tmp_path / ".lock").exists()
