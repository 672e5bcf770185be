# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory of a pretraining's start, by the number of volumes that its datalist names.

The network is that of ``tiny.json``, so that what is measured is the data's. The volumes are hard links to a few files,
each listed with facts of its own, as ``volta3d prepare`` writes them. The start ends with the first mini-batch; memory
is looked at after some more, when all loading processes have worked.

    python benchmarks/start.py [--items 2000 100000] [--workers 4] [--output FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from volta_components.data.datalist import make_content
from volta_components.files import sha256_file, write_json

CONFIGS = Path(__file__).parents[1] / "bundles" / "pretrain" / "configs"
SHAPE, SPACING = (48, 64, 64), 3.0
BATCHES = 12
# A file system allows some 60,000 links to a file.
LINKS = 10_000


def make_data(folder: Path, count: int) -> None:
    """A prepared data set of ``count`` volumes."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    items, source, digest = [], Path(), ""
    for number in range(count):
        name = folder / "images" / f"sub-{number:06d}_ses-M000.nii"
        if number % LINKS:
            name.hardlink_to(source)
        else:
            affine = np.diag([SPACING] * 3 + [1.0])
            nib.save(nib.Nifti1Image(rng.random(SHAPE).astype(np.float32), affine), name)
            source, digest = name, sha256_file(name)
        codes = [hashlib.sha256(f"{kind}{number}".encode()).hexdigest() for kind in range(4)]
        items.append(
            {
                "image": f"images/{name.name}",
                "subject_id": f"sub-{number:06d}",
                "patient_id": f"sub-{number:06d}",
                "session": "ses-M000",
                "visit": 1,
                "site": f"site-{number % 40:02d}",
                "cohort": "phantom",
                "sex": "FM"[number % 2],
                "diagnosis": "CN",
                "age": 50 + number % 40 + 0.5,
                "stripped": False,
                "dtype": "float32",
                "fold": number % 5,
                "source": f"sub-{number:06d}/ses-M000/anat/sub-{number:06d}_ses-M000_T1w.nii.gz",
                "source_sha256": codes[0],
                "sha256": digest,
                "voxels_sha256": codes[1],
                "fingerprint": codes[2] + codes[3],
            }
        )
    write_json(folder / "datalist.json", make_content("phantom", [SPACING] * 3, SHAPE, 0, 5, items, []))


def shared_once(process: psutil.Process) -> float:
    """MiB of a process; what several share counts in parts."""
    return process.memory_full_info().pss / 2**20


def peak_of(pid: int) -> float:
    """Largest resident size of a process so far, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def start(folder: Path, workers: int) -> None:
    """Begin a training in this process, print its figures, and end it."""
    names = [str(CONFIGS / f"{name}.json") for name in ("train", "tiny")]
    places = {"dataset_dir": str(folder / "data"), "output_dir": str(folder / "run"), "ckpt_dir": str(folder)}
    workflow = ConfigWorkflow(
        names, workflow_type="train", device="$torch.device('cpu')", batch_size=1, num_workers=workers, **places
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    figures: dict[str, Any] = {}

    def first() -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        figures.update(ready=time.time(), cpu=usage.ru_utime + usage.ru_stime)

    def end() -> None:
        me = psutil.Process()
        children = me.children(recursive=True)
        figures["peak"] = peak_of(me.pid)
        figures["worker_peak"] = max(peak_of(child.pid) for child in children)
        figures["all"] = shared_once(me) + sum(map(shared_once, children))
        print("\n" + json.dumps(figures), flush=True)
        for child in children:
            child.kill()
        os._exit(0)

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), first)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=BATCHES), end)
    workflow.run()


def measure(count: int, workers: int) -> dict[str, float]:
    """The figures of a start, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder / "data", count)
        command = [sys.executable, "-W", "ignore", __file__, "--start", str(folder), "--workers", str(workers)]
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(folder / "data")
        return {**figures, "seconds": figures["ready"] - began}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[2_000, 100_000])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.start, options.workers)
        return
    lines = [
        f"`python benchmarks/start.py --items {' '.join(map(str, options.items))} --workers {options.workers}`: "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; load "
        f"{os.getloadavg()[1]:.1f} when it began.",
        "",
        "| volumes in the datalist | s to the first mini-batch | CPU s of it | peak MiB, training process | "
        "peak MiB, one loading process | MiB of all together, shared memory once |",
        "|---|---|---|---|---|---|",
    ]
    found = []
    for count in options.items:
        figures = measure(count, options.workers)
        found.append(figures)
        numbers = [f"{figures['seconds']:.1f}", f"{figures['cpu']:.1f}"]
        numbers += [f"{figures[name]:.0f}" for name in ("peak", "worker_peak", "all")]
        lines.append(f"| {count:,} | {' | '.join(numbers)} |")
    ratios = [f"{found[-1][name] / found[0][name]:.2f}" for name in ("seconds", "cpu", "peak", "worker_peak", "all")]
    lines.append(f"| **last / first** | {' | '.join(ratios)} |")
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
