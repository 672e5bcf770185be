# SPDX-License-Identifier: Apache-2.0
"""Shards behind a URL, served by this machine: fetched once, kept within a limit, and never taken half."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prepared import make_prepared

from volta_components.data.checks import check_contents, check_volumes
from volta_components.data.datalist import datalist_hash, load_datalist
from volta_components.data.places import sha256_of
from volta_components.data.remote import local_copy
from volta_components.data.shards import pack_data
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.training.stamps import make_stamps

SHAPE = (40, 40, 40)


class Server(ThreadingHTTPServer):
    """Files by name, how often each was asked for, and names of those that are cut on their way."""

    files: dict[str, bytes]
    asked: list[str]
    cut: set[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, has_body: bool) -> None:
        name = self.path.rpartition("/")[2]
        content = self.server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.server.asked.append(name)
            self.wfile.write(content[: len(content) // 2] if name in self.server.cut else content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VOLTA3D_CACHE", str(tmp_path / "cache"))
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.cut = {}, [], set()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Path:
    """A datalist whose shards, of three volumes each, are behind a URL."""
    pack_data(make_prepared(tmp_path / "data", 6, 2, SHAPE), tmp_path / "packed", shard_mb=1)
    for path in (tmp_path / "packed" / "shards").iterdir():
        server.files[path.name] = path.read_bytes()
        path.unlink()
    content = read_json(tmp_path / "packed" / "datalist.json")
    address = f"http://127.0.0.1:{server.server_port}/"
    for item in content["training"]:
        item["image"] = address + item["image"]
    write_json(tmp_path / "packed" / "datalist.json", {**content, "hash": datalist_hash(content)})
    return tmp_path / "packed"


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[2] for path in (tmp_path / "cache").iterdir() if path.name[0] != ".")


def test_a_shard_is_fetched_once_and_only_when_it_is_read(remote: Path, server: Server, tmp_path: Path) -> None:
    datalist = load_datalist(remote)
    check_volumes(datalist)
    assert make_stamps(datalist.items).unique().tolist() == [-1]
    assert server.asked == []
    for item in datalist.items:
        check_contents(item)
    assert server.asked == ["00000.tar", "00001.tar"] == cached(tmp_path)
    check_volumes(datalist, deep=True)
    assert len(server.asked) == 2


def test_the_cache_keeps_its_limit(
    remote: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not used for longest goes; what is larger than all of it is refused."""
    items = load_datalist(remote).items
    size = len(server.files["00000.tar"])
    monkeypatch.setenv("VOLTA3D_CACHE_GB", str(1.5 * size / 1e9))
    for index in (0, 3, 4, 1):
        check_contents(items[index])
    assert server.asked == ["00000.tar", "00001.tar", "00000.tar"] and cached(tmp_path) == ["00000.tar"]
    for limit in ("0.0001", "much"):
        monkeypatch.setenv("VOLTA3D_CACHE_GB", limit)
        with pytest.raises(
            InputError, match=f"^sub-0003: http.*GB do not fit in a cache of VOLTA3D_CACHE_GB={limit}; give"
        ):
            check_contents(items[3])


def read(image: str) -> str:
    return sha256_of(image)


def test_two_processes_share_what_one_fetches(remote: Path, server: Server) -> None:
    items = load_datalist(remote).items
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(read, [items[0]["image"], items[1]["image"]], chunksize=1)
    assert found == [items[0]["sha256"], items[1]["sha256"]]
    assert server.asked == ["00000.tar"]


def test_a_broken_download_leaves_nothing_and_is_named(remote: Path, server: Server, tmp_path: Path) -> None:
    item = load_datalist(remote).items[0]
    server.cut.add("00000.tar")
    with pytest.raises(InputError, match=r"^sub-0000: http:.*00000.tar: cannot be fetched \(.*look at the address"):
        check_contents(item)
    assert cached(tmp_path) == [] and not list((tmp_path / "cache").glob(".partial*"))
    server.cut.clear()
    check_contents(item)
    del server.files["00001.tar"]
    with pytest.raises(InputError, match=r"^sub-0003: http:.*00001.tar: cannot be fetched"):
        check_contents(load_datalist(remote).items[3])
    with pytest.raises(InputError, match=r"nosuch://x/y.tar: cannot be fetched \(Protocol not known"):
        local_copy("nosuch://x/y.tar")


def test_a_wrong_content_is_named_and_fetched_again(remote: Path, server: Server, tmp_path: Path) -> None:
    item = load_datalist(remote).items[2]
    whole = server.files["00000.tar"]
    start = int(item["image"].rpartition("@")[2].partition(":")[0])
    server.files["00000.tar"] = whole[: start + 1000] + b"x" + whole[start + 1001 :]
    with pytest.raises(InputError, match=r"^sub-0002: .*not what was prepared .*will be fetched again"):
        check_contents(item)
    assert cached(tmp_path) == []
    server.files["00000.tar"] = whole
    check_contents(item)
