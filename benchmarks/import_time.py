# SPDX-License-Identifier: Apache-2.0
"""CPU time to import the package and to start its command, beside ``python -c pass``: medians, and ratios to it.

Each is a fresh process. The kinds take turns, so that a machine that gets busy meanwhile slows all of them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

COMMAND = "import sys; from volta_components.cli import main; main(sys.argv[1:])"
BARE = "python -c pass"
WORDS = {
    BARE: ["pass"],
    "import monai": ["import monai"],
    "import volta_components": ["import volta_components"],
    "from volta_components import load_encoder": ["from volta_components import load_encoder"],
    "volta3d --help": [COMMAND, "--help"],
    "volta3d segment --help": [COMMAND, "segment", "--help"],
    "volta3d prepare --help": [COMMAND, "prepare", "--help"],
    "volta3d segment --sauce (no such option)": [COMMAND, "segment", "--sauce"],
}
ROUNDS = 5


def cpu_seconds(words: list[str]) -> float:
    """CPU time of a Python process that runs a line of code, and of its children."""
    command = [sys.executable, "-W", "ignore", "-c", *words]
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Print a table."""
    seconds: dict[str, list[float]] = {name: [] for name in WORDS}
    for _ in range(ROUNDS):
        for name, words in WORDS.items():
            seconds[name].append(cpu_seconds(words))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"| {'':41} | CPU seconds | times python -c pass |\n|{'-' * 43}|-------------|----------------------|")
    for name, value in median.items():
        print(f"| {name:41} | {value:11.3f} | {value / median[BARE]:20.0f} |")


if __name__ == "__main__":
    main()
