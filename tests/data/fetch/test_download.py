# SPDX-License-Identifier: Apache-2.0
"""One file over HTTP from a real server on loopback that breaks off, lies, changes and is busy."""

from __future__ import annotations

import gzip
import resource
import shutil
import socket
from pathlib import Path

import pytest
from unreliable_site import Answer, Site

from volta_components.data.fetch.download import (
    TRIES,
    DiskFull,
    DownloadError,
    NoConnection,
    download,
    forget,
    open_session,
)

CONTENT = bytes(range(256)) * 4000  # a megabyte
URL = "/scan.nii"


def get(site: Site, part: Path, is_known: bool = True, copies: int = 1) -> bool:
    with open_session() as session:
        return download(session, site.address + URL, part, "scan.nii", is_known, copies)


@pytest.fixture
def part(site: Site, tmp_path: Path) -> Path:
    site.files[URL] = CONTENT
    return tmp_path / "scan.nii.part"


def test_a_file_is_downloaded_in_one_answer(site: Site, part: Path) -> None:
    assert get(site, part) is False
    assert part.read_bytes() == CONTENT
    assert site.ranges(URL) == [""]


@pytest.mark.parametrize("is_known", [True, False])
def test_a_broken_download_resumes_where_it_broke(site: Site, part: Path, is_known: bool) -> None:
    site.answers[URL] = [Answer(cut=300_000), Answer(cut=200_000), Answer()]
    assert get(site, part, is_known) is True
    assert part.read_bytes() == CONTENT
    assert site.ranges(URL) == ["", "bytes=300000-", "bytes=500000-"]
    assert all("If-Range" in headers for _, headers in site.asked[1:])


def test_a_later_command_resumes_too(site: Site, part: Path) -> None:
    site.answers[URL] = [Answer(cut=300_000), Answer(status=404)]
    with pytest.raises(DownloadError, match="404 Not Found"):
        get(site, part)
    assert part.stat().st_size == 300_000
    site.answers.clear()
    assert get(site, part) is True
    assert part.read_bytes() == CONTENT and site.ranges(URL)[-1] == "bytes=300000-"


def test_a_server_that_ignores_ranges_begins_again(site: Site, part: Path) -> None:
    site.answers[URL] = [Answer(cut=300_000), Answer(ignores_range=True)]
    get(site, part)
    assert part.read_bytes() == CONTENT


def test_a_file_that_changed_in_between_is_not_joined(site: Site, part: Path) -> None:
    other = bytes(reversed(CONTENT))
    site.answers[URL] = [Answer(cut=300_000, body=other), Answer()]
    get(site, part, is_known=False)
    assert part.read_bytes() == CONTENT


def test_a_server_that_ignores_if_range_is_found_out_by_its_etag(site: Site, part: Path) -> None:
    """It sends the rest of the new version after the beginning of the old one."""
    place = f"bytes 300000-{len(CONTENT) - 1}/{len(CONTENT)}"
    rest = Answer(status=206, headers={"ETag": '"new"', "Content-Range": place}, body=CONTENT[300_000:])
    site.answers[URL] = [Answer(cut=300_000, body=bytes(len(CONTENT))), rest, Answer()]
    get(site, part, is_known=False)
    assert part.read_bytes() == CONTENT


def test_without_a_validator_only_a_known_file_is_resumed(site: Site, part: Path) -> None:
    site.validators = False
    for is_known in (True, False):
        forget(part)
        site.asked.clear()
        site.answers[URL] = [Answer(cut=300_000), Answer()]
        get(site, part, is_known)
        assert part.read_bytes() == CONTENT
        assert site.ranges(URL) == ["", "bytes=300000-" if is_known else ""]


def test_a_weak_etag_promises_nothing(site: Site, part: Path) -> None:
    """The date does, where there is one."""
    weak = {"ETag": 'W/"1"', "Last-Modified": "Sat, 06 Jan 2024 10:00:00 GMT"}
    site.answers[URL] = [Answer(cut=300_000, headers=weak), Answer(status=404)]
    with pytest.raises(DownloadError):
        get(site, part)
    assert site.asked[-1][1]["If-Range"] == "Sat, 06 Jan 2024 10:00:00 GMT"


def test_a_beginning_of_another_address_is_not_joined(site: Site, part: Path) -> None:
    part.write_bytes(b"x" * 1000)
    get(site, part)
    assert part.read_bytes() == CONTENT and site.ranges(URL) == [""]


def test_another_range_than_asked_for_is_not_joined(site: Site, part: Path) -> None:
    site.answers[URL] = [Answer(cut=300_000), Answer(shift=10), Answer()]
    get(site, part)
    assert part.read_bytes() == CONTENT


def test_a_whole_part_needs_no_more_bytes(site: Site, part: Path) -> None:
    """As a process leaves it that dies right after the last byte."""
    get(site, part)
    get(site, part)
    assert part.read_bytes() == CONTENT and site.ranges(URL) == ["", f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_too_long_is_thrown_away(site: Site, part: Path) -> None:
    get(site, part)
    part.write_bytes(CONTENT + b"more")
    get(site, part)
    assert part.read_bytes() == CONTENT


@pytest.mark.parametrize("validators", [True, False])
def test_a_server_that_announces_more_than_it_has_is_given_up(site: Site, part: Path, validators: bool) -> None:
    """It is asked for the rest, and never sends a whole file."""
    site.validators = validators
    site.answers[URL] = [Answer(longer=1000, ignores_range=True)]
    with pytest.raises(DownloadError, match=rf"broke off at {len(CONTENT):,} bytes .*{TRIES} times in a row"):
        get(site, part)
    assert len(site.asked) == TRIES + 1


def test_a_length_of_another_whole_is_noticed(site: Site, part: Path) -> None:
    """The rest ends where the server says, but the file does not."""
    wrong = {"Content-Range": f"bytes 300000-{len(CONTENT) + 4}/{len(CONTENT) + 5}"}
    site.answers[URL] = [Answer(cut=300_000), Answer(headers=wrong), Answer(ignores_range=True)]
    get(site, part)
    assert part.read_bytes() == CONTENT and len(site.asked) == 3


def test_a_busy_server_is_asked_again(site: Site, part: Path) -> None:
    site.answers[URL] = [Answer(status=503, headers={"Retry-After": "0"}), Answer(status=502), Answer()]
    get(site, part)
    assert part.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "expected", "asked"),
    [(404, "404 Not Found", 1), (403, "403 Forbidden", 1), (503, "503 Service Unavailable", 5)],
)
def test_an_answer_without_the_file_is_named(site: Site, part: Path, status: int, expected: str, asked: int) -> None:
    site.answers[URL] = [Answer(status=status)]
    with pytest.raises(DownloadError, match=expected):
        get(site, part)
    assert len(site.asked) == asked and not part.exists()


def test_redirects_are_followed(site: Site, part: Path) -> None:
    site.files["/elsewhere"] = CONTENT
    site.answers[URL] = [Answer(status=302, headers={"Location": "/elsewhere"})]
    get(site, part)
    assert part.read_bytes() == CONTENT


def test_redirects_in_a_circle_end(site: Site, part: Path) -> None:
    site.answers[URL] = [Answer(status=302, headers={"Location": URL})]
    with pytest.raises(DownloadError, match="redirects"):
        get(site, part)


def test_bytes_are_kept_as_they_lie_on_the_server(site: Site, part: Path) -> None:
    """Some servers call a gzip file "encoded", and a library that unpacks it gives another file."""
    packed = gzip.compress(CONTENT)
    site.answers[URL] = [Answer(headers={"Content-Encoding": "gzip"}, body=packed)]
    get(site, part)
    assert part.read_bytes() == packed
    assert site.asked[0][1]["Accept-Encoding"] == "identity"


def test_a_login_page_is_not_taken_for_a_file_of_unknown_hash(site: Site, part: Path) -> None:
    site.answers[URL] = [Answer(headers={"Content-Type": "text/html; charset=utf-8"}, body=b"<html>Log in</html>")]
    with pytest.raises(DownloadError, match="a web page, not the file"):
        get(site, part, is_known=False)
    assert not part.exists()


def test_nobody_listens(part: Path, site: Site) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        site.address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(NoConnection, match=r"cannot be reached .*Connection refused"):
        get(site, part)


def test_a_name_that_does_not_resolve(part: Path, site: Site) -> None:
    site.address = "http://volta3d.invalid"
    with pytest.raises(NoConnection, match=r"cannot be reached .*volta3d\.invalid"):
        get(site, part)


@pytest.mark.parametrize(("free", "copies", "fits"), [(1.5, 1, True), (0.9, 1, False), (1.5, 2, False)])
def test_space_is_checked_before_the_first_byte(
    site: Site, part: Path, monkeypatch: pytest.MonkeyPatch, free: float, copies: int, fits: bool
) -> None:
    usage = shutil.disk_usage(part.parent)._replace(free=int(free * len(CONTENT)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    if fits:
        get(site, part, copies=copies)
    else:
        with pytest.raises(DiskFull, match="GB are free on the disk of"):
            get(site, part, copies=copies)
        assert not part.exists()


def test_only_the_rest_must_fit(site: Site, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.answers[URL] = [Answer(cut=1_000_000), Answer(status=404)]
    with pytest.raises(DownloadError):
        get(site, part)
    site.answers.clear()
    usage = shutil.disk_usage(part.parent)._replace(free=len(CONTENT) - 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    get(site, part)
    assert part.read_bytes() == CONTENT


def test_what_was_written_before_the_disk_was_full_is_kept(site: Site, part: Path) -> None:
    """A limit of the operating system on the size of a file refuses the bytes in the middle of a download."""
    content = site.files[URL] = CONTENT * 4
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * len(CONTENT), before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            get(site, part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < part.stat().st_size < len(content)
    get(site, part)
    assert part.read_bytes() == content and site.ranges(URL)[-1].startswith("bytes=")
