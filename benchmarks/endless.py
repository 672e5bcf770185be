# SPDX-License-Identifier: Apache-2.0
"""How long a step of pretraining waits for heads that workers render, beside the same heads in memory.

    python benchmarks/endless.py --anatomies DIR [--workers 1,2] [--steps 40]

Pretraining with ``tiny.json`` (the quick start's size) and ``synthetic.json``, one thread. ``waiting``
is the share of the time of the steps that the training waits for its data. CPU seconds depend less on what else
the machine does: workers keep up if rendering a mini-batch takes less of them than ``workers`` times a step.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser

from volta_components.training.sampling import KeyedDataset

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "pretrain" / "configs"
RESULTS = Path(__file__).parent / "results" / "endless.md"
FIRST = 6  # steps that are not counted: workers start, caches fill


class InMemory(KeyedDataset):
    """Heads that were rendered before, in turn."""

    def __init__(self, heads: KeyedDataset, count: int) -> None:
        super().__init__([heads.item(0, index) for index in range(count)], heads.transform, heads.seed)
        self.length = len(heads)

    def __len__(self) -> int:
        return self.length

    def item(self, epoch: int, index: int, *repeat: int) -> Any:
        """An item of those in memory."""
        return self.data[index % len(self.data)]


def configuration(anatomies: str, workers: int, steps: int, folder: str, overlay: str) -> ConfigParser:
    """The merged config of a run of some steps, with the teacher's handler and without the others."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in ("train", overlay, "synthetic")])
    parser["anatomies"], parser["num_workers"], parser["output_dir"] = anatomies, workers, folder
    parser["epochs"], parser["warmup_epochs"] = 1, 0
    parser["heads_per_epoch"] = (steps + FIRST) * int(parser["batch_size"])
    parser["device"] = "$torch.device('cpu')"
    parser["train#handlers"] = parser["train#handlers"][:1]
    return parser


def measure(parser: ConfigParser, in_memory: int) -> dict[str, float]:
    """Seconds of a step by the wall and of this process's CPU, and of waiting for data."""
    if in_memory:
        parser["train#dataloader#dataset"] = InMemory(parser.get_parsed_content("train#dataset"), in_memory)
    trainer = parser.get_parsed_content("train#trainer")
    waits: list[float] = []
    marks: list[tuple[float, float]] = []
    began = [0.0]
    trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: began.__setitem__(0, time.perf_counter()))
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: waits.append(time.perf_counter() - began[0]))
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: marks.append((time.perf_counter(), time.process_time()))
    )
    trainer.run()
    count = len(marks) - FIRST
    wall, cpu = (np.array(marks[-1]) - np.array(marks[FIRST - 1])) / count
    return {"wall": float(wall), "cpu": float(cpu), "waiting": sum(waits[FIRST:]) / count}


def rendering(parser: ConfigParser, count: int) -> float:
    """CPU seconds of a head, its views drawn."""
    heads = parser.get_parsed_content("train#dataset")
    heads.fill()
    heads[(0, 0)]
    began = time.process_time()
    for index in range(count):
        heads[(1, index)]
    return (time.process_time() - began) / count


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anatomies", required=True)
    parser.add_argument("--workers", default="1")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--overlay", default="tiny")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:

        def config(workers: int) -> ConfigParser:
            return configuration(options.anatomies, workers, options.steps, folder, options.overlay)

        head = rendering(config(0), min(20, options.steps))
        batch = int(config(0)["batch_size"])
        rows = [("in memory", 0, measure(config(0), 16))]
        rows += [("rendered by workers", n, measure(config(n), 0)) for n in map(int, options.workers.split(","))]
    step = rows[0][2]["cpu"]
    lines = [
        "# Endless heads beside heads in memory",
        "",
        f"`python benchmarks/endless.py --workers {options.workers} --steps {options.steps}`: pretraining with "
        f"`{options.overlay}.json` and `synthetic.json`, mini-batches of {batch}, one thread; {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, load of the machine {os.getloadavg()[0]:.1f} at "
        "the end.",
        "",
        f"CPU seconds: a step {step:.3f}; rendering its {batch} heads {batch * head:.3f}. One worker on a core of its "
        f"own makes heads {step / (batch * head):.1f} times as fast as the training uses them.",
        "",
        "| heads | workers | step s | waiting for data s | waiting |",
        "|---|---|---|---|---|",
    ]
    for name, workers, found in rows:
        share = found["waiting"] / found["wall"]
        lines.append(f"| {name} | {workers} | {found['wall']:.3f} | {found['waiting']:.4f} | {share:.1%} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
