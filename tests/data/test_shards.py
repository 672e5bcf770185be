# SPDX-License-Identifier: Apache-2.0
"""Shards hold the volumes that they were made of, and every reader of the project finds them there."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImaged
from prepared import make_prepared

from volta_components.cli import main
from volta_components.data import shards
from volta_components.data.checks import check_contents, check_volumes
from volta_components.data.datalist import datalist_hash, load_datalist
from volta_components.data.load import ShardReader
from volta_components.data.nifti import write_nifti
from volta_components.data.overlaps import merge
from volta_components.data.places import place_of
from volta_components.data.shards import pack_data
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file, write_json
from volta_components.training.stamps import check_stamps, make_stamps

SHAPE = (40, 40, 40)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine volumes, the last one stored as integers."""
    folder = make_prepared(tmp_path / "data", 9, 2, SHAPE)
    content = read_json(folder / "datalist.json")
    path = folder / content["training"][8]["image"]
    steps = np.round(nib.load(path).get_fdata() * 255).astype(np.uint8)
    write_nifti(path, steps, np.eye(4), 1 / 255)
    content["training"][8]["sha256"] = sha256_file(path)
    write_json(folder / "datalist.json", {**content, "hash": datalist_hash(content)})
    return folder


def test_packed_volumes_are_read_as_before(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert main(["pack-data", "--datalist", str(data), "--output", str(out), "--shard-mb", "1"]) == 0
    before, after = load_datalist(data), load_datalist(out)
    assert [path.name for path in sorted((out / "shards").iterdir())] == ["00000.tar", "00001.tar", "00002.tar"]
    check_volumes(after)
    check_volumes(after, deep=True)
    load = LoadImaged("image", reader=ShardReader(), ensure_channel_first=True)
    plain = LoadImaged("image", reader="NibabelReader", ensure_channel_first=True)
    for old, new in zip(before.items, after.items, strict=True):
        place = place_of(new["image"])
        assert place is not None and place.start % 512 == 0
        assert {**new, "image": ""} == {**old, "image": ""}
        check_contents(new)
        one, other, ours = plain(old)["image"], load(new)["image"], load(old)["image"]
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=0, atol=2e-7)
        np.testing.assert_array_equal(other.numpy(), ours.numpy())
        assert other.dtype == one.dtype and other.shape == (1, *SHAPE)
        np.testing.assert_array_equal(other.affine, one.affine)
    with tarfile.open(out / "shards" / "00000.tar") as tar:
        first = before.items[0]
        member = tar.extractfile(Path(first["image"]).name)
        assert member is not None and member.read() == Path(first["image"]).read_bytes()
    merge(out, make_other(tmp_path), output=tmp_path / "merged")
    check_volumes(load_datalist(tmp_path / "merged"), deep=True)


def make_other(tmp_path: Path) -> Path:
    folder = make_prepared(tmp_path / "other", 12, 2, SHAPE)
    content = read_json(folder / "datalist.json")
    content["training"] = [{**content["training"][11], "patient_id": "z", "subject_id": "z", "cohort": "other"}]
    write_json(folder / "datalist.json", {**content, "hash": datalist_hash(content)})
    return folder


def test_what_is_whole_is_kept_and_what_is_damaged_is_written_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    pack_data(data, out, shard_mb=1)
    contents = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    listed = (out / "datalist.json").read_bytes()
    (out / "shards" / "00000.tar").unlink()
    damaged = bytearray(contents["00001.tar"])
    damaged[5000] ^= 1
    (out / "shards" / "00001.tar").write_bytes(damaged)
    written: list[str] = []
    write = shards._write_shard
    monkeypatch.setattr(shards, "_write_shard", lambda path, members: written.append(path.name) or write(path, members))
    pack_data(data, out, shard_mb=1)
    assert written == ["00000.tar", "00001.tar"]
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == contents
    assert (out / "datalist.json").read_bytes() == listed


def test_shards_of_another_size_leave_none_behind(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    pack_data(data, out, shard_mb=1)
    (out / "shards" / "notes.txt").touch()
    pack_data(data, out, shard_mb=1000)
    assert {path.name for path in (out / "shards").iterdir()} == {"00000.tar", "notes.txt"}
    check_volumes(load_datalist(out), deep=True)


def test_another_data_set_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    other = make_other(tmp_path)
    pack_data(data, tmp_path / "packed")
    before = {path: path.read_bytes() for folder in (tmp_path / "packed", other) for path in folder.rglob("*.*")}
    (tmp_path / "prepared/.prepare").mkdir(parents=True)
    for source, output in ((other, tmp_path / "packed"), (data, other), (data, tmp_path / "prepared")):
        with pytest.raises(InputError, match=f"--output {output}: holds another data set"):
            pack_data(source, output)
    assert {path: path.read_bytes() for path in before} == before
    content = read_json(data / "datalist.json")  # the same volumes in other folds are the same shards
    content["training"][0]["fold"] = 1 - content["training"][0]["fold"]
    write_json(data / "datalist.json", {**content, "hash": datalist_hash(content)})
    pack_data(data, tmp_path / "packed")
    assert load_datalist(tmp_path / "packed").items[0]["fold"] == content["training"][0]["fold"]


def test_a_volume_may_have_a_long_name(data: Path, tmp_path: Path) -> None:
    content = read_json(data / "datalist.json")
    old, name = data / content["training"][3]["image"], f"images/{'ä' * 60}.nii"
    old.rename(data / name)
    content["training"][3]["image"] = name
    write_json(data / "datalist.json", {**content, "hash": datalist_hash(content)})
    pack_data(data, tmp_path / "packed")
    check_volumes(load_datalist(tmp_path / "packed"), deep=True)


def test_damage_within_a_shard_is_named(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    pack_data(data, out, shard_mb=1)
    items = load_datalist(out).items
    place = place_of(items[1]["image"])
    assert place is not None
    path, stamps = Path(place.shard), make_stamps(items)
    assert stamps[0].tolist() == stamps[1].tolist() == [path.stat().st_size, path.stat().st_mtime_ns]
    content = bytearray(path.read_bytes())
    content[place.start + 2000] ^= 1
    path.write_bytes(content)
    check_contents(items[0])
    with pytest.raises(InputError, match=rf"^sub-0001: .*{path.name}@{place.start}:.*not what was prepared"):
        check_contents(items[1])
    with pytest.raises(InputError, match=r"sub-0001 .* another content"):
        check_stamps(tmp_path / "checkpoint.pt", items, stamps, make_stamps(items))
    path.write_bytes(content[: place.start + 2000])
    with pytest.raises(InputError, match=r"(?s)sub-0001 .*ends before byte"):
        check_volumes(load_datalist(out))
    path.unlink()
    with pytest.raises(InputError, match=r"sub-0000 .*no such file"):
        check_volumes(load_datalist(out))


def test_a_start_reads_headers_and_no_volumes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_data(data, tmp_path / "packed")
    packed = load_datalist(tmp_path / "packed")
    read: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: read.append(length) or real(file, length, start))
    check_volumes(packed)
    assert len(read) == len(packed) and sum(read) < 9 * 1000


def test_what_cannot_be_packed_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give another folder"):
        pack_data(data, data)
    path = Path(load_datalist(data).items[2]["image"])
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=rf"{path.name}: its content is not what was prepared"):
        pack_data(data, tmp_path / "out")
    assert not list((tmp_path / "out" / "shards").iterdir()) and not (tmp_path / "out" / "datalist.json").exists()
    path.unlink()
    with pytest.raises(InputError, match=rf"{path.name}: No such file"):
        pack_data(data, tmp_path / "out")
    pack_data(make_prepared(tmp_path / "whole", 2, 2, SHAPE), tmp_path / "once")
    with pytest.raises(InputError, match="each volume a file with its hash"):
        pack_data(tmp_path / "once", tmp_path / "twice")
