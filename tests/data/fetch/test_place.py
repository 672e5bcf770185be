# SPDX-License-Identifier: Apache-2.0
"""Archives: unpacked whole or not at all, and never out of the folder."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from archives import tar_of, write_tar, zip_of

from volta_components.data.fetch.place import WrongFile, unpack

FILES = {"a/one.nii": b"one" * 100, "two.nii": b"two" * 200}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:xz", "zip"])
def test_archives_are_known_by_their_content(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "download.part"
    zip_of(archive, FILES) if kind == "zip" else tar_of(archive, FILES, kind)
    sizes = unpack(archive, tmp_path / "out", tmp_path / "scratch")
    assert sizes == {name: len(content) for name, content in FILES.items()}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in sizes} == FILES
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("name", ["../outside.nii", "/{folder}/outside.nii", "a/../../outside.nii"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_paths_out_of_the_folder_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    files = {**FILES, name.format(folder=str(tmp_path).lstrip("/")): b"x"}
    archive = (tar_of if kind == "tar" else zip_of)(tmp_path / "archive", files)
    with pytest.raises(WrongFile, match=r"cannot be unpacked .*outside\.nii"):
        unpack(archive, tmp_path / "out" / "deep", tmp_path / "out" / "scratch")
    assert names(tmp_path) == {"archive"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    """A link to a folder outside, and a file below the link."""
    (tmp_path / "outside").mkdir()
    link = tarfile.TarInfo("a")
    link.type, link.linkname = kind, "../outside"
    archive = write_tar(tmp_path / "archive", [(link, b""), (tarfile.TarInfo("a/b.nii"), b"x")])
    with pytest.raises(WrongFile, match="link"):
        unpack(archive, tmp_path / "out", tmp_path / "scratch")
    assert names(tmp_path) == {"archive"}


@pytest.mark.parametrize("kind", ["w", "w:gz", "zip"])
def test_a_damaged_archive_leaves_nothing(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "archive"
    zip_of(archive, FILES) if kind == "zip" else tar_of(archive, FILES, kind)
    content = bytearray(archive.read_bytes())
    if kind == "zip":
        content[60] ^= 1  # in the first file, which the archive's own checksum covers
    archive.write_bytes(content if kind == "zip" else content[: len(content) // 2 if kind == "w:gz" else 700])
    with pytest.raises(WrongFile):
        unpack(archive, tmp_path / "out", tmp_path / "scratch")
    assert names(tmp_path) == {"archive"}


@pytest.mark.parametrize(("content", "expected"), [(b"<html>", "neither a tar nor a zip"), (None, "without a file")])
def test_what_is_no_archive(tmp_path: Path, content: bytes | None, expected: str) -> None:
    archive = tmp_path / "archive"
    tar_of(archive, {}) if content is None else archive.write_bytes(content)
    with pytest.raises(WrongFile, match=expected):
        unpack(archive, tmp_path / "out", tmp_path / "scratch")


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    """Those of the same size; those of another are named, and nothing is changed."""
    archive = tar_of(tmp_path / "archive", FILES)
    (tmp_path / "out").mkdir()
    there = tmp_path / "out" / "two.nii"
    there.write_bytes(b"TWO" * 200)
    unpack(archive, tmp_path / "out", tmp_path / "scratch")
    assert there.read_bytes() == b"TWO" * 200 and (tmp_path / "out" / "a" / "one.nii").is_file()
    there.write_bytes(b"mine")
    (tmp_path / "out" / "a" / "one.nii").unlink()
    with pytest.raises(WrongFile, match=r"two\.nii: 600 bytes expected, 4 found"):
        unpack(archive, tmp_path / "out", tmp_path / "scratch")
    assert names(tmp_path / "out") == {"two.nii"}
