# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or absent, and their hashes."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from volta_components.errors import InputError

PARTIAL = ".partial-"
FOREIGN_SECONDS = 24 * 3600.0
_swept: set[Path] = set()  # folders that this process has written to
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust's libraries write it
# What spreadsheets take for the beginning of a formula; behind quotes, so that what is written can be read back.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def readable(text: str) -> str:
    """A file name that can be written as UTF-8: bytes of it that are none are taken as those of Windows (cp1252)."""
    # Python keeps such bytes as the code points U+DC80 to U+DCFF.
    return "".join(
        bytes([ord(letter) - 0xDC00]).decode("cp1252", "backslashreplace") if "\udc80" <= letter <= "\udcff" else letter
        for letter in text
    )


def partial_prefix() -> str:
    """Prefix of unfinished files; it names their process, so that ``remove_partials`` knows whose they are."""
    return f"{PARTIAL}{_machine()}-{os.getpid()}-"


def _machine() -> str:
    """Machine and container: where a process id means something."""
    try:
        space = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        space = ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def remove_partials(*folders: str | os.PathLike[str]) -> list[Path]:
    """Remove unfinished files of killed processes from folders; folders that do not exist are ignored.

    A file of this machine is removed if its process has ended. Files left by other machines are removed after 24 hours
    without a write. Files that are being written stay.

    Returns:
        What was removed.
    """
    removed = []
    for path in (path for folder in folders for path in Path(folder).glob(f"{PARTIAL}*")):
        try:
            if not _is_stale(path):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:  # removed by another process at the same time, or not ours to remove
            continue
        removed.append(path)
    return removed


def _is_stale(path: Path) -> bool:
    machine, _, rest = path.name.removeprefix(PARTIAL).partition("-")
    process = rest.partition("-")[0]
    if machine != _machine() or not process.isdecimal():
        return time.time() - path.stat().st_mtime > FOREIGN_SECONDS
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's process
        return False
    return False


def free_bytes(folder: str | os.PathLike[str]) -> float:
    """Room on a folder's disk; infinite where the disk does not tell, as on some network drives."""
    disk = shutil.disk_usage(folder)
    return disk.free if disk.total else math.inf


def keep_private() -> int:
    """From now on, what this process and its children write is not for others: 640 and 750, or less by the umask.

    Returns:
        The umask before.
    """
    before = os.umask(0o027)
    os.umask(before | 0o027)
    return before


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; move it into place when the block ends well.

    The temporary name keeps the suffixes of ``path``, since writers such as nibabel choose a format by them.
    When the block raises, nothing is left behind and an older ``path`` stays as it was. What a killed process has left
    in a folder is removed when another one first writes there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.parent not in _swept:
        _swept.add(target.parent)
        remove_partials(target.parent)
    temporary = target.parent / f"{partial_prefix()}{secrets.token_hex(4)}{''.join(target.suffixes[-2:])}"
    # The system applies the umask; asking for it would change it for a moment, for all threads.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # writing and syncing do not say which file it was
            error.filename = str(target)
        raise
    except Exception as error:  # safetensors gives the system's error as words of an error of its own
        if isinstance(error, InputError) or (found := _OS_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(path: Path, copy: Path) -> None:
    """Copy a file's content; the copy is whole or absent."""
    with atomic_path(copy) as temporary:
        shutil.copyfile(path, temporary)


def keep_copy(path: Path, copy: Path) -> None:
    """Keep a file under a second name, so that another one can take its place; without copying where links exist."""
    copy.unlink(missing_ok=True)
    try:
        os.link(path, copy)
    except OSError:  # such as exFAT
        copy_file(path, copy)


class FolderLock:
    """A lock that one process of any machine holds until it ends, however it ends.

    It is a record lock, which a child process does not inherit: loading workers that outlive a killed trainer for a few
    seconds do not keep it, as they would the lock of the package ``filelock``. The file holds machine and process, for
    the message, and is removed with the lock.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._process = 0

    def take(self, otherwise: str) -> None:
        """Take the lock.

        Args:
            otherwise: what to say if another process has it: the reason and the remedy.

        Raises:
            InputError: if another process has it; names the folder, the machine and the process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self._handle is None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(handle, 200).decode(errors="replace").strip()
                os.close(handle)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise InputError(f"{self.path.parent} ({holder or 'no holder named'}): {otherwise}") from error
                return  # a file system without locks
            # The one that had it may have removed the file in between.
            self._handle = handle
            if not self.is_held():
                self._handle = None
                os.close(handle)
        self._process = os.getpid()
        os.truncate(self._handle, 0)
        os.write(self._handle, f"{socket.gethostname()}, process {os.getpid()}\n".encode())

    def is_held(self) -> bool:
        """Whether the lock is ours and its file is still there; true where the file system has no locks."""
        if self._handle is None:
            return self.path.parent.is_dir()
        try:
            return os.path.samestat(os.fstat(self._handle), self.path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Give the lock back; in a child of the process that has it, such as a loading worker, nothing happens."""
        if self._handle is None or self._process != os.getpid():
            return
        if self.is_held():
            self.path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None


def bundle_root(name: str) -> str:
    """Where a bundle is: ``bundles/NAME`` below the working folder, or else the working folder itself.

    So the same command works from the repository's root and within the folder of a bundle that was downloaded.
    """
    return f"bundles/{name}" if Path("bundles", name, "configs").is_dir() else "."


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any, indent: int = 2) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def safe_cell(value: Any) -> Any:
    """A cell that no spreadsheet runs: text like ``=1+1`` gets a quote in front; numbers and ``-0.5`` stay.

    ``plain_cell`` gives the text back.
    """
    if not isinstance(value, str) or not _FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def plain_cell(value: Any) -> Any:
    """The text that ``safe_cell`` made a cell of; anything else as it is."""
    return value[1:] if isinstance(value, str) and value.startswith("'") and _FORMULA.match(value) else value


def write_csv(
    path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Iterable[Any]], delimiter: str = ","
) -> None:
    """Write a table as text, atomically; None and NaN become empty cells."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerow(map(safe_cell, header))
        writer.writerows(["" if value != value else safe_cell(value) for value in row] for row in rows)


def read_json(path: str | os.PathLike[str], object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read JSON.

    Args:
        path: the file.
        object_hook: what to make of each object, from the inside out.

    Raises:
        InputError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_hook=object_hook)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); write it again or restore it from a copy") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as lower-case hexadecimal."""
    return hash_file(path, "sha256")


def file_tag(path: str | os.PathLike[str]) -> str:
    """The first 8 digits of a file's SHA-256, which tell files of one name apart; empty if there is no such file."""
    return sha256_file(path)[:8] if Path(path).is_file() else ""


def hash_file(path: str | os.PathLike[str], kind: str) -> str:
    """A hash of a file's bytes, such as ``sha256`` or ``md5``, as lower-case hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def sha256_json(content: Any, long: str = "") -> str:
    """SHA-256 of ``content`` as canonical JSON (sorted keys, no white space).

    Args:
        content: anything that JSON can hold.
        long: a key of it with a long list, of which one element after the other is looked at.
    """
    encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def canonical(value: Any) -> bytes:
        return encoder.encode(value).encode("utf-8")

    if not isinstance(content, Mapping) or long not in content:
        return hashlib.sha256(canonical(content)).hexdigest()
    digest = hashlib.sha256()
    for place, key in enumerate(sorted(content)):
        digest.update((b"," if place else b"{") + canonical(key) + b":")
        if key != long:
            digest.update(canonical(content[key]))
            continue
        for number, element in enumerate(content[key]):
            digest.update((b"," if number else b"[") + canonical(element))
        digest.update(b"]" if len(content[key]) else b"[]")
    digest.update(b"}")
    return digest.hexdigest()
