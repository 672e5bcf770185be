# SPDX-License-Identifier: Apache-2.0
"""``make bench`` (``benchmarks/run.py``): a quick look leaves the tables alone that the pages cite."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import run


@pytest.mark.parametrize("full", [False, True])
def test_only_the_full_benchmarks_write_results(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: dict[str, str | None] = {}

    def note(words: list[str], **_: Any) -> None:
        _, script, *rest = words
        outputs[Path(script).name] = rest[rest.index("--output") + 1] if "--output" in rest else None

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.setattr(sys, "argv", ["run.py", *["--full"] * full])
    run.main()
    cited = str(run.RESULTS / "step.md")
    assert Path(cited).is_file()
    # The other two write to their own tables unless they are told where.
    expected = {"step.py": cited, "prepare_throughput.py": None, "phantom_throughput.py": None}
    for script, output in expected.items():
        assert outputs[script] == (output if full else os.devnull), script


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``benchmarks/step.py``, which is started as a script: it finds the files beside it first."""
    monkeypatch.syspath_prepend(str(run.HERE))
    import step

    return step


def test_a_form_that_fails_or_takes_too_long_leaves_the_others_their_figures(
    step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Callable[[], None]:
        raise ValueError("out of memory\nand more")

    forms = {"quick": lambda *_: lambda: None, "slow": lambda *_: lambda: time.sleep(60), "broken": fails}
    monkeypatch.setattr(step, "FORMS", forms)
    rows = [(f"{name} / quick", "", name, "quick", "gib") for name in forms]
    monkeypatch.setattr(step, "ROWS", rows)
    options = SimpleNamespace(
        size="tiny", device="cpu", turns=2, repeats=1, limit=5, compile=False, rows=["quick"], window=1
    )
    lines = [line for line in step.table(options) if "/ quick" in line]
    assert lines[0] == "| quick / quick |  | 1.00 | 2 |"
    assert lines[1] == "| slow / quick |  | not measured (slow: not done within 5 s) | 2 |"
    assert lines[2] == "| broken / quick |  | not measured (broken: ValueError: out of memory) | 2 |"
    options.limit = 0
    with pytest.raises(ValueError, match="out of memory"):
        list(step.table(options))
