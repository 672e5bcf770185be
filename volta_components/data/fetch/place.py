# SPDX-License-Identifier: Apache-2.0
"""Bring one file of a resource to its place: downloaded, checked, unpacked."""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

from volta_components.data.fetch.download import download, forget
from volta_components.data.fetch.manifest import File
from volta_components.files import hash_file, sha256_file


class WrongFile(Exception):
    """A file that is not what it should be; the message says what was expected and found."""


def provide(
    session: requests.Session, file: File, folder: Path, work: Path, entry: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Bring a file to its place, unless it is there.

    Under its final name a file is whole and checked. A downloaded archive stays in ``work`` until ``tidy``.

    Args:
        session: see ``open_session``.
        file: the file.
        folder: folder of the data.
        work: folder for what is unfinished, on the same disk.
        entry: what is recorded of the file; empty the first time.

    Returns:
        What to record of the file, and whether it is new.

    Raises:
        WrongFile: if a hash or the size of an unpacked file is wrong, or an archive cannot be unpacked.
        DownloadError: if it cannot be downloaded.
        OSError: if it cannot be written.
    """
    if _is_unpacked(folder, file, entry):
        return dict(entry), False
    known = file.hashes or {kind: entry[kind] for kind in ("sha256",) if kind in entry}
    place, part = folder / file.path, _part(work, file)
    is_there = place.is_file()
    if is_there and (fault := _find_fault(place, known)):
        raise WrongFile(fault)
    if not is_there:
        _download_checked(session, file, part, known)
    source = place if is_there else part
    made = {"url": file.url, "sha256": sha256_file(source), "bytes": source.stat().st_size}
    if file.unpack is not None:
        try:
            made["unpacked"] = unpack(source, folder / file.unpack, work / "unpacked")
        except WrongFile:
            forget(part)
            raise
        return made, True
    if not is_there:
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)
    return made, not is_there


def tidy(work: Path, file: File) -> None:
    """Remove what is left of a file's download once it is at its place and recorded."""
    forget(_part(work, file))


def _part(work: Path, file: File) -> Path:
    return work / f"{file.path}.part"


def _download_checked(session: requests.Session, file: File, part: Path, known: Mapping[str, str]) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    for is_last in (False, True):
        copies = 1 if file.unpack is None else 2
        is_joined = download(session, file.url, part, file.path, bool(known), copies)
        fault = _find_fault(part, known)
        if not fault:
            return
        forget(part)
        # A file that was put together from pieces of two versions is worth another try.
        if is_last or not is_joined:
            raise WrongFile(fault)


def _find_fault(path: Path, known: Mapping[str, str]) -> str:
    """Which hash is another than the known one; empty if none is."""
    for kind, expected in known.items():
        if (found := hash_file(path, kind)) != expected:
            return f"{kind} expected {expected}, found {found} ({path.stat().st_size:,} bytes)"
    return ""


def _is_unpacked(folder: Path, file: File, entry: Mapping[str, Any]) -> bool:
    """Whether all that an archive held is there.

    Raises:
        WrongFile: if one of its files has another size.
    """
    if file.unpack is None or "unpacked" not in entry:
        return False
    _check_sizes(folder / file.unpack, entry["unpacked"])
    return all((folder / file.unpack / name).is_file() for name in entry["unpacked"])


def _check_sizes(target: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        path = target / name
        if path.exists() and path.stat().st_size != size:
            raise WrongFile(f"{path}: {size:,} bytes expected, {path.stat().st_size:,} found")


def unpack(archive: Path, target: Path, scratch: Path) -> dict[str, int]:
    """Unpack a tar or zip. Its files appear in ``target`` one by one, each whole.

    MONAI's ``extractall`` refuses links and paths that lead out of the folder. Where it fails it leaves half of the
    files behind, so it unpacks to ``scratch`` first.

    Args:
        archive: the archive.
        target: the folder; files of the same name and size in it stay.
        scratch: a folder on the same disk; it is removed.

    Returns:
        Sizes in bytes of the archive's files, by path below ``target``.

    Raises:
        WrongFile: if it is no archive, is damaged, is refused, or another file lies at the place of one of its files.
        OSError: if the disk is full.
    """
    from monai.apps.utils import extractall

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        kind = "tar" if tarfile.is_tarfile(archive) else "zip" if zipfile.is_zipfile(archive) else None
        if kind is None:
            raise WrongFile("neither a tar nor a zip")
        extractall(archive, scratch, file_type=kind, has_base=False)
        sizes = {
            path.relative_to(scratch).as_posix(): path.stat().st_size
            for path in sorted(scratch.rglob("*"))
            if path.is_file()
        }
        if not sizes:
            raise WrongFile("an archive without a file")
        _check_sizes(target, sizes)
        for name in sizes:
            if not (target / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).replace(target / name)
        return sizes
    except (ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise WrongFile(f"cannot be unpacked ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
