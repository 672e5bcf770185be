# SPDX-License-Identifier: Apache-2.0
"""A bad web server, and manifests of what it serves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from unreliable_site import Site, unreliable_site

from volta_components.data.fetch import download


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server on loopback; nobody waits for it."""
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with unreliable_site() as site:
        yield site


@pytest.fixture
def manifest(site: Site, tmp_path: Path) -> Callable[..., Path]:
    """Write a manifest of files that the site serves: ``{path: {"sha256": ..., "unpack": ...}}``."""

    def write(files: dict[str, dict[str, str]], **more: object) -> Path:
        content = {
            "name": "toys",
            "title": "Toy volumes",
            "homepage": "https://example.org/toys",
            "licence": "CC0 1.0",
            "citation": "Toymaker (2024)",
            "files": [{"path": path, "url": f"{site.address}/{path}", **rest} for path, rest in files.items()],
            **more,
        }
        path = tmp_path / "toys.json"
        path.write_text(json.dumps(content))
        return path

    return write
