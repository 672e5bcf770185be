# SPDX-License-Identifier: Apache-2.0
"""Manifests: JSON files that say where an open resource lies, how it is checked, and under which licence it is."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volta_components.errors import InputError
from volta_components.files import read_json

RESOURCES = Path(__file__).with_name("resources")
SCHEMA = RESOURCES / "schema.json"
HASHES = ("sha256", "md5")


@dataclass(frozen=True)
class File:
    """One file of a resource.

    Attributes:
        path: where it will lie, relative to the folder of the data.
        url: its address.
        hashes: what is known of it, by kind: ``sha256``, ``md5``; may be empty.
        unpack: folder that an archive is unpacked into, relative to the folder of the data; None for other files.
    """

    path: str
    url: str
    hashes: Mapping[str, str]
    unpack: str | None = None


@dataclass(frozen=True)
class Resource:
    """What a manifest says.

    Attributes:
        name: a short name.
        title: what it is, in a line.
        homepage: where people read about it.
        licence: its licence, with the licence's address.
        citation: what to cite.
        files: its files.
        next_commands: what to run next; ``{output}`` is the folder of the data.
    """

    name: str
    title: str
    homepage: str
    licence: str
    citation: str
    files: tuple[File, ...]
    next_commands: tuple[str, ...] = ()

    def terms(self) -> str:
        """Title, homepage, licence and citation, as they are printed and kept beside the data."""
        return f"{self.title}\nHomepage: {self.homepage}\nLicence:  {self.licence}\nCitation: {self.citation}\n"

    def next_steps(self, output: Path) -> list[str]:
        """Commands to run next, for the folder that the data lies in."""
        return [command.replace("{output}", shlex.quote(str(output))) for command in self.next_commands]


def built_in() -> list[str]:
    """Names of the resources that come with the package."""
    return sorted(path.stem for path in RESOURCES.glob("*.json") if path != SCHEMA)


def read_resource(name: Path | str) -> Resource:
    """Read the manifest of a resource.

    Args:
        name: a name of ``built_in``, or the path of a manifest.

    Raises:
        InputError: if there is no such resource, or the manifest does not follow ``resources/schema.json``.
    """
    path = Path(name)
    if str(name) in built_in():
        path = RESOURCES / f"{name}.json"
    elif path.suffix != ".json":
        raise InputError(
            f"no resource {name}; there are {', '.join(built_in())}. For another, give the path of a manifest (.json)"
        )
    content = read_json(path)
    _check(path, content)
    files = tuple(
        File(
            file["path"],
            file["url"],
            {kind: file[kind].lower() for kind in HASHES if kind in file},
            file.get("unpack"),
        )
        for file in content["files"]
    )
    words = {key: str(content[key]) for key in ("name", "title", "homepage", "licence", "citation")}
    return Resource(**words, files=files, next_commands=tuple(content.get("next", ())))


def _check(path: Path, content: Any) -> None:
    from jsonschema import Draft202012Validator

    errors = Draft202012Validator(read_json(SCHEMA)).iter_errors(content)
    rows = [(error.json_path.removeprefix("$").lstrip(".") or "(all of it)", error.message) for error in errors]
    if not rows:
        counts = Counter(file["path"].casefold() for file in content["files"])
        rows = [(place, "is the path of several files") for place, count in counts.items() if count > 1]
    if rows:
        raise InputError.many(
            f"{path}: not a manifest that can be used", rows, f"Correct it; {SCHEMA} says what a manifest holds."
        )
