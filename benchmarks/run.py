# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark and print their tables; ``--full`` takes the paper's sizes (minutes, 12 GiB)."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = {
    "Cost of a pretraining step": ("step_cost.py", ["--small"], []),
    "Time to import": ("import_time.py", [], []),
    "Throughput of preparation": ("prepare_throughput.py", [], []),
}


def main() -> None:
    """Run the benchmarks, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the paper's sizes")
    options = parser.parse_args()
    for title, (script, small, full) in BENCHMARKS.items():
        print(f"\n## {title}\n", flush=True)
        subprocess.run([sys.executable, str(HERE / script), *(full if options.full else small)], check=True)


if __name__ == "__main__":
    main()
