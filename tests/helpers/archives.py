# SPDX-License-Identifier: Apache-2.0
"""Tar and zip files of given contents."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Mode = Literal["w", "w:gz", "w:xz"]


def write_tar(path: Path, entries: Iterable[tuple[tarfile.TarInfo, bytes]], mode: Mode = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for entry, content in entries:
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def tar_of(path: Path, files: dict[str, bytes], mode: Mode = "w") -> Path:
    return write_tar(path, ((tarfile.TarInfo(name), content) for name, content in files.items()), mode)


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
