# SPDX-License-Identifier: Apache-2.0
"""A process that may write no more than so many bytes to a file: what a full disk does, at one place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def error_of_a_full_disk(limit: int, setup: str, call: str, path: Path) -> str:
    """File and reason of the ``OSError`` that a call raises there.

    Args:
        limit: bytes of a file.
        setup: imports of the call, and what else it needs.
        call: an expression; ``path`` is the file.
        path: the file that is written.
    """
    code = (
        f"import resource, signal, sys\n{setup}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "path = sys.argv[1]\n"
        f"try:\n    {call}\n"
        "except OSError as error:\n    print(error.filename, error.strerror, sep=': ')\n"
    )
    words = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
