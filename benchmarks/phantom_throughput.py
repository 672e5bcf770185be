# SPDX-License-Identifier: Apache-2.0
"""Heads from label maps: volumes a second and core, and memory, at each spacing.

    python benchmarks/phantom_throughput.py --anatomies DIR [--volumes 20]

One thread, CPU time; each spacing in a process of its own, over a few anatomies. ``rendered`` is the picture and its
label map in memory, as endless heads are; ``written`` is ``volta3d phantom``, which also compresses and writes both.
Without --anatomies, the template's phantoms are timed. A table goes to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "phantom_throughput.md"


def measure(anatomies: str | None, spacing: int, volumes: int) -> dict[str, float]:
    """CPU seconds a volume, rendered and written, and the process's largest size in MiB."""
    import torch

    from volta_components.data.phantom.anatomy import load_template
    from volta_components.data.phantom.dataset import write_subject
    from volta_components.data.phantom.heads import load_head
    from volta_components.data.phantom.labels import find_label_maps
    from volta_components.data.phantom.render import render
    from volta_components.data.phantom.settings import Settings
    from volta_components.data.phantom.subjects import draw_subject, scanner_of

    torch.set_num_threads(1)
    found = list(find_label_maps(Path(anatomies)).items())[:4] if anatomies else []
    paths = {name: str(path) for name, path in found}
    settings = Settings(seed=1, spacing=spacing, anatomies=tuple(paths))

    def make(number: int) -> None:
        subject = draw_subject(settings, number)
        name = subject.anatomy
        anatomy = load_head(name, paths[name]) if name else load_template(spacing)
        render(subject, anatomy, spacing, scanner_of(settings, subject))

    for number in range(1, 1 + max(1, len(paths))):
        make(number)  # reads the anatomies
    began = time.process_time()
    for number in range(1, 1 + volumes):
        make(number)
    rendered = (time.process_time() - began) / volumes
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        for number in range(1, 1 + volumes):
            write_subject(folder, settings, number, paths)
        written = (time.process_time() - began) / volumes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rendered": rendered, "written": written, "peak": peak}


def main() -> None:
    """Measure each spacing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anatomies")
    parser.add_argument("--volumes", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.anatomies, arguments.one, arguments.volumes)))
        return
    kind = "heads from label maps, 168x216x192 mm" if arguments.anatomies else "the template's phantoms, 144x192x192 mm"
    load = os.getloadavg()[0]
    lines = [
        "# Phantoms a second and core",
        "",
        f"`python benchmarks/phantom_throughput.py --volumes {arguments.volumes}`: {kind}; CPU time of one thread; "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load of the machine "
        f"{load:.1f} at the start (on a busy machine, CPU time is longer too, as cores share caches and memory).",
        "",
        "| spacing | rendered / s | written / s | peak MiB |",
        "|---|---|---|---|",
    ]
    for spacing in (3, 2, 1):
        words = [sys.executable, __file__, "--one", str(spacing), "--volumes", str(arguments.volumes)]
        words += ["--anatomies", arguments.anatomies] if arguments.anatomies else []
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        numbers = json.loads(done.stdout.splitlines()[-1])
        lines.append(
            f"| {spacing} mm | {1 / numbers['rendered']:.2f} | {1 / numbers['written']:.2f} | {numbers['peak']:.0f} |"
        )
        print(lines[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
