# SPDX-License-Identifier: Apache-2.0
"""Download one file over HTTP, and resume where it broke off.

``requests`` and urllib3's ``Retry`` do connections, redirects, proxies, busy servers and ``Retry-After``. None of the
libraries at hand resumes a broken body safely: MONAI's ``download_url``, ``pooch`` and ``torch.hub`` begin again;
nilearn's private downloader resumes without asking whether the file is still the same (``If-Range``). This module adds
that part alone.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from volta_components._version import __version__
from volta_components.files import free_bytes, read_json, write_json

CHUNK = 1 << 16
TIMEOUT = (15.0, 60.0)  # seconds until a server answers, and without a byte
BACKOFF = 0.5  # seconds before a second try; each further one waits twice as long
TRIES = 5  # in a row without a new byte
BUSY = (429, 500, 502, 503, 504)


class DownloadError(Exception):
    """A file that could not be downloaded; the message says why."""


class NoConnection(DownloadError):
    """A server that cannot be reached, so that trying its other files is of no use."""


class DiskFull(DownloadError):
    """Less free space than a file needs."""


def open_session() -> requests.Session:
    """A session that tries again where a server is busy or a connection fails."""
    session = requests.Session()
    retries = urllib3.Retry(
        total=10,
        connect=2,
        read=2,
        status=4,
        redirect=10,
        status_forcelist=BUSY,
        backoff_factor=BACKOFF,
        raise_on_status=False,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    # As they are: what a server compressed on the way could not be resumed, and has another hash.
    session.headers.update({"User-Agent": f"volta3d/{__version__}", "Accept-Encoding": "identity"})
    return session


def download(
    session: requests.Session, url: str, part: Path, label: str, is_known: bool = True, copies: int = 1
) -> bool:
    """Download ``url`` to ``part``, or the rest of it where ``part`` holds its beginning.

    When this raises, or the process dies, ``part`` and the JSON beside it hold what a later call needs to resume.

    Args:
        session: see ``open_session``.
        url: the address.
        part: the unfinished file; nobody else reads it.
        label: name for the progress bar.
        is_known: whether a hash of the file is known. If not, a beginning is only kept where the server can say that
            the file is still the same.
        copies: how many times the file's size must be free on the disk: 2 for an archive that will be unpacked.

    Returns:
        Whether the file was put together from several answers.

    Raises:
        DownloadError: if it cannot be downloaded.
        OSError: if ``part`` cannot be written.
    """
    failures, most, is_joined = 0, _size(part), _size(part) > 0
    while True:
        try:
            _request(session, url, part, label, is_known, copies)
            return is_joined
        except urllib3.exceptions.HTTPError as error:
            reason = f"broke off at {_size(part):,} bytes ({type(error).__name__})"
        except _Unusable as error:
            reason = str(error)
        is_joined = True
        failures = 0 if _size(part) > most else failures + 1
        most = max(most, _size(part))
        if failures >= TRIES:
            raise DownloadError(f"{reason}, {failures} times in a row")
        time.sleep(BACKOFF * 2.0**failures)


class _Unusable(Exception):
    """An answer that does not fit the beginning that is here."""


def _request(session: requests.Session, url: str, part: Path, label: str, is_known: bool, copies: int) -> None:
    """One request, and its body to the end."""
    start, headers = _size(part), {}
    if start:
        validator = _validator(part, url)
        if validator:
            headers = {"Range": f"bytes={start}-", "If-Range": validator}
        elif validator is not None and is_known:
            headers = {"Range": f"bytes={start}-"}
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise NoConnection(f"cannot be reached ({_innermost(error)})") from error
    except requests.RequestException as error:
        raise DownloadError(_innermost(error)) from error
    with response:
        announced = response.headers.get("Content-Length", "")
        length = int(announced) if announced.isdecimal() else None
        match response.status_code:
            case 200:
                start, total = 0, length
            case 206:
                found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
                if not found or int(found[1]) != start:
                    part.unlink()
                    raise _Unusable("the server sent another range than was asked for")
                if _strong(response.headers) not in ("", _validator(part, url)):
                    part.unlink()
                    raise _Unusable("the file on the server has changed")
                total = int(found[2]) if found[2] != "*" else None if length is None else start + length
            case 416 if start:
                if response.headers.get("Content-Range") == f"bytes */{start}":
                    return
                part.unlink()
                raise _Unusable("the server has fewer bytes than were downloaded")
            case code:
                raise DownloadError(f"{code} {response.reason}")
        if not is_known and "text/html" in response.headers.get("Content-Type", "") and ".htm" not in label:
            raise DownloadError("the server sent a web page, not the file; a login page?")
        needed, free = (total or 0) * copies - start, free_bytes(part.parent)
        if needed > free:
            where = f"free on the disk of {part.parent}"
            raise DiskFull(f"needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are {where}")
        if not start:
            part.unlink(missing_ok=True)  # first, so that an old beginning never gets the new version's name
            write_json(_state(part), {"url": url, "validator": _strong(response.headers)})
        _write(response, part, start, total, label)


def _write(response: requests.Response, part: Path, start: int, total: int | None, label: str) -> None:
    with (
        part.open("ab") as stream,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=label, miniters=1) as bar,
    ):
        # The bytes as they lie on the server: some servers call a .gz file "encoded", and requests would unpack it.
        for chunk in response.raw.stream(CHUNK, decode_content=False):
            stream.write(chunk)
            bar.update(len(chunk))
        stream.flush()
    if total is not None and _size(part) != total:
        raise _Unusable(f"the server announced {total:,} bytes and sent {_size(part):,}")


def forget(part: Path) -> None:
    """Remove an unfinished file and what was noted about it."""
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _validator(part: Path, url: str) -> str | None:
    """What the server called this version of the file; empty if it gave no name, None if nothing is known."""
    path = _state(part)
    state = read_json(path) if path.is_file() else {}
    return str(state["validator"]) if state.get("url") == url else None


def _strong(headers: Any) -> str:
    """The name of a version that ``If-Range`` takes: weak ETags do not promise the same bytes."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _innermost(error: BaseException) -> str:
    """The reason at the bottom of what urllib3 and requests wrap into each other."""
    wrapped = next((each for each in error.args if isinstance(each, BaseException)), None)
    inner = getattr(error, "reason", None) or wrapped
    if isinstance(inner, BaseException):
        return _innermost(inner)
    return re.sub(r"^<.*?>: |^\w+\(.*?\): ", "", str(inner or error))
