# SPDX-License-Identifier: Apache-2.0
"""Time to import the package and to start its command, beside that of ``import monai``: medians, and ratios to it.

Each is a fresh process; its start without any import is subtracted. The kinds take turns, so that a machine that gets
busy meanwhile slows all of them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "(nothing)": "pass",
    "import monai": "import monai",
    "import volta_components": "import volta_components",
    "from volta_components import load_encoder": "from volta_components import load_encoder",
    "volta3d --help": "from volta_components.cli import main; main(['--help'])",
}
ROUNDS = 5


def main() -> None:
    """Print a table."""
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(ROUNDS):
        for name, code in STATEMENTS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    bare = median.pop("(nothing)")
    whole = median["import monai"] - bare
    print(f"| {'':41} | seconds | of import monai |\n|{'-' * 43}|---------|-----------------|")
    for name, value in median.items():
        print(f"| {name:41} | {value - bare:7.3f} | {(value - bare) / whole:15.3f} |")


if __name__ == "__main__":
    main()
