# SPDX-License-Identifier: Apache-2.0
"""``volta3d prepare`` and broken input."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_datasets as tiny
from broken_volumes import BROKEN
from prepare_helpers import OPTIONS, findings, tree

from volta_components.cli import main
from volta_components.data import layouts, worker
from volta_components.data.datalist import load_datalist
from volta_components.data.prepare import prepare
from volta_components.errors import InputError


def test_broken_volumes_are_named_and_the_rest_is_prepared(tmp_path, capsys):
    root = tiny.make_bids(tmp_path / "source", subjects=9, labels=True)
    images = sorted(root.glob("sub-*/ses-M000/anat/*_T1w.nii*"))
    images[0].write_bytes(images[0].read_bytes()[:5000])
    images[1].write_bytes(b"")
    images[2].write_bytes(b"this is no image" * 100)
    images[4].unlink()
    label = next(root.glob("derivatives/hippocampus/*S0300/**/*_dseg.nii.gz"))
    shape, affine = tiny.grid("RAS", shape=(20, 20, 20))
    tiny.save(label, np.zeros(shape), affine, np.uint8)
    with (root / "participants.tsv").open("a") as stream:
        stream.write("sub-ADNI999S9999\tF\t70\n")
    status = prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)
    assert status == 1
    assert len(load_datalist(tmp_path / "out")) == 4
    rows = {row["subject"]: row for row in findings(tmp_path / "out") if row["kind"] == "problem"}
    assert "truncated" in rows["sub-ADNI002S0295"]["reason"]
    assert rows["sub-ADNI002S0296"]["reason"] == "empty file (0 bytes)"
    assert "wrong magic" in rows["sub-ADNI002S0297"]["reason"]
    assert rows["sub-ADNI003S0299"]["reason"] in {"has no T1w image", "label without image"}
    assert "label of 20x20x20 voxels" in rows["sub-ADNI003S0300"]["reason"]
    assert rows["sub-ADNI999S9999"]["reason"] == "has a row but no folder"
    for row in rows.values():
        assert row["remedy"] and row["file"]
    printed = capsys.readouterr().out
    assert "sub-ADNI002S0296" in printed and "empty file (0 bytes)" in printed
    excluded = {row["subject_id"]: row["reason"] for row in load_datalist(tmp_path / "out").excluded}
    assert excluded["sub-ADNI002S0296"] == "empty file (0 bytes)"
    assert prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS, skip_bad=True) == 0


def test_every_kind_of_broken_file_in_one_data_set(tmp_path):
    root, bad = tmp_path / "source", {}
    root.mkdir()
    for i in range(3):
        tiny.save_head(root / f"good{i}.nii.gz", seed=i)
    for number, (kind, (make, reason)) in enumerate(BROKEN.items()):
        place = tmp_path / f"made{number}"
        place.mkdir()
        path = make(place)
        if kind not in {"missing", "folder"}:
            name = f"bad{number:02d}{''.join(path.suffixes)}"
            (root / name).symlink_to(path)
            bad[name] = reason
    assert len(bad) > 30
    assert prepare("folder", str(root), str(tmp_path / "out"), **OPTIONS, follow_links=True) == 1
    assert [item["subject_id"] for item in load_datalist(tmp_path / "out").items] == ["good0", "good1", "good2"]
    rows = {row["file"]: row for row in findings(tmp_path / "out") if row["kind"] == "problem"}
    assert set(rows) == set(bad)
    for name, reason in bad.items():
        assert re.search(reason, rows[name]["reason"]), (name, rows[name]["reason"])
        assert len(rows[name]["remedy"]) > 10 and rows[name]["left_out"] == "True"
    assert {row["source"] for row in load_datalist(tmp_path / "out").excluded} == set(bad)


def test_no_permission_is_named(tmp_path, monkeypatch):
    root = tiny.make_bids(tmp_path / "source", subjects=3, labels=False)
    bad = next(root.glob("sub-ADNI002S0296/**/*_T1w.nii.gz"))
    real = Path.open

    def refuse(self, *args, **kwargs):
        if self == bad:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # root may read anything, so chmod would not do
    assert prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS) == 1
    row = next(row for row in findings(tmp_path / "out") if row["kind"] == "problem")
    assert (row["subject"], row["reason"]) == ("sub-ADNI002S0296", "permission denied") and "chmod" in row["remedy"]


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, monkeypatch):
    root = tiny.make_bids(tmp_path / "source", subjects=4, labels=False)
    assert prepare("bids", str(root), str(tmp_path / "unbroken"), **OPTIONS) == 0
    real, calls = worker._write_nifti, []

    def full(path, *args):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *args)

    monkeypatch.setattr(worker, "_write_nifti", full)
    with pytest.raises(InputError, match=r"disk full.*what is done is kept"):
        prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)
    assert len(list((tmp_path / "out/images").iterdir())) == 2
    assert not (tmp_path / "out/datalist.json").exists()
    monkeypatch.setattr(worker, "_write_nifti", real)
    assert prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


def test_too_little_space_is_told_before_work(tmp_path, monkeypatch):
    root = tiny.make_bids(tmp_path / "source", subjects=2, labels=False)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="GB are needed for 2 volumes"):
        prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "nifti"], "--layout nifti: choose one of bids, ixi"),
        (["--source", "nowhere"], "nowhere: no such folder"),
        (["--source", ""], "--source: is empty"),
        (["--spacing", "a,b,c"], "--spacing a,b,c: give a number"),
        (["--spacing", "0"], "--spacing 0,0,0: one number or three, from 0.2 to 10 mm"),
        (["--spacing", "1,1"], "one number or three"),
        (["--shape", "64,64"], "--shape 64,64: three whole numbers"),
        (["--shape", "64,64,0"], "three whole numbers"),
        (["--shape", "64,64,1.5"], "--shape 64,64,1.5: give a whole number"),
        (["--dtype", "float16"], "--dtype float16: choose one of float32, uint16, uint8"),
        (["--folds", "0"], "--folds 0: give a number from 1 to 100"),
        (["--seed", "-1"], "--seed -1: give a whole number from 0"),
        (["--workers", "0"], "--workers 0: give a number of processes from 1"),
        (["--shard", "5/4"], "i runs from 1 to n"),
        (["--shard", "one"], "i/n, such as 3/8"),
        (["--labels", "some"], "--labels some: choose one of auto, require, none"),
        (["--require", "age,weight"], "--require age,weight: choose one of sex, age"),
        (["--assume-orientation", "RRS"], "three axis codes"),
        (["--exclude-patients-of", "nowhere.json"], "nowhere.json: no such datalist"),
        (["--diagnoses", "XX"], "no scan is left to prepare; 1 times: diagnosis .* is not asked for. .*--diagnoses"),
        (["--table", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_bad_options_name_themselves(tmp_path, capsys, options, message):
    root = tiny.make_bids(tmp_path / "source", subjects=1, labels=False)
    words = {"--layout": "bids", "--source": str(root), "--output": str(tmp_path / "out"), "--shape": "28,30,32"}
    words |= {options[0]: options[1]}
    assert main(["prepare", *(word for option in words.items() for word in option)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("volta3d prepare: ") and re.search(message, error), error


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_an_empty_folder_is_named_by_every_layout(tmp_path, layout):
    (tmp_path / "source").mkdir()
    with pytest.raises(InputError, match="source: no "):
        prepare(layout, str(tmp_path / "source"), str(tmp_path / "out"), **OPTIONS)


def test_an_output_of_other_settings_is_refused(tmp_path):
    root = tiny.make_bids(tmp_path / "source", subjects=1, labels=False)
    prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS)
    with pytest.raises(InputError, match=r"prepared with spacing \[1.0, 1.0, 1.0\] instead of \[2.0, 2.0, 2.0\]"):
        prepare("bids", str(root), str(tmp_path / "out"), **{**OPTIONS, "spacing": 2})


def test_a_wrong_start_leaves_the_folder_free(tmp_path):
    root = tiny.make_bids(tmp_path / "source", subjects=1, labels=False)
    for wrong in ({"layout": "ixi"}, {"layout": "bids", "spacing": 2, "diagnoses": ["XX"]}):
        with pytest.raises(InputError):
            prepare(**{"source": str(root), "output": str(tmp_path / "out"), **OPTIONS, **wrong})
    assert prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS) == 0


def test_a_scan_of_another_name_is_named(tmp_path, capsys):
    root = tiny.make_bids(tmp_path / "source", subjects=2, labels=False)
    scan = sorted(root.rglob("anat/*.nii*"))[0]
    scan.rename(scan.with_name("head (final).nii.gz"))
    prepare("bids", str(root), str(tmp_path / "out"), **OPTIONS, skip_bad=True)
    (row,) = [row for row in load_datalist(tmp_path / "out").excluded if "no T1w" in row["reason"]]
    assert row["reason"] == "has no T1w image, but head (final).nii.gz"
    assert f"; name it {row['subject_id']}_T1w.nii.gz if it is one" in capsys.readouterr().out


def test_ids_that_garble_tables_or_run_are_left_out_and_named(tmp_path, capsys):
    root = tmp_path / "source"
    tiny.save_head(root / "good.nii.gz")
    for number in (1, 2):
        tiny.save_head(root / f"$__import__{number}.nii.gz", seed=number)
    assert prepare("folder", str(root), str(tmp_path / "out"), **OPTIONS, skip_bad=True) == 0
    datalist = load_datalist(tmp_path / "out")
    assert [item["subject_id"] for item in datalist.items] == ["good"]
    assert "id '$__import__2' has a $; rename it" in (said := capsys.readouterr().out)
    assert "3 found = 1 prepared + 0 left out by your options + 2 left out by problems" in said
