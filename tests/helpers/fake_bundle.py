# SPDX-License-Identifier: Apache-2.0
"""A bundle as small as can be that keeps the downstream bundles' contract with crossval and report."""

from __future__ import annotations

import csv
import functools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from volta_components.errors import InputError
from volta_components.files import sha256_json, write_json
from volta_components.training.tracking import find_mlflow_handler, prepare_handlers

SUBJECTS = 24


class Finish:
    """Writes predictions and marks the run finished; can be told to fail, or to take its time."""

    def __init__(self, network: Any, items: list[dict[str, Any]], folder: str, tags: dict[str, Any]) -> None:
        self.network, self.items, self.folder, self.tags = network, items, Path(folder), tags

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, prepare_handlers)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.wait)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def wait(self, engine: Engine) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            with (self.folder / "epochs.txt").open("a") as stream:
                stream.write(f"{engine.state.epoch} of {os.environ.get('WORLD_SIZE', 1)}\n")
        if os.environ.get("FAKE_FAIL") == self.folder.name.rsplit("-", 1)[0]:
            raise RuntimeError("told to fail")
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))

    def finish(self, engine: Engine) -> None:
        handler = find_mlflow_handler(engine)
        if handler is None:
            return
        path = self.folder / "predictions.csv"
        with path.open("w", newline="") as stream:
            rows = csv.DictWriter(stream, ["subject_id", "patient_id", "label", "score", "prediction", "threshold"])
            rows.writeheader()
            for item in self.items:
                score = torch.sigmoid(self.network(features(item)[None])).item()
                rows.writerow(
                    {key: item[key] for key in ("subject_id", "patient_id", "label")}
                    | {"score": score, "prediction": int(score >= 0.5), "threshold": 0.5}
                )
        run_id = handler.cur_run.info.run_id
        handler.client.log_artifact(run_id, str(path), "predictions")
        for name, value in {**self.tags, "finished": "true"}.items():
            handler.client.set_tag(run_id, name, str(value))


def features(item: dict[str, Any]) -> torch.Tensor:
    rng = np.random.default_rng(int(item["subject_id"].removeprefix("sub-")))
    return torch.tensor(rng.normal(size=4) + item["label"], dtype=torch.float32)


def check(path: str, fold: int, fraction: float) -> None:
    """As the bundles do: what is wrong with a run's subjects is an error before it starts."""
    if len(load(path, fold, fraction)[0]) < 3:
        raise InputError(f"fraction {fraction} is too small for fold {fold}")


def load(path: str, fold: int, fraction: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    content = json.loads(Path(path).read_text())
    rest = [item for item in content["training"] if item["fold"] != fold]
    scored = [item for item in content["training"] if item["fold"] == fold]
    train = [
        {"image": features(item), "label": torch.tensor([float(item["label"])])}
        for item in rest[: max(2, round(fraction * len(rest)))]
    ]
    return train, scored, content["hash"]


@functools.cache
def _template() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlruns.db").search_experiments()
        return Path(folder, "mlruns.db").read_bytes()


def empty_store(folder: Path) -> str:
    """The address of a new MLflow store in a folder; its tables are made once, as that takes seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mlruns.db").write_bytes(_template())
    return f"sqlite:///{folder}/mlruns.db"


def write_datalist(path: Path, folds: int = 2) -> Path:
    training = [
        {
            "image": f"images/sub-{i:04d}.nii",
            "subject_id": f"sub-{i:04d}",
            "patient_id": f"sub-{i:04d}",
            "session": "ses-1",
            "label": i % 2,
            "fold": i // 2 % folds,
        }
        for i in range(SUBJECTS)
    ]
    size = {"spacing": [1.0, 1.0, 1.0], "shape": [8, 8, 8]}
    content = {"name": "fake", "format": 1, "n_folds": folds, "seed": 0, **size, "training": training}
    write_json(path, {**content, "hash": sha256_json(content)})
    return path


def write_bundle(folder: Path) -> Path:
    """Write the bundle ``fake`` with the overlays ``linear_scratch``, ``tiny`` and ``multi_gpu_train``."""
    train = {
        "_desc_": "a comment",
        "imports": [
            "$import os",
            "$from fake_bundle import check as check_fake",
            "$from fake_bundle import load as load_fake",
        ],
        "bundle_root": ".",
        "run_name": "fake",
        "experiment_name": "fake",
        "output_dir": "$@bundle_root + '/runs/' + str(@run_name)",
        "datalist_path": "datalist.json",
        "encoder_path": "$os.path.join(@bundle_root, 'models', 'encoder.safetensors')",
        "init": "volta",
        "seed": 0,
        "fold": 0,
        "fraction": 1.0,
        "epochs": 3,
        "hidden": [4, 4],
        "settings": {"seed": "@seed", "fold": "@fold", "fraction": "@fraction", "epochs": "@epochs", "init": "@init"},
        "device": "$torch.device('cpu')",
        "checks": ["$check_fake(@datalist_path, @fold, @fraction)"],
        "loaded": "$load_fake(@datalist_path, @fold, @fraction)",
        "network": "$torch.nn.Linear(4, 1)",
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.1},
        "train": {
            "dataloader": {"_target_": "DataLoader", "dataset": "$@loaded[0]", "batch_size": 4},
            "handlers": [
                {
                    "_target_": "volta_components.training.checkpoint.ResumableCheckpoint",
                    "path": "$@output_dir + '/checkpoint.pt'",
                    "objects": {"network": "@network", "optimizer": "@optimizer"},
                    "settings": "@settings",
                },
                {
                    "_target_": "fake_bundle.Finish",
                    "network": "@network",
                    "items": "$@loaded[1]",
                    "folder": "@output_dir",
                    "tags": {
                        "bundle": "fake",
                        "init": "@init",
                        "fold": "@fold",
                        "fraction": "@fraction",
                        "datalist_hash": "$@loaded[2]",
                    },
                },
            ],
            "trainer": {
                "_target_": "SupervisedTrainer",
                "max_epochs": "@epochs",
                "device": "@device",
                "train_data_loader": "@train#dataloader",
                "network": "@network",
                "optimizer": "@optimizer",
                "loss_function": "$torch.nn.BCEWithLogitsLoss()",
                "train_handlers": "@train#handlers",
            },
        },
        "run": ["$@train#trainer.run()"],
    }
    overlays = {
        "linear_scratch": {"init": "linear_scratch"},
        "tiny": {"epochs": 2},
        "multi_gpu_train": {
            "initialize": ["$import torch.distributed as dist", "$dist.init_process_group(backend='gloo')"],
            "finalize": ["$dist.destroy_process_group()"],
        },
    }
    configs = folder / "fake" / "configs"
    for name, content in {"train": train, "metadata": {"version": "0.1.0"}, **overlays}.items():
        write_json(configs / f"{name}.json", content)
    models = folder / "fake" / "models"
    models.mkdir()
    (models / "encoder.safetensors").write_bytes(b"weights")
    return folder / "fake"
