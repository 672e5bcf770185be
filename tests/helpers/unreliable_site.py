# SPDX-License-Identifier: Apache-2.0
"""A real web server on loopback that answers as servers and networks do on a bad day."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """What is wrong with one answer; by default nothing.

    Attributes:
        status: of an answer without the file.
        headers: further ones; they replace those of the same name.
        cut: bytes of the body after which the connection breaks; all by default.
        stalls: whether the connection hangs there instead, until the test is over.
        longer: by how many bytes the announced length exceeds what is sent; negative where too little is announced.
        ignores_range: the whole file, whatever is asked for.
        shift: by how many bytes the range begins later than was asked for.
        body: other bytes than the file's.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    stalls: bool = False
    longer: int = 0
    ignores_range: bool = False
    shift: int = 0
    body: bytes | None = None


@dataclass
class Site:
    """Files that are served, and how.

    Attributes:
        address: where, without a slash at the end.
        files: contents by path, as ``/scan.nii``.
        answers: of a path, what is wrong with the answers to come, in turn; the last one stays. None: all is well.
        validators: whether answers have ``ETag``.
        asked: paths and headers of all requests.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    validators: bool = True
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def ranges(self, path: str) -> list[str]:
        """What was asked for of a path: its ``Range`` headers, empty for the whole."""
        return [headers.get("Range", "") for asked, headers in self.asked if asked == path]


@contextmanager
def unreliable_site() -> Iterator[Site]:
    """A site whose files and faults a test fills in."""
    site, over = Site(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            site.asked.append((self.path, dict(self.headers)))
            queue = site.answers.get(self.path, [Answer()])
            answer = queue.pop(0) if len(queue) > 1 else queue[0]
            if answer.status is not None:
                self._send(answer.status, {}, answer.body or b"", answer)
            elif self.path not in site.files:
                self._send(404, {}, b"", answer)
            else:
                self._send_file(site.files[self.path] if answer.body is None else answer.body, answer)

        def _send_file(self, content: bytes, answer: Answer) -> None:
            tag = f'"{hashlib.sha256(content).hexdigest()[:12]}"'
            headers = {"ETag": tag} if site.validators else {}
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range", tag) == tag
            if not found or answer.ignores_range or not same:
                return self._send(200, headers, content, answer)
            start = int(found[1]) + answer.shift
            if start >= len(content):
                return self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"", answer)
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, {**headers, "Content-Range": place}, content[start:], answer)

        def _send(self, status: int, headers: Mapping[str, str], body: bytes, answer: Answer) -> None:
            self.send_response(status)
            length = {"Content-Length": str(len(body) + answer.longer)}
            for name, value in {**length, **headers, **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: answer.cut])
            self.wfile.flush()
            if answer.stalls:
                over.wait(60)
            if answer.cut is not None or answer.longer:
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None: ...  # clients that go away

    server = Server(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
