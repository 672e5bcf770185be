# SPDX-License-Identifier: Apache-2.0
"""Preparing volumes: ``volta3d prepare`` against the same steps as a stock MONAI ``Compose`` with ``SaveImage``.

Both read the same files and write the same kind of result (RAS, 1 mm, 144x192x192, [0, 1], uncompressed float32 NIfTI),
one volume at a time in one thread. They run in turns, each turn in a process of its own, so that a busy machine is busy
for both. Ours also hashes, checks, measures and draws each volume; the stock pipeline does none of that.

    python benchmarks/prepare_throughput.py [--repeats 5] [--output benchmarks/results/prepare_throughput.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

# name: shape and spacing in the order in which the scanner stores them, suffix, volumes in a turn
CASES: dict[str, tuple[tuple[int, int, int], tuple[float, float, float], str, int]] = {
    "typical (256x256x150, 0.94x0.94x1.2 mm, .nii.gz)": ((256, 256, 150), (0.94, 0.94, 1.2), ".nii.gz", 4),
    "large (512x512x400, 0.5 mm, .nii.gz)": ((512, 512, 400), (0.5, 0.5, 0.5), ".nii.gz", 1),
    "large (512x512x400, 0.5 mm, .nii)": ((512, 512, 400), (0.5, 0.5, 0.5), ".nii", 1),
}


def make_scan(path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int) -> None:
    """Write a head-sized ball with smooth texture and noise, int16, axes towards posterior, inferior and right."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n) * n * s / 2 for n, s in zip(shape, spacing, strict=True)]
    squares = [(axis / radius) ** 2 for axis, radius in zip(axes, (88, 82, 68), strict=True)]
    waves = [np.cos(axis / length) for axis, length in zip(axes, (9, 11, 7), strict=True)]
    voxels = np.empty(shape, np.int16, order="F")
    for k in range(shape[2]):
        inside = squares[0][:, None] + squares[1][None] + squares[2][k] < 1
        texture = 500 + 120 * waves[0][:, None] * waves[1][None] * waves[2][k]
        voxels[:, :, k] = np.abs(np.where(inside, texture, 0) + rng.normal(0, 15, shape[:2]))
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2] = -spacing[0], -spacing[1], spacing[2]
    affine[:, 3] = (-shape[2] * spacing[2] / 2, shape[0] * spacing[0] / 2, shape[1] * spacing[1] / 2, 1)
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, 1)
    image.to_filename(path)


def stock(files: list[Path], output: Path) -> Callable[[], None]:
    """The steps in MONAI's dictionary transforms."""
    import torch
    from monai import transforms as t

    torch.set_num_threads(1)
    keys = ["image"]
    pipeline = t.Compose(
        [
            t.LoadImaged(keys, ensure_channel_first=True),
            t.Orientationd(keys, axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            t.Spacingd(keys, pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
            t.CropForegroundd(keys, source_key="image", select_fn=lambda x: x > 100, allow_smaller=True),
            t.ResizeWithPadOrCropd(keys, (144, 192, 192)),
            t.ScaleIntensityRangePercentilesd(keys, 0.5, 99.5, 0.0, 1.0, clip=True),
            t.SaveImaged(
                keys, output_dir=output, output_ext=".nii", resample=False, print_log=False, separate_folder=False
            ),
        ]
    )

    def work() -> None:
        for path in files:
            pipeline({"image": str(path)})

    return work


def ours(files: list[Path], output: Path) -> Callable[[], None]:
    """What one worker of ``volta3d prepare`` does."""
    from volta_components.data.layouts import Scan
    from volta_components.data.preprocess import Settings
    from volta_components.data.worker import Task, process

    tasks = [
        Task(
            Scan(path.name.split(".")[0], None, path.name, path, path.name),
            Settings(),
            labels=False,
            source=path.parent,
            output=output,
            temporary=output / "temporary",
        )
        for path in files
    ]

    def work() -> None:
        for task in tasks:
            if error := process(task).get("error"):
                raise RuntimeError(error)

    return work


def peak_mib() -> float:
    """Largest resident size of this process so far, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status; this benchmark needs Linux")


def turn(method: str, folder: Path) -> None:
    """One turn, in a process of its own: prints wall and CPU seconds and peak memory as JSON."""
    files = sorted((folder / "in").iterdir())
    with tempfile.TemporaryDirectory(dir=folder) as output:
        work = (stock if method == "stock" else ours)(files, Path(output))
        before = peak_mib()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        result = {
            "wall": (time.perf_counter() - wall) / len(files),
            "cpu": (time.process_time() - cpu) / len(files),
            "peak": peak_mib(),
            "growth": peak_mib() - before,
        }
    print(json.dumps(result))


def run_turn(method: str, folder: Path) -> dict[str, float]:
    """Start a turn and read its figures."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--turn", method, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(repeats: int) -> list[dict[str, Any]]:
    """Medians of all turns of each case and method."""
    rows = []
    for name, (shape, spacing, suffix, count) in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "in").mkdir()
            for i in range(count):
                make_scan(folder / "in" / f"scan{i}{suffix}", shape, spacing, i)
            turns: dict[str, list[dict[str, float]]] = {"stock": [], "volta3d": []}
            for _ in range(repeats):
                for method in turns:
                    turns[method].append(run_turn(method, folder))
        rows.append(
            {
                "case": name,
                **{
                    method: {key: statistics.median(turn[key] for turn in done) for key in done[0]}
                    for method, done in turns.items()
                },
            }
        )
    return rows


def table(rows: list[dict[str, Any]], repeats: int) -> str:
    """The results as Markdown."""
    import monai
    import torch

    lines = [
        "# Preparing volumes: volta3d against a stock MONAI Compose with SaveImage",
        "",
        f"`python benchmarks/prepare_throughput.py --repeats {repeats}`: medians of {repeats} turns of each method,",
        f"one after the other in one session, one thread; {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, monai {monai.__version__}, torch {torch.__version__}.",
        "Peak is the largest resident size of the process, growth is how much of it came after the imports.",
        "",
        "| input | method | volumes / min / core (CPU time) | s / volume (wall) | peak MiB | growth MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for method in ("stock", "volta3d"):
            r = row[method]
            speed = f"{60 / r['cpu']:.1f} | {r['wall']:.2f}"
            lines.append(f"| {row['case']} | {method} | {speed} | {r['peak']:.0f} | {r['growth']:.0f} |")
        a, b = row["stock"], row["volta3d"]
        lines.append(
            f"| | **ratio** | **{a['cpu'] / b['cpu']:.1f}x as fast** | {a['wall'] / b['wall']:.1f}x | "
            f"**1/{a['peak'] / b['peak']:.1f}** | 1/{a['growth'] / b['growth']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "prepare_throughput.md")
    parser.add_argument("--turn", choices=("stock", "volta3d"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        turn(options.turn, options.folder)
        return
    text = table(measure(options.repeats), options.repeats)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
