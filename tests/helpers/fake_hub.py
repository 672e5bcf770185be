# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on loopback: the few requests that its client makes for a repository of files, and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"
COMMIT = "1" * 40


@dataclass
class Repo:
    """What the Hub has of a repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """The state of the server.

    Attributes:
        faults: a pattern of "METHOD path", and what is answered: a status, or None where the connection is cut.
        seen: every request.
    """

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, int | None] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {path}"
        hub.seen.append(request)
        for pattern, status in hub.faults.items():
            if re.search(pattern, request):
                if status is None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    self._answer({"error": f"no: {status}"}, status)
                return
        if request.startswith("PUT /lfs/"):
            hub.stored[path.removeprefix("/lfs/")] = body
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            return self._answer(b"")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        if request == "GET /api/whoami-v2":
            return self._answer({"name": "ann", "type": "user", "orgs": [{"name": "lab"}]})
        if request == "POST /api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if request == "POST /api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'ann'}/{wanted['name']}"
            hub.repos[name] = Repo(wanted["visibility"] == "private" if "visibility" in wanted else wanted["private"])
            return self._answer({"url": f"{hub.address}/{name}"})
        found = re.match(r"(?:/api/models)?/([\w-]+/[\w-]+)(?:\.git/info)?(?:/(.*))?$", path)
        if not found or found[1] not in hub.repos:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        self._in_repo(found[1], hub.repos[found[1]], found[2] or "", body)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _in_repo(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        hub = self.hub
        if rest == "" or rest.startswith("revision/"):
            siblings = [{"rfilename": path} for path in repo.files]
            self._answer({"id": name, "private": repo.private, "sha": COMMIT, "siblings": siblings})
        elif rest == "refs":
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": COMMIT} for tag in repo.tags]
            self._answer({"branches": [], "converts": [], "tags": tags})
        elif rest.startswith("tree/"):
            rows = [{"type": "file", "path": path, "size": len(c), "oid": COMMIT} for path, c in repo.files.items()]
            self._answer(rows)
        elif rest == "preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".pt") else "regular" for path in files}
            self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif rest == "lfs/objects/batch":
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.address}/lfs/{wanted['oid']}", "header": {}}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif rest == "commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo.files[value["path"]] = hub.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    del repo.files[value["path"]]
            address = f"{hub.address}/{name}/commit/{COMMIT}"
            self._answer({"success": True, "commitUrl": address, "commitOid": COMMIT})
        elif rest.startswith("tag/"):
            repo.tags.append(json.loads(body)["tag"])
            self._answer({})
        elif rest.startswith("resolve/"):
            content = repo.files[rest.split("/", 2)[2]]
            etag = hashlib.sha256(content).hexdigest()
            self._answer(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer({"error": f"unknown request {rest}"}, 400)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub of the user ``ann``, who may also write to ``lab``."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
