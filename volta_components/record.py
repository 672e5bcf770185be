# SPDX-License-Identifier: Apache-2.0
"""What a run was made from: settings, code version, data."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monai
import torch

from volta_components._version import __version__


def code_version() -> str:
    """Version of this package, with the commit where it runs from a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"


def provenance(settings: Mapping[str, Any], datalist_hash: str | None = None) -> dict[str, Any]:
    """Everything needed to say how a result was obtained.

    Args:
        settings: the run's settings, by name.
        datalist_hash: hash of the datalist that it read.
    """
    return {
        "settings": dict(settings),
        "datalist_hash": datalist_hash,
        "code_version": code_version(),
        "torch_version": torch.__version__,
        "monai_version": monai.__version__,
        "python_version": platform.python_version(),
    }
