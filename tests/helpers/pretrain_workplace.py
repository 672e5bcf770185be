# SPDX-License-Identifier: Apache-2.0
"""A small data set on which the pretraining bundle is run in processes of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bundle_process import BundleProcess
from prepared import PRETRAIN, ROOT, TINY_SIZES, make_prepared

from volta_components.files import write_json

# Fold 0 (four of twelve volumes) is held out: eight mini-batches an epoch, windows of 3, 3 and 2.
EPOCHS, LENGTH = 3, 8


class Workplace:
    """A folder with a prepared data set, an overlay that makes the bundle small, and the runs' output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = itertools.count()
        self.data = make_prepared(folder / "data")
        overlay = {
            "_desc_": "For tests.",
            "dataset_dir": str(self.data),
            "ckpt_dir": str(folder / "models"),
            "encoder_path": "$@ckpt_dir + '/' + @run_name + '.safetensors'",
            "output_dir": f"$'{folder}/runs/' + @run_name",
            "num_workers": 0,
            "epochs": EPOCHS,
            "accumulation_steps": 3,
            "warmup_epochs": 1,
            "teacher_temperature_epochs": 1,
            "checkpoint_minutes": 0,
            "picture_interval": 2,
            "log_interval": 4,
            "validation_fold": 0,
            **TINY_SIZES,
        }
        write_json(folder / "overlay.json", overlay)

    def arguments(self, *options: str, configs: tuple[str, ...] = ("train",)) -> list[str]:
        """Of ``python -m monai.bundle``, with the CPU as device."""
        files = [*(str(PRETRAIN / f"{name}.json") for name in configs), str(self.folder / "overlay.json")]
        device = [] if "multi_gpu_train" in configs else ["--device", "$torch.device('cpu')"]
        return ["run", "--config_file", str(files), *device, *options]

    def start(self, *options: str, configs: tuple[str, ...] = ("train",), **environment: str) -> BundleProcess:
        """A run in a child of the server process."""
        log = self.folder / f"log{next(self.logs)}.txt"
        return BundleProcess(self.arguments(*options, configs=configs), ROOT, log, environment)

    def run(self, *options: str, configs: tuple[str, ...] = ("train",)) -> BundleProcess:
        """A run that must end well."""
        process = self.start(*options, configs=configs)
        assert process.wait() == 0, process.output[-5000:]
        return process

    def checkpoint(self, name: str) -> dict[str, Any] | None:
        """Of a run; None while there is none."""
        path = self.folder / "runs" / name / "checkpoint.pt"
        return torch.load(path, weights_only=True) if path.exists() else None

    def iteration(self, name: str) -> int:
        """Mini-batches in a run's checkpoint."""
        state = self.checkpoint(name)
        return state["engine"]["iteration"] if state else 0

    def encoder(self, name: str) -> Path:
        return self.folder / "models" / f"{name}.safetensors"


def environment() -> dict[str, str]:
    """Of a fresh process: one thread, and nothing of MLflow's that the tests' own process may have."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    return {**keep, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def fresh_process(module: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ARGUMENTS`` as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
