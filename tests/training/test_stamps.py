# SPDX-License-Identifier: Apache-2.0
"""Files that were exchanged between start and resume are found; touched ones are read, not refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from volta_components.errors import InputError
from volta_components.files import sha256_file
from volta_components.training.stamps import check_stamps, make_stamps


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, Any]]:
    """Four volumes; the last has a label map, too."""
    made = []
    for number in range(4):
        path = tmp_path / f"{number}.nii"
        path.write_bytes(bytes([number]) * 100)
        made.append({"image": str(path), "subject_id": f"sub-{number}", "sha256": sha256_file(path)})
    (tmp_path / "label.nii").write_bytes(b"label")
    return [*made[:3], {**made[3], "label": str(tmp_path / "label.nii")}]


def test_stamps_are_sizes_and_times(items: list[dict[str, Any]]) -> None:
    os.utime(items[1]["image"], ns=(0, 1_700_000_000_123_456_789))
    stamps = make_stamps(items)
    assert stamps[:, 0].tolist() == [100, 100, 100, 100, 5]
    assert int(stamps[1, 1]) == 1_700_000_000_123_456_789
    assert make_stamps([{"image": torch.zeros(1), "label": 1}, object()]).shape == (0, 2)


def test_touched_and_copied_files_pass(items: list[dict[str, Any]], tmp_path: Path) -> None:
    before = make_stamps(items)
    for path in tmp_path.iterdir():
        os.utime(path)
    after = make_stamps(items)
    assert not torch.equal(before, after)
    check_stamps(tmp_path / "checkpoint.pt", items, before, after)


def test_exchanged_files_are_all_named(items: list[dict[str, Any]], tmp_path: Path) -> None:
    before = make_stamps(items)
    Path(items[0]["image"]).write_bytes(b"x" * 100)
    Path(items[1]["image"]).write_bytes(b"x" * 2000)
    Path(items[2]["image"]).unlink()
    Path(items[3]["label"]).write_bytes(b"another")
    with pytest.raises(InputError) as caught:
        check_stamps(tmp_path / "checkpoint.pt", items, before, make_stamps(items))
    headline, *rows, remedy = str(caught.value).splitlines()
    assert "checkpoint.pt was trained on other files than are there now (4 of 5)" in headline
    for row, words in zip(rows, ["another content", "2,000 bytes, 100", "is missing", "7 bytes, 5"], strict=True):
        assert words in row
    assert "--run_name" in remedy


def test_a_label_map_of_the_same_size_is_compared_by_its_hash(items: list[dict[str, Any]], tmp_path: Path) -> None:
    label, before = Path(items[3]["label"]), make_stamps(items)
    known = [*items[:3], {**items[3], "label_sha256": sha256_file(label)}]
    os.utime(label, ns=(1, 1))
    check_stamps(tmp_path / "checkpoint.pt", known, before, make_stamps(known))
    label.write_bytes(b"LABEL")
    os.utime(label, ns=(1, 1))
    with pytest.raises(InputError, match=r"\(1 of 5\)(.|\n)*label.nii +another content"):
        check_stamps(tmp_path / "checkpoint.pt", known, before, make_stamps(known))
    # Data sets of earlier versions have no hash of it.
    check_stamps(tmp_path / "checkpoint.pt", items, before, make_stamps(items))


def test_an_older_checkpoint_has_no_stamps(items: list[dict[str, Any]], tmp_path: Path) -> None:
    check_stamps(tmp_path / "checkpoint.pt", items, None, make_stamps(items))


def test_only_changed_files_are_read(
    items: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_stamps(items)
    os.utime(items[2]["image"], ns=(1, 1))
    read: list[str] = []
    monkeypatch.setattr(
        "volta_components.training.stamps.sha256_of", lambda path: read.append(str(path)) or items[2]["sha256"]
    )
    check_stamps(tmp_path / "checkpoint.pt", items, before, make_stamps(items))
    assert read == [items[2]["image"]]
