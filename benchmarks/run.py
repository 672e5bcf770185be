# SPDX-License-Identifier: Apache-2.0
"""Run the benchmarks and print their tables.

``--full`` takes the paper's sizes (12 GiB) and the long ones (hours), and writes ``results``, which the pages cite.
Without it, small sizes are printed only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PRINTED_ONLY = ["--output", os.devnull]
# script, arguments for a quick look (None: only with --full), arguments with --full
BENCHMARKS: dict[str, tuple[str, list[str] | None, list[str]]] = {
    "A step of pretraining": (
        "step.py",
        PRINTED_ONLY,
        ["--size", "paper", "--output", str(RESULTS / "step.md")],
    ),
    "The loader": ("loader.py", [], ["--size", "paper"]),
    "The start, by the size of the data": (
        "start.py",
        ["--items", "100", "2000"],
        [],
    ),
    "Time to import": ("import_time.py", [], []),
    "Throughput of preparation": ("prepare_throughput.py", PRINTED_ONLY, []),
    "Phantoms a second": ("phantom_throughput.py", ["--volumes", "5", *PRINTED_ONLY], []),
    "How hard the phantoms' labels are": ("phantom_effects.py", None, []),
    "What keeps the global branch alive": ("collapse.py", None, []),
}


def main() -> None:
    """Run the benchmarks, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the paper's sizes and the long ones, written to results")
    options = parser.parse_args()
    for title, (script, small, full) in BENCHMARKS.items():
        arguments = full if options.full else small
        if arguments is None:
            continue
        print(f"\n## {title}\n", flush=True)
        subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    main()
