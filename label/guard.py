# SPDX-License-Identifier: Apache-2.0
"""MONAI Label's web application behind a guard: who may talk to it, and what a request may name.

``serve.py`` starts this module's ``app`` in place of MONAI Label's own, which answers every web page that the user's
browser has open, takes any text as a file's name, and knows passwords only through a Keycloak server.
"""

from __future__ import annotations

import base64
import functools
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fastapi import HTTPException
from monailabel.app import app as monailabel_app
from monailabel.config import settings
from monailabel.endpoints import infer as infer_endpoint
from monailabel.endpoints import train as train_endpoint
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.task import AsyncTask
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

# Parameters that become names of files.
NAMES = ("image", "id", "label", "tag", "session_id")
# Settings in "params" that would replace what the request itself says, or are not for clients.
RESERVED = {"model", "image", "label", "session", "bundle_path", "description"}
UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]|\.\.|^[.$~]")


def is_unsafe(name: str) -> bool:
    """Whether a text may not become a file's name."""
    return UNSAFE.search(name) is not None


class Guard:
    """Refuses requests before the application sees them.

    - The ``Host`` must be the server's own: a foreign name that points here (DNS rebinding) is refused.
    - An ``Origin`` must be the server's own or one of ``origins``: other web pages are refused.
    - Names of images, labels and tags have no separators and no ``..``.
    - With a password, clients log in as MONAI Label's clients do (``/auth/token``), or by HTTP Basic; the name of the
      user does not matter.
    - Models are replaced by training alone; archives are not unpacked; OHIF needs a DICOMweb server.

    Args:
        app: the application.
        hosts: names and addresses of the server, without ports; with ``*``, every IP address is one.
        origins: web pages that are let in besides the server's own, such as ``http://viewer.lab:3000``.
        password: empty for none.
        has_dicom: whether the scans come from a DICOMweb server.
    """

    def __init__(self, app: ASGIApp, hosts: set[str], origins: list[str], password: str, has_dicom: bool) -> None:
        self.app: ASGIApp = app
        if origins:
            self.app = CORSMiddleware(
                app, allow_origins=origins, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
            )
        self.hosts = {host.lower() for host in hosts}
        self.origins = set(origins)
        self.password = password
        self.has_dicom = has_dicom
        self._token = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand the request on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        answer = self._refusal(request)
        # What a browser asks before a request has no password yet, and does nothing.
        if answer is None and self.password and request.method != "OPTIONS":
            answer = await self._login(request)
        await (answer or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not self._is_own(host):
            return refused(
                403, f"this server is not {host or '(no Host)'}; call it by its own address, or add NAMES={host}"
            )
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            return refused(403, f"pages of {origin} may not use this server; allow them with ORIGINS={origin}")
        path = request.url.path
        if ".." in path or "\\" in path:
            return refused(400, f"{path!r}: not a path of this server")
        for name, value in parse_qsl(request.url.query, keep_blank_values=True):
            if name in NAMES and is_unsafe(value):
                return refused(
                    400,
                    f"{name} {value!r}: names of scans and tags have no /, \\ or .., and begin with none of . $ ~",
                )
            if name == "uncompress" and value.lower() not in ("false", "0", ""):
                return refused(400, "archives are not unpacked here; send a volume")
        first, _, rest = path.strip("/").partition("/")
        if first == "model" and request.method != "GET":
            return refused(403, "models are replaced by training alone")
        if first == "infer" and rest.startswith("wsi"):
            return refused(404, "whole-slide images are not served here")
        if first in ("ohif", "proxy") and not self.has_dicom:
            return refused(
                404,
                "OHIF reads DICOM only, and this server's scans are a folder of files: give a DICOMweb server "
                "(Orthanc, dcm4chee) as STUDIES, or use 3D Slicer",
            )
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return "*" in self.hosts

    async def _login(self, request: Request) -> Response | None:
        path = request.url.path.rstrip("/")
        if path == "/auth":
            return JSONResponse({"enabled": True, "client_id": "volta3d", "realm": ""})
        if path == "/auth/token" and request.method == "POST":
            given = dict(parse_qsl((await request.body()).decode("utf-8", "replace"))).get("password", "")
            if not same(given, self.password):
                return refused(401, "wrong password")
            return JSONResponse({"access_token": self._token, "token_type": "bearer"})
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except ValueError:
                value = ""
            known = same(value, self.password)
        else:
            known = kind.lower() == "bearer" and (same(value, self._token) or same(value, self.password))
        if not known:
            return refused(401, "this server asks for its password (LABEL_PASSWORD)", {"WWW-Authenticate": "Basic"})
        if path == "/auth/token/valid":
            return JSONResponse({"username": "annotator"})
        return None


def same(first: str, second: str) -> bool:
    """Compare secrets in a time that does not depend on where they differ."""
    return hmac.compare_digest(first.encode(), second.encode())


def refused(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    """An answer as FastAPI gives it."""
    return JSONResponse({"detail": sentence}, status, headers)


def only_settings(run: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``params`` of a request for a mask from naming another file or model than the request."""

    @functools.wraps(run)
    def checked(background_tasks: Any, model: str, image: str, session_id: str, params: str, *rest: Any) -> Any:
        try:
            given = json.loads(params or "{}")
        except ValueError as error:
            raise HTTPException(422, f"params is not JSON ({error})") from error
        if not isinstance(given, dict):
            raise HTTPException(422, "params is no JSON object")
        if taken := sorted(RESERVED & given.keys()):
            raise HTTPException(422, f"params may not have {', '.join(taken)}")
        return run(background_tasks, model, image, session_id, params, *rest)

    return checked


def only_own_files(run: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``params`` of a task from naming files: scans by their paths, or a folder that Python takes modules from."""

    @functools.wraps(run)
    def checked(method: str, request: Any = None, params: dict[str, Any] | None = None, *rest: Any, **more: Any) -> Any:
        given = [params or {}, *(value for value in (params or {}).values() if isinstance(value, dict))]
        if taken := sorted({name for each in given for name in each} & {"bundle_path", "images"}):
            raise HTTPException(422, f"params may not have {', '.join(taken)}")
        return run(method, request, params, *rest, **more)

    return checked


def only_trainers(run: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse the training of a model that is only served, which otherwise the task's log alone would do."""

    @functools.wraps(run)
    def checked(model: str, *rest: Any) -> Any:
        info = app_instance().info()
        if model in info["models"] and model not in info["trainers"]:
            trained = ", ".join(info["trainers"]) or "none"
            raise HTTPException(
                422,
                f"{model!r} is not trained here, since viewers cannot give a scan's class; those that are: {trained}",
            )
        return run(model, *rest)

    return checked


def own_names(host: str, given: str) -> set[str]:
    """What a server that listens on ``host`` may be called.

    Args:
        host: the address; 0.0.0.0 and :: are all of this machine's.
        given: more names, separated by commas.
    """
    names = {"localhost", "127.0.0.1", "::1", host, *(name.strip() for name in given.split(",") if name.strip())}
    if host in ("0.0.0.0", "::"):
        # An IP address is no name that somebody else could point here.
        names |= {"*", socket.gethostname(), socket.getfqdn()}
    return names


# MONAI Label's own lets every page in, and its setting for others stops the server (0.8.5).
monailabel_app.user_middleware.clear()
infer_endpoint.run_inference = only_settings(infer_endpoint.run_inference)
train_endpoint.run_model = only_trainers(train_endpoint.run_model)
AsyncTask.run = staticmethod(only_own_files(AsyncTask.run))
app = Guard(
    monailabel_app,
    own_names(os.environ.get("LABEL_HOST", "127.0.0.1"), os.environ.get("LABEL_NAMES", "")),
    [origin.strip().rstrip("/") for origin in os.environ.get("LABEL_ORIGINS", "").split(",") if origin.strip()],
    os.environ.get("LABEL_PASSWORD", ""),
    settings.MONAI_LABEL_STUDIES.startswith(("http://", "https://")),
)
