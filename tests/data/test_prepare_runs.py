# SPDX-License-Identifier: Apache-2.0
"""``volta3d prepare`` in shards and workers, killed, and started again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny
from prepare_helpers import OPTIONS, tree

from volta_components.data import worker
from volta_components.data.checks import check_volumes
from volta_components.data.datalist import load_datalist
from volta_components.data.headers import volume_files
from volta_components.data.prepare import prepare
from volta_components.errors import InputError
from volta_components.files import sha256_file


def test_shards_workers_and_order_make_no_difference(tmp_path):
    root = tiny.make_bids(tmp_path / "source", subjects=5)
    options = {**OPTIONS, "name": "tiny"}
    prepare("bids", str(root), str(tmp_path / "one"), **options)
    prepare("bids", str(root), str(tmp_path / "two"), **{**options, "workers": 2})
    for shard in ("3/3", "1/3"):
        assert prepare("bids", str(root), str(tmp_path / "three"), **options, shard=shard) == 0
        assert not (tmp_path / "three/datalist.json").exists()
    prepare("bids", str(root), str(tmp_path / "three"), **options, shard="2/3")
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")


def test_a_second_start_does_no_work_and_a_changed_source_is_done_again(tmp_path, monkeypatch):
    root = tiny.make_bids(tmp_path / "source", subjects=3, labels=False)
    prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)
    before = tree(tmp_path / "out")
    done, real = [], worker.process
    monkeypatch.setattr(worker, "process", lambda task: (done.append(task.scan.key), real(task))[1])
    prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)
    assert done == [] and tree(tmp_path / "out") == before
    tiny.save_head(next(root.glob("sub-ADNI002S0296/**/*_T1w.nii.gz")), seed=77)
    (tmp_path / "out/images/sub-ADNI002S0297_ses-M000.nii").unlink()
    prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)
    assert done == ["sub-ADNI002S0296_ses-M000", "sub-ADNI002S0297_ses-M000"]


def test_of_another_shard_only_what_was_made_of_the_same_files_is_taken(tmp_path, capsys):
    for seed in (1, 2):
        tiny.save_head(tmp_path / f"source/p{seed}x{seed}.nii.gz", seed=seed)
    output = tmp_path / "out"

    def start(shard):
        prepare("folder", tmp_path / "source", output, **OPTIONS, shard=shard)

    start("1/2")
    start("2/2")
    before = (output / "datalist.json").read_bytes()
    tiny.save_head(tmp_path / "source/p2x2.nii.gz", seed=5)  # fetched again
    capsys.readouterr()
    start("1/2")
    assert "1 volumes are left to others" in capsys.readouterr().out
    assert (output / "datalist.json").read_bytes() == before
    start("2/2")
    for item in load_datalist(output).items:
        assert item["source_sha256"] == sha256_file(tmp_path / "source" / item["source"])


def test_another_source_replaces_nobody(tmp_path):
    source, other, output = (tmp_path / name for name in ("source", "other", "out"))
    for folder, seeds in ((source, (1, 2)), (other, (2, 9))):
        for seed in seeds:
            tiny.save_head(folder / f"p{seed}x{seed}.nii.gz", seed=seed + (folder == other))
    prepare("folder", source, output, **OPTIONS)
    before = tree(output)
    with pytest.raises(InputError, match=f"holds scans of {source}, .* in {other} now.*volta3d merge.*delete"):
        prepare("folder", other, output, **OPTIONS)
    assert tree(output) == before
    source.rename(tmp_path / "moved")
    (tmp_path / "moved/p1x1.nii.gz").unlink()  # by its user
    prepare("folder", tmp_path / "moved", output, **OPTIONS)
    assert load_datalist(output).patients == {"p2x2"}


def test_a_removed_qc_folder_is_made_again(tmp_path):
    source, output = tiny.make_bids(tmp_path / "source", subjects=2), tmp_path / "out"
    prepare("bids", source, output, **OPTIONS)
    before = tree(output)
    shutil.rmtree(output / "qc")
    prepare("bids", source, output, **OPTIONS)
    assert tree(output) == before


def test_a_damaged_volume_is_mended_as_the_check_says(tmp_path):
    source, output = tiny.make_bids(tmp_path / "source", subjects=1), tmp_path / "out"
    prepare("bids", source, output, **OPTIONS)
    before = tree(output)
    for path in (*(output / "images").iterdir(), *(output / "labels").iterdir()):
        content = bytearray(path.read_bytes())
        content[400] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"2 files of 1 items(?s:.)*Remove these files and run the same"):
        check_volumes(load_datalist(output), deep=True)
    for path in (*(output / "images").iterdir(), *(output / "labels").iterdir()):
        path.unlink()
    prepare("bids", source, output, **OPTIONS)
    assert tree(output) == before


def test_a_pair_whose_header_was_corrected_is_done_again(tmp_path):
    shape, affine = tiny.grid()
    mirrored = np.diag([-1.0, 1, 1, 1]) @ affine
    voxels = tiny.head(shape, affine).astype(np.int16)
    hashes = set()
    for place, side in ((affine, 1), (mirrored, -1)):
        nib.Nifti1Pair(voxels, place).to_filename(tmp_path / f"made{side}.img")
        (tmp_path / "source").mkdir(exist_ok=True)
        for suffix in ("hdr",) if side < 0 else ("hdr", "img"):
            (tmp_path / f"made{side}.{suffix}").replace(tmp_path / f"source/p1.{suffix}")
        prepare("folder", tmp_path / "source", tmp_path / "out", **OPTIONS)
        (item,) = load_datalist(tmp_path / "out").items
        assert tiny.find_landmark(item["image"])[0] == pytest.approx(side * tiny.LANDMARK[0], abs=1)
        hashes.add(item["source_sha256"])
    assert len(hashes) == 2


@pytest.mark.parametrize("suffixes", [("img", "hdr", "mat"), ("IMG.gz", "HDR"), ("img",), ("nii",)])
def test_the_files_of_a_volume(tmp_path, suffixes):
    files = [tmp_path / f"p1.{suffix}" for suffix in suffixes]
    for file in (*files, tmp_path / "p2.mat", tmp_path / "p1.json"):
        file.touch()
    assert volume_files(files[0]) == files


def test_a_brain_that_was_placed_otherwise_is_done_again(tmp_path):
    """A record from before brains without skull were placed as with their heads; those of heads stay."""
    source, output = tiny.make_bids(tmp_path / "source", subjects=2, labels=False), tmp_path / "out"
    prepare("bids", str(source), str(output), **OPTIONS)
    old, other = sorted((output / ".prepare/records").glob("*.json"))
    for path, stripped in ((old, True), (other, False)):
        record = json.loads(path.read_text())
        record["quality"]["stripped"] = stripped
        del record["placing"]
        path.write_text(json.dumps(record))
    before = other.read_text()
    prepare("bids", str(source), str(output), **OPTIONS)
    assert json.loads(old.read_text())["placing"] == worker.PLACING
    assert other.read_text() == before


@pytest.mark.parametrize("layout", ["bids", "folder"])
def test_an_output_among_the_scans_is_refused(tmp_path, layout):
    root = tiny.make_bids(tmp_path / "source", subjects=1, labels=False)
    with pytest.raises(InputError, match="lies in --source"):
        prepare(layout, str(root), str(root if layout == "bids" else root / "prepared"), **OPTIONS)
    assert prepare("bids", str(root), str(root / "derivatives/volta3d"), **OPTIONS) == 0


def test_two_runs_in_one_folder_are_refused(tmp_path):
    root = tiny.make_bids(tmp_path / "source", subjects=1, labels=False)
    lock = tmp_path / "out/.prepare/lock-1-of-1"
    hold = "import sys; from pathlib import Path; from volta_components.files import FolderLock\n"
    hold += "FolderLock(Path(sys.argv[1])).take(''); print('taken', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], **pipes) as other:
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(InputError, match=rf"process {other.pid}\): another volta3d prepare is at work"):
            prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)
        other.communicate()
    assert prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS) == 0
    assert not lock.exists()


def command(source, output, workers=2):
    return [
        sys.executable, "-m", "volta_components.cli", "prepare", "--layout", "bids", "--source", str(source),
        "--output", str(output), "--shape", "28,30,32", "--workers", str(workers),
    ]  # fmt: skip


def start(source, output, separate):
    """Start a run: the real command with two workers, or (Python takes long to start) a fork of this process."""
    if separate:
        words = command(source, output)
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid
    if pid := os.fork():
        return pid
    with Path(os.devnull).open("w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
        prepare("bids", str(source), str(output), shape=(28, 30, 32), workers=1)
    os._exit(0)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bytes(tmp_path):
    source = tiny.make_bids(tmp_path / "source", subjects=45)
    assert prepare("bids", str(source), str(tmp_path / "unbroken"), **OPTIONS) == 0
    expected = tree(tmp_path / "unbroken")
    chance, output, whole = random.Random(5), tmp_path / "killed", 0
    sizes = {name: len(content) for name, content in expected.items() if name.endswith(".nii")}
    records = output / ".prepare/records"

    def count():
        return len(list(records.glob("*.json"))) if records.exists() else 0

    for kill in range(20):
        # Some are killed while they start; most a moment after they have finished one or two more volumes.
        early = kill % 6 == 5
        goal, deadline = count() + chance.randint(1, 2), time.monotonic() + (chance.uniform(0, 0.05) if early else 60)
        pid = start(source, output, separate=kill % 7 == 3)
        while count() < goal and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for name, size in sizes.items():
            if (output / name).exists():
                whole += 1
                assert (output / name).stat().st_size == size
        assert not (output / "datalist.json").exists()
    assert whole > 50
    assert subprocess.run(command(source, output), capture_output=True, check=False).returncode == 0
    assert tree(output) == expected


def test_workers_do_not_outlive_a_killed_run(tmp_path):
    import psutil

    source = tiny.make_bids(tmp_path / "source", subjects=12, labels=False)
    process = subprocess.Popen(command(source, tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "out/.prepare/records"
    while process.poll() is None and not (records.exists() and list(records.glob("*.json"))):
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children and not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def test_settings_and_records_hold_no_absolute_path(prepared):
    _, output, source = prepared("bids")
    for path in (output / ".prepare").rglob("*.json"):
        assert str(source.parent) not in path.read_text()
    assert str(source.parent) not in (output / "datalist.json").read_text()
    assert json.loads((output / ".prepare/settings.json").read_text())["shape"] == [28, 30, 32]
