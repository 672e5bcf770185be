# SPDX-License-Identifier: Apache-2.0
"""A real MONAI Label server, and how to talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib

ROOT = Path(__file__).parents[2]
LABEL = ROOT / ".venv-label"
FORM = "application/x-www-form-urlencoded"
HARP = "harp_hippocampus_phantom_tiny"


@dataclass
class Server:
    """A running server and how to talk to it."""

    address: str
    process: subprocess.Popen[str]
    output: Path
    log: Path

    def request(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(
            self.address + path, data=body, method=method, headers={"Content-Type": kind} if body else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise AssertionError(f"{method} {path}: {error.code} {error.read()[:500]!r}\n{tail}") from error

    def json(self, method: str, path: str, content: Any = None) -> Any:
        return json.loads(self.request(method, path, None if content is None else json.dumps(content).encode()))

    def mask(self, scan: str, folder: Path) -> nib.Nifti1Image:
        path = folder / f"{scan}_{uuid.uuid4().hex}.nii.gz"
        path.write_bytes(self.request("POST", f"/infer/{HARP}?image={scan}&output=image"))
        return nib.load(path)

    def train(self, **settings: Any) -> dict[str, Any]:
        """Train to the end; how the task ended."""
        return self.ended(self.json("POST", f"/train/{HARP}", {"device": "cpu", "multi_gpu": False, **settings})["id"])

    def ended(self, task: str) -> dict[str, Any]:
        """Wait for a training's end; how it ended."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            found = [row for row in self.json("GET", "/train/?all=true") if row["id"] == task]
            if found and found[0]["status"] in ("DONE", "ERROR", "STOPPED"):
                result: dict[str, Any] = found[0]
                return result
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text(errors="replace")[-3000:])


def command(*arguments: str) -> list[str]:
    return [str(LABEL / "bin" / "python"), str(ROOT / "label" / "serve.py"), *arguments]


def environment() -> dict[str, str]:
    """Without this environment's settings, and with no network but the machine's own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    nowhere = "http://127.0.0.1:9"
    return {**kept, "http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": "127.0.0.1,localhost"}


@contextmanager
def running(words: list[str], address: str, app: Path) -> Iterator[Server]:
    """A server, once it has said how to connect, until it is told to end."""
    output = app.parent / f"{app.name}_output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment(), text=True
        )
    made = Server(address, process, output, app / "logs" / "server.log")
    try:
        deadline = time.monotonic() + 180
        while f"MONAI Label is at {address}" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, made.log.read_text()
            time.sleep(0.3)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    with socket.socket() as sock:  # nothing of it goes on
        assert sock.connect_ex((address.split("/")[2].split(":")[0], int(address.rsplit(":", 1)[1]))) != 0
