# SPDX-License-Identifier: Apache-2.0
"""The floors of the package (docs/architecture.md): nothing imports upwards, nothing imports in a circle."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import volta_components

PACKAGE = Path(volta_components.__file__).parent
TESTS = Path(__file__).parent
# From the ground up. Wings of one floor do not import from each other.
FLOORS = [
    {"errors", "files", "templates", "distributed", "_version"},
    {"data"},
    {"training"},
    {"method"},
    {"downstream"},
    {"inference"},
    {"crossval"},
    {"report", "sharing"},
    {"bundle", "cli", ""},
]
# A reader must get through a file in one go.
LINES = 500


@functools.cache
def modules() -> dict[str, Path]:
    """Files of the package by dotted name within it; the package's own ``__init__`` is the empty name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@functools.cache
def imports() -> dict[str, set[str]]:
    """What each module imports from the package, wherever in the file: names of modules."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                candidates = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            elif isinstance(node, ast.Import):
                candidates = [alias.name for alias in node.names]
            else:
                continue
            for full in candidates:
                inside = full.removeprefix("volta_components").lstrip(".")
                # The version alone is what many take from the package itself.
                if full.split(".")[0] == "volta_components" and inside in known and inside not in ("", name):
                    found[name].add(inside)
    return found


def floor(module: str) -> int:
    wing = module.split(".")[0]
    return next(number for number, wings in enumerate(FLOORS) if wing in wings)


def test_every_wing_has_a_floor() -> None:
    assert {name.split(".")[0] for name in modules()} == set().union(*FLOORS)


@pytest.mark.parametrize("module", modules())
def test_no_import_goes_up_or_across(module: str) -> None:
    wing = module.split(".")[0]
    wrong = [
        other
        for other in imports()[module]
        if floor(other) > floor(module)
        or (0 < floor(other) == floor(module) < len(FLOORS) - 1 and other.split(".")[0] != wing)
    ]
    assert not wrong


def test_no_imports_in_a_circle() -> None:
    graph = imports()
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " > ".join([*way[way.index(name) :], name])
        if name in done:
            return
        for other in graph[name]:
            visit(other, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_a_circle_or_a_way_up_would_be_seen() -> None:
    graph = imports()
    assert "errors" in graph["files"] and "data.volumes" in graph["data.load"], "imports are not read"
    assert floor("cli") > floor("report.command") > floor("downstream.splits") > floor("errors")


def test_files_are_short_enough_to_read() -> None:
    long = {
        name: lines
        for name, path in modules().items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES
    }
    assert not long


def test_tests_lie_in_the_wing_that_they_test() -> None:
    wings = {name.split(".")[0] for name, path in modules().items() if path.parent != PACKAGE}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert wings <= folders
    known = {name.rsplit(".", 1)[-1] for name in modules()}
    strange = [
        str(path.relative_to(TESTS))
        for wing in wings
        for path in (TESTS / wing).rglob("test_*.py")
        if not any(path.stem == f"test_{name}" or path.stem.startswith(f"test_{name}_") for name in known)
    ]
    assert not strange, "no module has the name of these files"
