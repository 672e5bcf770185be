# SPDX-License-Identifier: Apache-2.0
"""Which rows of an inference hold, and which are made again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import Dataset

from volta_components.errors import InputError
from volta_components.inference.journal import Journal

SETTINGS = {"spacing": 1.0, "dtype": torch.bfloat16}


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, Any]]:
    """Three files with ids."""
    found = []
    for name in "abc":
        path = tmp_path / f"{name}.nii"
        path.write_bytes(name.encode())
        found.append({"image": str(path), "subject_id": name, "session": None})
    return found


def unfinished(path: Path, items: list[dict[str, Any]], **changes: Any) -> tuple[Journal, list[dict[str, Any]]]:
    """A journal that has begun, and what it leaves to be done."""
    weights = path.with_name("weights.pt")
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(changes.pop("weights", b"weights"))
    dataset = Dataset(list(items))
    journal = Journal(path, root=changes.pop("root", ""), settings=SETTINGS | changes)
    assert not journal.has_begun
    journal.begin(dataset, weights)
    assert journal.has_begun
    return journal, dataset.data


def filled(folder: Path, items: list[dict[str, Any]]) -> Path:
    """A journal in which the first two items are done, the first with a file."""
    path = folder / "out" / "rows.jsonl"
    path.unlink(missing_ok=True)
    journal, rest = unfinished(path, items)
    assert rest == items
    output = folder / "mask.nii"
    output.write_bytes(b"mask")
    journal.add(items[1]["image"], [0.1, "b"])
    journal.add(items[0]["image"], [1e-7, "a"], [output])
    assert journal.rows() == [[1e-7, "a"], [0.1, "b"]]  # in order of the items
    return path


def test_the_rest_is_left(tmp_path: Path, items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path, items)
    journal, rest = unfinished(path, items)
    assert rest == items[2:]
    assert journal.rows() == [[1e-7, "a"], [0.1, "b"]]
    # The same file by another way of writing its path.
    monkeypatch.chdir(tmp_path)
    assert unfinished(path, [{**items[0], "image": "a.nii"}])[1] == []


def test_what_a_row_depends_on(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    path = filled(tmp_path, items)
    assert unfinished(path, items, spacing=2.0)[1] == items
    path = filled(tmp_path, items)
    assert unfinished(path, items, weights=b"others")[1] == items
    path = filled(tmp_path, items)
    renamed = [{**items[0], "subject_id": "other"}, *items[1:]]
    assert unfinished(path, renamed)[1] == [renamed[0], items[2]]
    path = filled(tmp_path, items)
    (tmp_path / "mask.nii").unlink()
    assert unfinished(path, items)[1] == [items[0], items[2]]
    path = filled(tmp_path, items)
    os.utime(items[1]["image"], ns=(1, 1))
    assert unfinished(path, items)[1] == items[1:]
    path = filled(tmp_path, items)
    Path(items[0]["image"]).write_bytes(b"longer")
    assert unfinished(path, items)[1] == [items[0], items[2]]
    path = filled(tmp_path, items)
    Path(items[1]["image"]).unlink()
    assert unfinished(path, items)[1] == items[1:]


def test_rows_of_other_items_stay(
    tmp_path: Path, items: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(tmp_path, items)
    journal, rest = unfinished(path, items[1:])
    assert rest == items[2:]
    assert journal.rows() == [[0.1, "b"], [1e-7, "a"]]
    assert unfinished(path, items)[1] == items[2:]
    assert not capsys.readouterr().err


def test_rows_of_other_items_that_do_not_hold_are_named(
    tmp_path: Path, items: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (item["image"] for item in items[:2])
    path = filled(tmp_path, items)
    assert unfinished(path, items[2:], weights=b"others")[0].rows() == []
    told = capsys.readouterr().err
    assert "2 scans of earlier commands are not in the table any more" in told
    assert [told.count(f"{file}  made with other weights, settings or code") for file in (a, b)] == [1, 1]
    path = filled(tmp_path, items)
    (tmp_path / "mask.nii").write_bytes(b"MASK")
    assert unfinished(path, items[2:])[0].rows() == [[0.1, "b"]]
    assert f"{a}  its result was changed or removed" in capsys.readouterr().err
    path = filled(tmp_path, items)
    os.utime(a, ns=(1, 1))
    assert unfinished(path, items[2:])[0].rows() == [[0.1, "b"]]
    assert f"{a}  the scan was changed" in capsys.readouterr().err


def test_the_row_of_a_scan_that_is_gone_stays(
    tmp_path: Path, items: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(tmp_path, items)
    for item in items[:2]:
        Path(item["image"]).unlink()
    journal, rest = unfinished(path, items[2:])
    assert rest == items[2:] and journal.rows() == [[0.1, "b"], [1e-7, "a"]]
    assert not capsys.readouterr().err


def test_no_result_is_written_over_that_of_another_volume(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    path = filled(tmp_path, items)
    mask = tmp_path / "mask.nii"
    (tmp_path / "bob").mkdir()
    bob = {"image": str(tmp_path / "bob" / "a.nii.gz"), "subject_id": "bob", "session": None}
    Path(bob["image"]).write_bytes(b"another")
    with pytest.raises(InputError, match=rf"{bob['image']} +{mask} +is of {items[0]['image']}\n") as error:
        unfinished(path, [bob, items[2]])
    assert "results of 1 scans" in str(error.value) and "another --output" in str(error.value)
    # Whatever weights the other result is of. Nothing was lost by that.
    with pytest.raises(InputError, match="is of"):
        unfinished(path, [bob], weights=b"others")
    assert unfinished(path, items)[1] == items[2:]
    # In folders of their own, both are kept.
    assert unfinished(path, [items[0], bob], root=tmp_path)[1] == [bob]
    mask.unlink()
    assert unfinished(path, [bob])[1] == [bob]


def test_an_edited_result_is_not_made_again(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    path = filled(tmp_path, items)
    mask = tmp_path / "mask.nii"
    os.utime(mask, ns=(1, 1))  # as a copy
    assert unfinished(path, items)[1] == items[2:]
    mask.write_bytes(b"MASK")
    for weights in (b"weights", b"others"):
        with pytest.raises(InputError, match=rf"{items[0]['image']} +{mask} +was changed after it was made"):
            unfinished(path, items, weights=weights)
    assert unfinished(path, items[1:])[0].rows() == [[0.1, "b"]]
    mask.unlink()
    assert unfinished(path, items)[1] == [items[0], items[2]]


@pytest.mark.parametrize("cut", [2, 30, 120])
def test_a_torn_line_is_left_out(tmp_path: Path, items: list[dict[str, Any]], cut: int) -> None:
    path = filled(tmp_path, items)
    path.write_bytes(path.read_bytes()[:-cut])
    journal, rest = unfinished(path, items)
    assert rest == [items[0], items[2]]
    journal.add(items[2]["image"], ["c"])
    assert unfinished(path, items)[1] == items[:1]
    path.write_bytes(b"\xff not a journal\n")
    journal, rest = unfinished(path, items)
    assert rest == items
    journal.add(items[2]["image"], ["c"])
    assert unfinished(path, items)[1] == items[:2]


def test_a_journal_that_is_in_use_is_left_alone(tmp_path: Path, items: list[dict[str, Any]]) -> None:
    path = tmp_path / "out" / "rows.jsonl"
    code = (
        "import sys\nfrom monai.data import Dataset\nfrom volta_components.inference.journal import Journal\n"
        f"journal = Journal({str(path)!r}, {{}})\njournal.begin(Dataset([]), {str(items[0]['image'])!r})\n"
        "print('begun', flush=True)\nsys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "begun\n"
        with pytest.raises(InputError, match=rf"out \(.*process {other.pid}\): another inference.*another output"):
            unfinished(path, items)
        other.communicate("")
    assert other.returncode == 0 and list(path.parent.glob(".*")) == []
    assert unfinished(path, items)[1] == items
