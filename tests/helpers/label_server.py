# SPDX-License-Identifier: Apache-2.0
"""A real MONAI Label server, and how to talk to it."""

from __future__ import annotations

import importlib.util
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
import pytest
from doc_blocks import Block, blocks_run_by
from labelled_scans import SIDE

ROOT = Path(__file__).parents[2]
LABEL = ROOT / ".venv-label"
FORM = "application/x-www-form-urlencoded"
HARP = "harp_hippocampus_phantom_tiny"
# What the page's requests name: the model that ships, which is served where no bundle is given.
STARTER = "harp_hippocampus_phantom"
CLASSES = {"ixi_sex_phantom_tiny": ["male", "female"], "aibl_ad_phantom_tiny": ["healthy", "ad"]}
# Sizes at which a training takes seconds; packed as an overlay, as the quick start's sizes are.
SMALL: dict[str, Any] = {
    "suffix": "_phantom_tiny",
    "spacing": 1.0,
    "volume_size": [SIDE] * 3,
    "image_size": [32, 16, 16],
    "feature_size": 8,
    "hidden_size": 24,
    "mlp_dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "unfrozen_blocks": 2,
    "learning_rate": 0.005,
    "foreground_share": 0.9,
    "crops_per_volume": 1,
    "num_workers": 0,
}


@dataclass
class Server:
    """A running server and how to talk to it."""

    address: str
    process: subprocess.Popen[str]
    output: Path
    log: Path

    def request(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json", **headers: str
    ) -> bytes:
        request = urllib.request.Request(
            self.address + path,
            data=body,
            method=method,
            headers={**headers, **({"Content-Type": kind} if body else {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise AssertionError(f"{method} {path}: {error.code} {error.read()[:500]!r}\n{tail}") from error

    def refused(self, method: str, path: str, body: bytes | None = None, kind: str = FORM, **headers: str) -> str:
        """The status and the sentence of a request that is refused."""
        with pytest.raises(AssertionError) as caught:
            self.request(method, path, body, kind, **headers)
        assert isinstance(caught.value.__cause__, urllib.error.HTTPError)
        return str(caught.value).splitlines()[0]

    def upload(
        self, path: str, file: Path, field: str = "file", name: str | None = None, method: str = "PUT", **params: Any
    ) -> Any:
        """Send a file as a form, as clients do; the answer, or the text of a refusal."""
        words = ["curl", "--silent", "-X", method, "-F", f"{field}=@{file};filename={name or file.name}"]
        words += ["-F", f"params={json.dumps(params)}", self.address + path]
        return json.loads(subprocess.run(words, capture_output=True, check=True, env=environment()).stdout)

    def client(self, folder: Path) -> Any:
        """The client of 3D Slicer's module, from the server's environment; files that it fetches go to ``folder``."""
        words = [LABEL / "bin" / "python", "-c", "import monailabel.client.client as c; print(c.__file__)"]
        path = subprocess.run(words, capture_output=True, text=True, check=True, env=environment()).stdout.strip()
        spec = importlib.util.spec_from_file_location("monailabel_client", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.MONAILabelClient(self.address, str(folder))

    def json(self, method: str, path: str, content: Any = None) -> Any:
        return json.loads(self.request(method, path, None if content is None else json.dumps(content).encode()))

    def mask(self, scan: str, folder: Path) -> nib.Nifti1Image:
        path = folder / f"{scan}_{uuid.uuid4().hex}.nii.gz"
        path.write_bytes(self.request("POST", f"/infer/{HARP}?image={scan}&output=image"))
        return nib.load(path)

    def train(self, **settings: Any) -> dict[str, Any]:
        """Train to the end; how the task ended."""
        return self.ended(self.json("POST", f"/train/{HARP}", {"device": "cpu", **settings})["id"])

    def ended(self, task: str, kind: str = "train/") -> dict[str, Any]:
        """Wait for a task's end; how it ended."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            found = [row for row in self.json("GET", f"/{kind}?all=true") if row["id"] == task]
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
def running(words: list[str], address: str, app: Path, **settings: str) -> Iterator[Server]:
    """A server, once it has said how to connect, until it is told to end."""
    output = app.parent / f"{app.name}_output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment() | settings, text=True
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


def page_blocks() -> list[Block]:
    """Blocks of docs/monai_label.md that say that this test runs them."""
    return blocks_run_by("docs/monai_label.md", "make test-label")
