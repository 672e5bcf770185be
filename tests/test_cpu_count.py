# SPDX-License-Identifier: Apache-2.0
"""Threads and processes are as many as the cores that this process may use: joblib knows, and nothing else is asked."""

from __future__ import annotations

import ast
from pathlib import Path

import volta_components


def test_nothing_asks_for_the_machines_cores() -> None:
    folder = Path(volta_components.__file__).parent
    asking = {
        path.name
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.cpu_count", "os.sched_getaffinity")
    }
    assert asking == set()
