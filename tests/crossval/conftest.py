# SPDX-License-Identifier: Apache-2.0
"""The fake bundle in a folder of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_bundle import empty_store, write_bundle, write_datalist


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the fake bundle and its datalist, and processes that find the fake bundle's code."""
    write_bundle(tmp_path)
    write_datalist(tmp_path / "datalist.json")
    empty_store(tmp_path / "runs")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root / "tests" / "helpers"), str(root)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
