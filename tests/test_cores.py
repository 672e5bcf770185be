# SPDX-License-Identifier: Apache-2.0
"""Threads and processes are as many as the cores that this process may use."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import volta_components
from volta_components.cores import cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_is_held_to_one_core_counts_one():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores() == len(before)


def test_nothing_else_asks_for_the_machines_cores():
    folder = Path(volta_components.__file__).parent
    asking = {
        path.name
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("cpu_count", "sched_getaffinity")
    }
    assert asking == {"cores.py"}
