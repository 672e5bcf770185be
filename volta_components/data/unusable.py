# SPDX-License-Identifier: Apache-2.0
"""The error that names a volume file which cannot be used."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from volta_components.errors import InputError
from volta_components.files import readable


class UnusableVolume(InputError):
    """One volume file that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it, with figures.
        remedy: what the user can do.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        super().__init__(f"{path}: {reason}; {remedy}")
        self.path, self.reason, self.remedy = str(path), reason, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason, self.remedy)


class UnusableVoxels(ValueError):
    """The voxels of a scan cannot be used, for a reason, with a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


def what_is_wrong(error: Exception) -> tuple[str, str]:
    """Reason and remedy of whatever went wrong while a scan was read or prepared."""
    if isinstance(error, (UnusableVolume, UnusableVoxels)):
        return error.reason, error.remedy
    if isinstance(error, OSError):
        return readable(error.strerror or str(error)), "check the disk and the permissions"
    if isinstance(error, MemoryError):
        return "does not fit in memory", "use fewer workers, or check the file's dimensions"
    return readable(f"unexpected {type(error).__name__}: {error}"), "please report it"


def missing_content(path: Path) -> tuple[str, str] | None:
    """Why a file's content is not there: DataLad and Git LFS keep links or notes in the place of files.

    Returns:
        Reason and remedy; None where the file has its content, or does not exist at all.
    """
    fetch = "fetch it: datalad get FILE, or git annex get FILE"
    try:
        if path.is_symlink() and not path.exists():
            target = path.readlink()
            if "annex" in target.parts:
                return "its content was not fetched (a git-annex link)", fetch
            return (
                f"no such file: a link to {readable(str(target))}, which is not there",
                "mend the link, or fetch the file",
            )
        with path.open("rb") as stream:
            start = stream.read(40)
    except OSError:
        return None
    if start.startswith(b"/annex/objects/"):
        return "its content was not fetched (a git-annex pointer)", fetch
    if start.startswith(b"version https://git-lfs"):
        return "its content was not fetched (a Git LFS pointer)", "fetch it: git lfs pull"
    return None


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is opened and read into an UnusableVolume that names it.

    NiBabel raises many kinds of errors at a damaged header. They are all a property of the file here, so none of them
    may end a command that has other files to read.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UnusableVolume) and Path(error.path) != path:
            raise
        if why := missing_content(path):
            raise UnusableVolume(path, *why) from error
        if isinstance(error, UnusableVolume):
            raise
        raise UnusableVolume(path, *_reason(error)) from error


def _reason(error: Exception) -> tuple[str, str]:
    """What an error says of the file, and what to do."""
    if isinstance(error, FileNotFoundError):
        return "no such file", "fetch it again"
    if isinstance(error, PermissionError):
        return "permission denied", "make it readable (chmod u+r)"
    if isinstance(error, IsADirectoryError):
        return "a folder, not a file", "give the volume file itself"
    if isinstance(error, EOFError):
        return "truncated: the gzip stream ends early", "fetch it again"
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return f"damaged gzip stream ({error})", "fetch it again"
    if isinstance(error, MemoryError):
        return what_is_wrong(error)
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})", "check the disk and the permissions"
    return f"damaged header ({one_line(error)})", "fetch it again, or convert it again"


def one_line(error: BaseException) -> str:
    """An error's text on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
