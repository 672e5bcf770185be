# SPDX-License-Identifier: Apache-2.0
"""``make bench`` (``benchmarks/run.py``): a quick look leaves the tables alone that the pages cite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
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
