# SPDX-License-Identifier: Apache-2.0
"""``volta3d fetch`` against a real server on loopback: what it leaves, prints and refuses."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from archives import tar_of, zip_of
from filelock import FileLock
from unreliable_site import Answer, Site

from volta_components import cli
from volta_components.data.fetch.command import fetch
from volta_components.errors import InputError

SCAN = bytes(range(256)) * 2000
TABLE = b"id,age\n1,30\n"
Manifest = Callable[..., Path]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def toys(site: Site, manifest: Manifest) -> Path:
    """A scan of a known hash and a table of none."""
    site.files.update({"/raw/scan.nii": SCAN, "/table.csv": TABLE})
    files = {"raw/scan.nii": {"sha256": sha256(SCAN)}, "table.csv": {}}
    return manifest(files, next=["volta3d prepare --layout folder --source {output}"])


def visible(folder: Path) -> set[str]:
    """Files that others would take for data."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not path.parts[0].startswith(".")}


def refused(*words: object, output: Path) -> str:
    with pytest.raises(InputError) as error:
        fetch(*map(str, words), output=output)
    return str(error.value)


DONE = {"raw/scan.nii", "table.csv", "fetched.json", "SOURCE.txt"}


def test_files_licence_and_hashes_lie_in_the_folder(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "my toys"
    assert cli.main(["fetch", str(toys), "--output", str(output)]) == 0
    assert visible(output) == DONE and not (output / ".fetch").exists()
    assert (output / "raw" / "scan.nii").read_bytes() == SCAN and (output / "table.csv").read_bytes() == TABLE
    source = (output / "SOURCE.txt").read_text()
    printed = capsys.readouterr().out
    for text in ("Toy volumes", "https://example.org/toys", "CC0 1.0", "Toymaker (2024)"):
        assert text in source and text in printed
    assert sha256(SCAN) in source and sha256(TABLE) in source
    assert "2 files (2 new)" in printed and f"next: volta3d prepare --layout folder --source '{output}'" in printed


def test_finished_work_is_not_done_again(toys: Path, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fetch(toys, output=tmp_path / "d")
    site.asked.clear()
    fetch(toys, output=tmp_path / "d")
    assert site.asked == [] and "2 files (0 new)" in capsys.readouterr().out
    (tmp_path / "d" / "table.csv").unlink()
    fetch(toys, output=tmp_path / "d")
    assert [path for path, _ in site.asked] == ["/table.csv"]


def test_files_that_people_brought_themselves_are_checked_and_kept(toys: Path, site: Site, tmp_path: Path) -> None:
    (tmp_path / "d" / "raw").mkdir(parents=True)
    (tmp_path / "d" / "raw" / "scan.nii").write_bytes(SCAN)
    (tmp_path / "d" / "table.csv").write_bytes(TABLE)
    fetch(toys, output=tmp_path / "d")
    assert site.asked == [] and visible(tmp_path / "d") == DONE


def test_a_file_that_is_there_but_wrong_is_named_and_kept(toys: Path, tmp_path: Path) -> None:
    place = tmp_path / "d" / "raw" / "scan.nii"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"mine")
    message = refused(toys, output=tmp_path / "d")
    for part in ("1 of 2 files", "raw/scan.nii", sha256(SCAN), sha256(b"mine"), "move it away"):
        assert part in message
    assert place.read_bytes() == b"mine" and (tmp_path / "d" / "table.csv").is_file()


def test_wrong_bytes_never_get_the_final_name(toys: Path, site: Site, tmp_path: Path) -> None:
    site.answers["/raw/scan.nii"] = [Answer(body=b"other")]
    message = refused(toys, output=tmp_path / "d")
    for part in ("raw/scan.nii", f"sha256 expected {sha256(SCAN)}, found {sha256(b'other')}", "nothing of it was kept"):
        assert part in message
    assert visible(tmp_path / "d") == DONE - {"raw/scan.nii"}, "other files are there"
    assert not list((tmp_path / "d" / ".fetch").rglob("*.part"))
    del site.answers["/raw/scan.nii"]
    fetch(toys, output=tmp_path / "d")
    assert visible(tmp_path / "d") == DONE


def test_a_file_of_two_versions_is_downloaded_once_more(toys: Path, site: Site, tmp_path: Path) -> None:
    """The server gives no name to a version, so the beginning of the old one was taken for one of the new."""
    site.validators = False
    site.answers["/raw/scan.nii"] = [Answer(cut=1000, body=bytes(len(SCAN))), Answer()]
    fetch(toys, output=tmp_path / "d")
    assert site.ranges("/raw/scan.nii") == ["", "bytes=1000-", ""]
    assert (tmp_path / "d" / "raw" / "scan.nii").read_bytes() == SCAN


def test_too_short_a_length_is_found_by_the_hash(toys: Path, site: Site, tmp_path: Path) -> None:
    site.answers["/raw/scan.nii"] = [Answer(longer=-1000)]
    assert sha256(SCAN[:-1000]) in refused(toys, output=tmp_path / "d")
    assert "raw/scan.nii" not in visible(tmp_path / "d")


def test_an_unknown_hash_is_recorded_and_compared(
    toys: Path, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(toys, output=tmp_path / "d")
    assert "no hash of table.csv is known" in capsys.readouterr().out
    record = json.loads((tmp_path / "d" / "fetched.json").read_text())["files"]
    assert record["table.csv"]["sha256"] == sha256(TABLE)
    (tmp_path / "d" / "table.csv").unlink()
    site.files["/table.csv"] = b"other"
    message = refused(toys, output=tmp_path / "d")
    assert f"table.csv  sha256 expected {sha256(TABLE)}, found {sha256(b'other')}" in message
    assert "fetched.json" in message and "table.csv" not in visible(tmp_path / "d")


def test_md5_where_nothing_better_is_known(site: Site, manifest: Manifest, tmp_path: Path) -> None:
    site.files["/table.csv"] = TABLE
    good = manifest({"table.csv": {"md5": hashlib.md5(TABLE).hexdigest()}})
    fetch(good, output=tmp_path / "good")
    bad = manifest({"table.csv": {"md5": "0" * 32}})
    assert f"md5 expected {'0' * 32}, found" in refused(bad, output=tmp_path / "bad")


def test_each_missing_file_is_named_and_the_others_arrive(toys: Path, site: Site, tmp_path: Path) -> None:
    site.answers["/raw/scan.nii"] = [Answer(status=404)]
    message = refused(toys, output=tmp_path / "d")
    assert "1 of 2 files could not be downloaded:\n" in message
    assert f"raw/scan.nii  {site.address}/raw/scan.nii  404 Not Found" in message and "run the command again" in message
    assert visible(tmp_path / "d") == DONE - {"raw/scan.nii"}
    assert "raw/scan.nii\n" in (source := (tmp_path / "d" / "SOURCE.txt").read_text()) and "not there yet" in source


def test_without_a_network_the_first_file_tells(toys: Path, tmp_path: Path) -> None:
    written = json.loads(toys.read_text())
    for file in written["files"]:
        file["url"] = "https://volta3d.invalid/x"
    toys.write_text(json.dumps(written))
    message = refused(toys, output=tmp_path / "d")
    for part in (
        "(the rest was not tried)",
        "raw/scan.nii",
        "cannot be reached",
        "HTTPS_PROXY",
        f"put the files into {tmp_path / 'd'}",
    ):
        assert part in message
    assert "table.csv" not in message


def test_a_full_disk_is_named_and_what_arrived_is_kept(toys: Path, site: Site, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    site.files["/raw/scan.nii"] = content = SCAN * 8
    toys.write_text(toys.read_text().replace(sha256(SCAN), sha256(content)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * len(SCAN), before[1]))
    try:
        message = refused(toys, output=tmp_path / "d")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written (File too large)" in message and "free some space" in message
    assert "raw/scan.nii" not in visible(tmp_path / "d")
    fetch(toys, output=tmp_path / "d")
    assert site.ranges("/raw/scan.nii")[-1].startswith("bytes=")
    assert (tmp_path / "d" / "raw" / "scan.nii").read_bytes() == content


def test_too_little_space_is_named_before_the_download(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = refused(toys, output=tmp_path / "d")
    assert message.startswith("raw/scan.nii: needs 0.00 GB") and "choose another --output" in message


def test_an_archive_is_unpacked_and_not_kept(site: Site, manifest: Manifest, tmp_path: Path) -> None:
    files = {"one.nii": SCAN, "deep/two.nii": TABLE}
    site.files["/scans.tar"] = content = tar_of(tmp_path / "made.tar", files).read_bytes()
    toys = manifest({"scans.tar": {"sha256": sha256(content), "unpack": "raw/scans"}})
    output = tmp_path / "d"
    fetch(toys, output=output)
    unpacked = {f"raw/scans/{name}" for name in files}
    assert visible(output) == {"fetched.json", "SOURCE.txt", *unpacked}
    assert (output / "raw" / "scans" / "one.nii").read_bytes() == SCAN
    site.asked.clear()
    fetch(toys, output=output)
    assert site.asked == [], "what is unpacked is not downloaded again"
    (output / "raw" / "scans" / "one.nii").unlink()
    (output / "raw" / "scans" / "deep" / "two.nii").write_bytes(b"mine")
    assert "two.nii: 12 bytes expected, 4 found" in refused(toys, output=output)
    (output / "raw" / "scans" / "deep" / "two.nii").unlink()
    fetch(toys, output=output)
    assert unpacked <= visible(output), "what is missing is brought back"


def test_an_archive_of_ones_own_is_kept(site: Site, manifest: Manifest, tmp_path: Path) -> None:
    output = tmp_path / "d"
    output.mkdir()
    content = zip_of(output / "scans.zip", {"one.nii": SCAN}).read_bytes()
    fetch(manifest({"scans.zip": {"sha256": sha256(content), "unpack": "scans"}}), output=output)
    assert site.asked == [] and {"scans.zip", "scans/one.nii"} <= visible(output)


def test_an_archive_that_leads_out_is_refused(site: Site, manifest: Manifest, tmp_path: Path) -> None:
    site.files["/scans.tar"] = tar_of(tmp_path / "made.tar", {"../../evil.nii": b"x"}).read_bytes()
    message = refused(manifest({"scans.tar": {"unpack": "scans"}}), output=tmp_path / "d")
    assert "cannot be unpacked" in message and "evil.nii" in message
    assert not list(tmp_path.rglob("evil.nii")) and visible(tmp_path / "d") == {"SOURCE.txt"}


def test_an_unpacked_archive_takes_no_space_while_another_file_is_missing(
    site: Site, manifest: Manifest, tmp_path: Path
) -> None:
    site.files["/scans.tar"] = tar_of(tmp_path / "made.tar", {"one.nii": SCAN}).read_bytes()
    toys = manifest({"scans.tar": {"unpack": "scans"}, "table.csv": {}})
    assert "404" in refused(toys, output=tmp_path / "d")
    assert (tmp_path / "d" / "scans" / "one.nii").is_file() and not list((tmp_path / "d" / ".fetch").glob("*.part"))
    site.files["/table.csv"] = TABLE
    fetch(toys, output=tmp_path / "d")
    assert site.ranges("/scans.tar") == [""]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_is_killed_resumes(toys: Path, site: Site, tmp_path: Path, number: signal.Signals) -> None:
    site.answers["/raw/scan.nii"] = [Answer(cut=400_000, stalls=True), Answer()]
    words = [sys.executable, "-m", "volta_components.cli", "fetch", str(toys), "--output", str(tmp_path / "d")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    part = tmp_path / "d" / ".fetch" / "raw" / "scan.nii.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 300_000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert (b"volta3d fetch: interrupted" in error) == (number == signal.SIGINT)
    assert visible(tmp_path / "d") == {"SOURCE.txt"}
    size = part.stat().st_size
    fetch(toys, output=tmp_path / "d")
    assert visible(tmp_path / "d") == DONE and f"bytes={size}-" in site.ranges("/raw/scan.nii")
    assert (tmp_path / "d" / "raw" / "scan.nii").read_bytes() == SCAN


def test_two_processes_do_not_write_into_one_folder(toys: Path, tmp_path: Path) -> None:
    (tmp_path / "d" / ".fetch").mkdir(parents=True)
    with FileLock(tmp_path / "d" / ".fetch" / "lock"):
        assert "another process fetches into it" in refused(toys, output=tmp_path / "d")


def test_a_folder_holds_one_resource(toys: Path, tmp_path: Path) -> None:
    fetch(toys, output=tmp_path / "d")
    toys.write_text(toys.read_text().replace('"name": "toys"', '"name": "dolls"'))
    assert "holds toys; give another --output" in refused(toys, output=tmp_path / "d")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_is_no_folder(toys: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in refused(toys, output=tmp_path / place)


def test_the_list_downloads_nothing(toys: Path, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "anatomies: " in printed and "ixi: " in printed and "CC BY-SA 3.0" in printed and "Apache" in printed
    assert cli.main(["fetch", str(toys), "--list"]) == 0
    printed = capsys.readouterr().out
    assert f"raw/scan.nii  {site.address}/raw/scan.nii  sha256 {sha256(SCAN)}" in printed
    assert f"table.csv  {site.address}/table.csv  hash not known" in printed and site.asked == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ixi"], "volta3d fetch: --output is missing; give a folder for the data, such as --output data/ixi"),
        (["-o", "d"], "volta3d fetch: 0 resources named; name one: anatomies, ixi, or the path of a manifest"),
        (["ixi", "anatomies", "-o", "d"], "volta3d fetch: 2 resources named; name one"),
        (["oasis", "-o", "d"], "volta3d fetch: no resource oasis; there are anatomies, ixi."),
    ],
)
def test_what_is_wrong_with_the_words(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", *words]) == 2
    assert capsys.readouterr().err.startswith(expected)
    assert not Path("d").exists()
