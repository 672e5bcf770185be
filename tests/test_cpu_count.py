# SPDX-License-Identifier: Apache-2.0
"""Threads and processes are as many as the cores that this process may use: joblib knows, and nothing else is asked."""

from __future__ import annotations

import ast
import io
import os
from pathlib import Path
from typing import Any

import joblib
import pytest
from joblib.externals.loky.backend import context

import volta_components


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_is_held_to_one_core_counts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By SLURM or ``taskset``."""
    monkeypatch.setattr(context, "_cpu_count_cgroup", lambda count: count)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert joblib.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert joblib.cpu_count() == len(before)


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 6)])
def test_a_container_with_a_quota_counts_it(monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
    """A quota of Docker or Kubernetes: one and a half cores are two, of the six that the machine has."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    exists, opened = os.path.exists, []

    def open_quota(path: str) -> Any:
        opened.append(path)
        return io.StringIO(quota)

    monkeypatch.setattr(os.path, "exists", lambda path: path == "/sys/fs/cgroup/cpu.max" or exists(path))
    monkeypatch.setattr(context, "open", open_quota, raising=False)
    assert joblib.cpu_count() == expected
    assert opened == ["/sys/fs/cgroup/cpu.max"]


def test_nothing_asks_for_the_machines_cores() -> None:
    folder = Path(volta_components.__file__).parent
    asking = {
        path.name
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.cpu_count", "os.sched_getaffinity")
    }
    assert asking == set()
