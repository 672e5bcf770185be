# SPDX-License-Identifier: Apache-2.0
"""``volta3d segment`` and ``embed`` as commands: what they say, stopped and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from csv_rows import read_rows
from inference_bundles import embed, segment

from volta_components.cli import main
from volta_components.errors import InputError


def test_commands_run_from_within_a_bundle_and_tell_what_they_made(
    encoder_bundle: Path,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(encoder_bundle)
    hook = sys.excepthook
    assert main(["embed", "--source", str(scans), "--output", str(tmp_path / "out")]) == 0
    assert sys.excepthook is hook
    out, err = capsys.readouterr()
    assert out.strip() == f"2 embeddings in {tmp_path / 'out' / 'embeddings.csv'} and .npz"
    assert "reading" in err and "2/2" in err  # progress, and nothing of logging
    assert "WARNING" not in out + err
    assert main(["embed", "--source", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("volta3d embed: 1 of the given sources are not there:\n")


@pytest.mark.slow
def test_ctrl_c_ends_a_real_process_with_one_line(encoder_bundle: Path, raw: Path, tmp_path: Path) -> None:
    words = [
        "embed",
        "--source",
        str(raw / "scans"),
        "--output",
        str(tmp_path / "out"),
        "--bundle",
        str(encoder_bundle),
    ]
    command = [str(Path(sys.executable).with_name("volta3d")), *words, "--attention"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while "Iteration" not in (tmp_path / "log.txt").read_text() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(60) == 130
    output = (tmp_path / "log.txt").read_text()
    assert output.count("volta3d embed: interrupted") == 1
    assert "Traceback" not in output and "exception" not in output
    assert not list((tmp_path / "out").rglob(".partial-*"))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    encoder_bundle: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed([raw / "scans"], tmp_path / "whole", bundle=encoder_bundle, attention=True) == 0
    words = ["embed", "--source", str(raw / "scans"), "--output", str(tmp_path / "broken"), "--attention"]
    command = [str(Path(sys.executable).with_name("volta3d")), *words, "--bundle", str(encoder_bundle)]
    journal = tmp_path / "broken" / "embeddings.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not journal.is_file() or len(journal.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "broken" / "embeddings.csv").is_file()
    done = len(journal.read_text().splitlines())
    first = sorted((tmp_path / "broken" / "attention").glob("*.nii.gz"))[0]
    written = first.stat().st_mtime_ns
    capsys.readouterr()
    assert embed([raw / "scans"], tmp_path / "broken", bundle=encoder_bundle, attention=True) == 0
    assert f"{done} of 144 volumes are done already" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written
    for name in ("embeddings.csv", "embeddings.npz"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "broken" / "attention").glob("*.nii.gz"))) == 144


def test_only_what_is_missing_is_segmented(
    sides_bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"

    def run() -> tuple[str, list[dict[str, str]], dict[str, int]]:
        assert segment([scans], output, bundle=sides_bundle) == 0
        masks = {path.name: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
        return capsys.readouterr().out, read_rows(output / "volumes.csv"), masks

    said, rows, before = run()
    assert "done already" not in said and len(rows) == len(before) == 2
    said, again, after = run()
    assert "2 of 2 volumes are done already" in said and again == rows and after == before
    # A mask that is gone and a scan that is new are made; the table has all, in the scans' order.
    missing = sorted(before)[0]
    (output / missing).unlink()
    new = scans / "sub-a_T1w.nii"
    shutil.copy(sorted(scans.iterdir())[0], new)
    said, rows, after = run()
    assert "1 of 3 volumes are done already" in said
    assert [Path(row["file"]) for row in rows] == sorted(scans.iterdir())
    assert len(after) == 3
    assert [name for name in before if after[name] == before[name]] == sorted(before)[1:]


def test_scans_of_one_name_do_not_take_each_others_masks(sides_bundle: Path, scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    files = []
    for name, scan in zip(("anna", "bob"), sorted(scans.iterdir()), strict=True):
        files.append(tmp_path / "fs" / name / f"T1{''.join(scan.suffixes)}")
        files[-1].parent.mkdir(parents=True)
        shutil.copy(scan, files[-1])
    assert segment([files[0]], output, bundle=sides_bundle) == 0
    mask = output / "T1_hippocampus.nii.gz"
    made = mask.read_bytes()
    with pytest.raises(InputError, match=rf"{files[1]} +{mask} +is of {files[0]}"):
        segment([files[1]], output, bundle=sides_bundle)
    assert mask.read_bytes() == made
    assert segment(files, output, bundle=sides_bundle) == 0
    assert mask.read_bytes() == made and (output / "bob" / mask.name).is_file()
    # The table keeps who was segmented by an earlier command.
    assert segment([files[1]], output, bundle=sides_bundle) == 0
    assert {Path(row["file"]) for row in read_rows(output / "volumes.csv")} == set(files)
