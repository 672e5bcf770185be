# SPDX-License-Identifier: Apache-2.0
"""Importing the package: silent, light, and everything that is promised is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import volta_components
from volta_components.method import weights

HEAVY = ("torch", "monai", "numpy", "nibabel", "sklearn", "safetensors", "mlflow")


def test_importing_is_silent_and_loads_no_heavy_library(tmp_path: Path) -> None:
    """Every warning is an error; from an empty folder, as a user who has it installed."""
    code = f"import sys, volta_components; print([name for name in {HEAVY} if name in sys.modules])"
    words = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_what_is_exported_is_there() -> None:
    assert volta_components.load_encoder is weights.load_encoder
    assert volta_components.load_pretrained is weights.load_pretrained
    assert set(volta_components.__all__) <= set(dir(volta_components))
    with pytest.raises(AttributeError, match=r"module 'volta_components' has no attribute 'load_everything'"):
        volta_components.load_everything  # noqa: B018
