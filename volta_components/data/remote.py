# SPDX-License-Identifier: Apache-2.0
"""Local copies of files behind URLs (http, s3, hf, ...), no more than fit in a cache.

The variable VOLTA3D_CACHE names the cache's folder (~/.cache/volta3d/files by default), VOLTA3D_CACHE_GB its size (100
by default); what was not used for longest goes first. Processes of one machine share the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from filelock import FileLock

from volta_components.data.unusable import UnusableVolume, one_line
from volta_components.files import atomic_path

_REMEDY = "look at the address and the network"


def is_remote(name: str) -> bool:
    """Whether a name is a URL."""
    return "://" in name


def _place(url: str) -> Path:
    folder = Path(os.environ.get("VOLTA3D_CACHE") or "~/.cache/volta3d/files").expanduser()
    return folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{Path(url).name}"


def local_copy(name: str) -> Path:
    """The file itself, or the local copy of what is behind a URL, which is fetched by one process while others wait.

    Raises:
        UnusableVolume: if it cannot be fetched, or does not fit in the cache.
    """
    if not is_remote(name):
        return Path(name)
    path = _place(name)
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)  # used now
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            _fetch(name, path)
    return path


def _fetch(url: str, path: Path) -> None:
    import fsspec  # few need it

    try:
        system, place = fsspec.url_to_fs(url)
        size = system.size(place)
        if size is not None:
            _make_room(path.parent, size, url)
        with atomic_path(path) as temporary:
            system.get_file(place, str(temporary))
            found = temporary.stat().st_size
            if size is not None and found != size:
                raise OSError(f"{found:,} of {size:,} bytes came")
    except ImportError as error:
        raise UnusableVolume(url, f"its kind of address needs another package ({error})", "install it") from error
    except UnusableVolume:
        raise
    except Exception as error:  # each kind of address has errors of its own
        raise UnusableVolume(url, f"cannot be fetched ({one_line(error)})", _REMEDY) from error


def _make_room(folder: Path, size: int, url: str) -> None:
    """Remove what was not used for longest until a file of ``size`` bytes fits."""
    told = os.environ.get("VOLTA3D_CACHE_GB") or "100"
    limit = float(told) * 1e9 if told.replace(".", "", 1).isdecimal() else 0.0
    if size > limit:
        reason = f"{size / 1e9:.2f} GB do not fit in a cache of VOLTA3D_CACHE_GB={told}"
        raise UnusableVolume(url, reason, "give the cache more, in GB")
    files = []
    for path in folder.iterdir():
        if not path.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(length for _, length, _ in files)
    for _, length, path in sorted(files):
        if total + size <= limit:
            return
        path.unlink(missing_ok=True)
        total -= length


def forget(name: str) -> None:
    """Remove the local copy of what is behind a URL, which is not what it should be; the next use fetches it again."""
    if is_remote(name):
        _place(name).unlink(missing_ok=True)
