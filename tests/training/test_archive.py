# SPDX-License-Identifier: Apache-2.0
"""PyTorch's files: the same bytes for the same tensors; damage, code and sizes that no file can hold are refused."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from small_files import error_of_a_full_disk
from torch import nn
from unpickled import Call

from volta_components.training.archive import DamagedArchiveError, read_archive, write_archive


def make_state() -> dict[str, Any]:
    """Of a training: weights, an optimiser that has stepped, numbers and text."""
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.arange(12.0).reshape(2, 6)).square().sum().backward()
    optimizer.step()
    return {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "part": torch.arange(10)[2:5],
        "parameter": nn.Parameter(torch.ones(2)),
        "flags": torch.tensor([True, False]),
        "settings": {"sizes": [1, 2], "name": "ä", "rate": 0.1, "none": None},
    }


def assert_same(one: Any, other: Any) -> None:
    if isinstance(other, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(other, dict):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert_same(one[key], value)
    else:
        assert one == other


def test_the_same_tensors_give_the_same_bytes_whatever_the_file_is_called(tmp_path: Path) -> None:
    state = make_state()
    write_archive(state, tmp_path / "a.pt")
    write_archive(state, tmp_path / ".partial-1234-model.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / ".partial-1234-model.pt").read_bytes()
    assert_same(read_archive(tmp_path / "a.pt"), state)
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True), state)


def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    state, path = make_state(), tmp_path / "a.pt"
    write_archive(state, path)
    whole = path.read_bytes()
    dice = random.Random(0)
    refused = 0
    for place in (dice.randrange(8 * len(whole)) for _ in range(300)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            assert_same(read_archive(path), state)
        except DamagedArchiveError:
            refused += 1
    assert refused > 100


def repacked(path: Path, change: Any) -> None:
    """An archive with other records or another way to store them."""
    with zipfile.ZipFile(path) as archive:
        records = OrderedDict((name, archive.read(name)) for name in archive.namelist())
    records, options = change(records)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def cut_record(records: Any) -> tuple[Any, dict[str, Any]]:
    return OrderedDict((name, content[:4] if "/data/" in name else content) for name, content in records.items()), {}


BOMBS: dict[str, Any] = {
    "a view of one number": lambda path: torch.save({"a": torch.zeros(1).expand(2**40)}, path),
    "a constructor": lambda path: torch.save({"a": Call(torch.Tensor, 2**40)}, path),
    "a sparse tensor": lambda path: torch.save(
        {"a": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (2**40,))}, path
    ),
    "a record that is shorter than it says": lambda path: (
        torch.save({"a": torch.zeros(99)}, path),
        repacked(path, cut_record),
    ),
    "zeros that are compressed": lambda path: (
        torch.save({"a": torch.zeros(10**6)}, path),
        repacked(path, lambda records: (records, {"compression": zipfile.ZIP_DEFLATED})),
    ),
    "a function": lambda path: torch.save({"a": Call(print, "called")}, path),
    "the older format": lambda path: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
    "another zip": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "hello"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_and_code_are_refused(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bomb.pt"
    BOMBS[kind](path)
    assert path.stat().st_size < 10**5
    with pytest.raises(DamagedArchiveError):
        read_archive(path)
    assert "called" not in capsys.readouterr().out


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """In a process that may use 400 MB more than it does before."""
    path = tmp_path / "bomb.pt"
    torch.save({"a": torch.zeros(1).expand(2**40), "b": Call(torch.Tensor, 2**33)}, path)
    code = (
        "import resource, sys; from pathlib import Path; from volta_components.training.archive import *\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0]); limit = pages * 4096 + 400 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: read_archive(sys.argv[1])\n"
        "except DamagedArchiveError as error: print(error)"
    )
    assert resource.getpagesize() == 4096
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "1,099,511,627,776 elements" in done.stdout


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """PyTorch's writer alone raises a RuntimeError about positions."""
    setup = "import torch\nfrom volta_components.training.archive import write_archive"
    call = "write_archive([torch.zeros(100_000) for _ in range(4)], path)"
    assert error_of_a_full_disk(1_000_000, setup, call, tmp_path / "state.pt").endswith(": File too large\n")
