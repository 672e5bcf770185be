# SPDX-License-Identifier: Apache-2.0
"""What is looked at before a training starts, and what when a volume is first read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from prepared import make_prepared

from volta_components.data import checks
from volta_components.data.checks import check_contents, check_volumes
from volta_components.data.datalist import Datalist, datalist_hash, load_datalist
from volta_components.errors import AGAIN, InputError
from volta_components.files import read_json, write_json

SHAPE = (8, 9, 10)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_prepared(tmp_path / "data", 8, 2, SHAPE)


def files_of(datalist: Datalist) -> list[Path]:
    return [Path(item["image"]) for item in datalist.items]


def save(path: Path, voxels: np.ndarray, spacing: float = 1.0) -> None:
    nib.Nifti1Image(voxels.astype(np.float32), np.diag([spacing] * 3 + [1.0])).to_filename(path)


def change_items(folder: Path, **facts: Any) -> Datalist:
    """Set facts of all items; None removes one."""
    content = read_json(folder / "datalist.json")
    changed = [{**item, **facts} for item in content["training"]]
    content["training"] = [{key: value for key, value in item.items() if value is not None} for item in changed]
    write_json(folder / "datalist.json", {**content, "hash": datalist_hash(content)})
    return load_datalist(folder)


def test_every_bad_file_is_listed_together(data: Path) -> None:
    datalist = load_datalist(data)
    check_volumes(datalist)
    check_volumes(datalist, deep=True)
    files, voxels = files_of(datalist), np.random.default_rng(0).random(SHAPE)
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:1000])
    save(files[2], np.ones((8, 9, 9)))
    save(files[3], np.ones(SHAPE), 2.0)
    save(files[4], np.ones((*SHAPE, 2)))
    voxels[0, 0, 0] = np.nan
    save(files[5], voxels)
    save(files[6], np.full(SHAPE, 0.5))
    with pytest.raises(InputError) as caught:
        check_volumes(datalist)
    text = str(caught.value)
    assert "5 files of 8 items cannot be used" in text
    for reason in ("no such file", "truncated", "shape 8x9x9", "spacing 2x2x2 mm", "4-D (8x9x10x2)"):
        assert reason in text
    with pytest.raises(InputError) as caught:
        check_volumes(datalist, deep=True)
    text = str(caught.value)
    assert "7 files of 8" in text
    assert "contains NaN or Inf (1 voxels)" in text and "constant: every voxel is 0.5" in text


def test_a_datalist_without_its_volumes_asks_for_them(data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "datalist.json"
    moved.parent.mkdir()
    moved.write_bytes((data / "datalist.json").read_bytes())
    with pytest.raises(InputError, match="8 files of 8 items") as caught:
        check_volumes(load_datalist(moved))
    assert "move it together with its volumes" in str(caught.value) and "Remove" not in str(caught.value)


def test_a_deep_check_compares_range_and_hash(data: Path) -> None:
    datalist = load_datalist(data)
    files = files_of(datalist)
    save(files[0], nib.load(files[0]).get_fdata() * 3)
    save(files[1], nib.load(files[1]).get_fdata()[::-1])
    check_volumes(datalist)
    words = r"(?s)intensities from .* instead of 0 to 1.*not what was prepared \(another hash\)"
    with pytest.raises(InputError, match=words):
        check_volumes(datalist, deep=True)


def test_of_many_volumes_all_sizes_and_some_headers_are_looked_at(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_HEADERS", 4)
    datalist = load_datalist(data)
    files = files_of(datalist)
    read: list[Path] = []
    header_of = checks.header_of
    monkeypatch.setattr(checks, "header_of", lambda path: read.append(path) or header_of(path))
    check_volumes(datalist)
    assert list(map(Path, read)) == files[::2]
    # Of the right length, so that only its header tells; it is read before the network sees the volume.
    save(files[1], np.ones(SHAPE), 2.0)
    check_volumes(datalist)
    with pytest.raises(InputError, match="another hash"):
        check_contents(datalist.items[1])
    save(files[2], np.ones(SHAPE), 2.0)
    files[3].write_bytes(files[3].read_bytes()[:-1])
    files[5].unlink()
    with pytest.raises(InputError) as caught:
        check_volumes(datalist)
    rows = str(caught.value).splitlines()[1:-1]
    assert [row.split()[0] for row in rows] == ["sub-0002", "sub-0003", "sub-0005"]
    assert "spacing 2x2x2" in rows[0] and "truncated" in rows[1] and "no such file" in rows[2]


def test_a_file_of_another_type_than_the_datalist_says_shows_by_its_size(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header is looked at, whatever its turn: it may be a whole file all the same."""
    monkeypatch.setattr(checks, "_HEADERS", 1)
    read: list[Path] = []
    header_of = checks.header_of
    monkeypatch.setattr(checks, "header_of", lambda path: read.append(path) or header_of(path))
    for dtype, expected in (("float32", 1), ("uint8", 8), ("float128", 8)):
        read.clear()
        check_volumes(change_items(data, dtype=dtype))
        assert len(read) == expected


def test_images_without_a_hash_are_read_at_the_start(data: Path) -> None:
    """Nothing could tell later what they were."""
    datalist = change_items(data, sha256=None)
    check_volumes(datalist)
    save(files_of(datalist)[2], np.full(SHAPE, 0.5))
    with pytest.raises(InputError, match=r"(?s)1 files of 8 items.*sub-0002.*constant: every voxel is 0.5"):
        check_volumes(datalist)
    check_contents(datalist.items[2])


def test_a_wrong_content_names_subject_file_and_remedy(data: Path) -> None:
    item = load_datalist(data).items[3]
    check_contents(item)
    path = Path(item["image"])
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_contents(item)
    text = str(caught.value)
    assert text.startswith(
        f"sub-0003: {path}: its content is not what was prepared (another hash); remove it, and run the same "
    )
    assert text.endswith(f"; {AGAIN}")
    path.unlink()
    with pytest.raises(InputError, match=f"^sub-0003: {path}: no such file; fetch it again; then start"):
        check_contents(item)
