# SPDX-License-Identifier: Apache-2.0
"""Whether a command on a page is right: the program, its options and config ids exist."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from doc_blocks import read_blocks
from doc_pages import BUNDLES, ROOT, without_blocks
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from volta_components.cli import read
from volta_components.errors import InputError


def options_of(words: list[str]) -> dict[str, str]:
    """``--name value`` and ``--name=value``; the value is empty where another option follows."""
    found: dict[str, str] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            after = words[place + 1] if place + 1 < len(words) else ""
            found[name] = value if sign else "" if after.startswith("--") else after
    return found


# For options that running text leaves out.
PLACEHOLDERS = {"--layout": "bids", "--subjects": "1", "--bundle": "NONE"}


class Checker:
    """Checks the commands of a page; ``files`` are those that the page tells its reader to write."""

    def __init__(self, files: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.files = dict(files or {})

    def faults(self, words: list[str], whole: bool = False) -> list[str]:
        """What is wrong with a command; ``whole`` where nothing is left out of it."""
        if words[0] == "volta3d":
            return self._volta3d(words[1:], whole)
        if words[:3] == ["python", "-m", "monai.bundle"]:
            return self._bundle(words[3:])
        if words[0] == "torchrun":
            return self._torchrun(words[1:])
        if words[0] == "make":
            return [f"make: no target {word}" for word in words[1:] if word not in make_targets() and "=" not in word]
        if words[0] == "mlflow":
            return self._mlflow(words[1:])
        if words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
            return [] if (ROOT / words[1]).is_file() else [f"no file {words[1]}"]
        return []

    def _volta3d(self, words: list[str], whole: bool) -> list[str]:
        # What may be left out stands in brackets.
        words = [re.sub(r"^\[(?=--)|(?<=[a-z])\]$", "", word) for word in words]
        try:
            call = read(words)
        except InputError as error:
            if not whole and str(error) == f"--{words[-1].lstrip('-')} needs a value":
                return self._volta3d(words[:-1], whole)
            absent, says_so, _ = str(error).partition(" missing; ")
            if whole or not says_so:
                return [f"volta3d: {error}"]
            filled = [f"{option}={PLACEHOLDERS.get(option, 'x')}" for option in re.findall("--[a-z-]+", absent)]
            return self._volta3d([*words, *filled], whole=True)
        options = getattr(call, "keywords", {})
        return self._crossval(options) if words[:1] == ["crossval"] else []

    def _crossval(self, options: Mapping[str, Any]) -> list[str]:
        bundle = str(options["bundle"])
        if bundle == PLACEHOLDERS["--bundle"]:
            return []
        names = [*(name for name in options.get("inits", []) if name != "volta"), *options.get("overlays", [])]
        files = [f"{bundle}/configs/{name}.json" for name in ("train", *names)]
        found = [f"no config {file}" for file in files if self._config(file) is None]
        return found or [f"no id {name} in {bundle}" for name in options.get("set", {}) if not self._has(files, name)]

    def _bundle(self, words: list[str]) -> list[str]:
        import monai.bundle.__main__ as entry

        if not words or words[0].startswith("-"):
            return []
        function = getattr(entry, words[0], None)
        if not inspect.isfunction(function):
            return [f"monai.bundle has no command {words[0]}"]
        options = options_of(words[1:])
        parameters = inspect.signature(function).parameters
        rest = [name for name in options if name not in parameters and name != "help"]
        if "override" not in parameters:
            return [f"monai.bundle {words[0]} has no --{name}" for name in rest]
        given = options.get("config_file", "")
        files = ast.literal_eval(given) if given.startswith("[") else [given]
        found = [f"no config {file}" for file in files if file and self._config(file) is None]
        tracked = DEFAULT_MLFLOW_SETTINGS["configs"] if "tracking" in options else {}
        if options.get("tracking", "mlflow") not in {"mlflow", ""} and self._config(options["tracking"]) is None:
            found.append(f"no config {options['tracking']}")
        return found or [
            f"no id {name} in {files}" for name in rest if name not in tracked and not self._has(files, name)
        ]

    def _torchrun(self, words: list[str]) -> list[str]:
        from torch.distributed.run import get_args_parser

        module = words.index("-m")
        known = {option for action in get_args_parser()._actions for option in action.option_strings}
        found = [f"torchrun has no --{name}" for name in options_of(words[:module]) if f"--{name}" not in known]
        return found + self.faults(["python", *words[module:]])

    def _mlflow(self, words: list[str]) -> list[str]:
        import click
        from mlflow.cli import cli

        command = cli.get_command(click.Context(cli), words[0])
        if command is None:
            return [f"mlflow has no command {words[0]}"]
        known = {option for parameter in command.params for option in parameter.opts}
        return [f"mlflow {words[0]} has no --{name}" for name in options_of(words[1:]) if f"--{name}" not in known]

    def _config(self, file: str) -> dict[str, Any] | None:
        if file in self.files:
            return self.files[file]
        # From within a downloaded bundle, which has the same configs as the repository's; NAME stands for any.
        paths = [ROOT / file, *(ROOT / "bundles" / name / file for name in BUNDLES)]
        paths += [ROOT / file.replace("NAME", name) for name in BUNDLES if "NAME" in file]
        path = next((path for path in paths if path.is_file()), None)
        return None if path is None else json.loads(path.read_text())

    def _has(self, files: list[str], name: str) -> bool:
        """Whether the merged configuration has an id; a path's entries count where an id is set by path."""
        merged: dict[str, Any] = {}
        for file in files:
            merged |= self._config(file) or {}
        place: Any = merged
        for part in re.split("#|::", name):
            try:
                place = place[int(part) if isinstance(place, list) else part]
            except (LookupError, TypeError, ValueError):
                return name in merged
        return True


@functools.cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def inline_commands(text: str) -> list[str]:
    """Commands in the running text, between single backticks; an ellipsis stands for what is left out."""
    spans = re.findall(r"`([^`]+)`", without_blocks(text))
    joined = [re.sub(r"\s+", " ", span).replace("...", " ") for span in spans]
    starts = ("volta3d ", "python -m monai.bundle ", "torchrun ", "make ", "mlflow ")
    return [span for span in joined if span.startswith(starts) and "COMMAND" not in span]


def checker_of(page: str) -> Checker:
    blocks = read_blocks((ROOT / page).read_text(), page)
    return Checker({block.marks["file"]: json.loads(block.text) for block in blocks if "file" in block.marks})
