# SPDX-License-Identifier: Apache-2.0
"""Bundles of the quick start's size with random weights, packed: what the tests of packing and downloading share."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from volta_components.downstream.start import save_model
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder
from volta_components.training.record import provenance

ROOT = Path(__file__).parents[2]
BUNDLES = ("pretrain", "ixi_sex", "aibl_ad", "harp_hippocampus")


def tiny_config(bundle: str) -> ConfigParser:
    """The inference config with the overlay tiny."""
    parser = ConfigParser()
    folder = ROOT / "bundles" / bundle / "configs"
    parser.read_config([str(folder / "inference.json"), str(folder / "tiny.json")])
    parser["bundle_root"] = str(ROOT / "bundles" / bundle)
    return parser


def tiny_network(bundle: str) -> torch.nn.Module:
    """The quick start's network with random weights."""
    torch.manual_seed(11)
    network = tiny_config(bundle).get_parsed_content("network_def")
    assert isinstance(network, torch.nn.Module)
    return network


def random_weights(bundle: str, folder: Path, **changes: Any) -> Path:
    """Random weights with a record as a training run writes it."""
    items = [{"patient_id": f"sub-{number:03d}"} for number in range(6)]
    settings = {"seed": 5, "epochs": 3, **changes}
    origin = provenance(settings, "d" * 64, items, "phantom")
    network = tiny_network(bundle)
    if bundle == "pretrain":
        path = folder / "encoder_phantom_tiny.safetensors"
        assert isinstance(network, VoltaViT)
        save_encoder(path, network, {**origin, "epochs": 3})
        return path
    path = folder / "model_phantom_tiny.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "bundle": bundle,
        "tags": {"init": "volta", "fold": "0", "fraction": "1", "leak": "none", "encoder_sha256": "e" * 64},
        "provenance": origin,
        "pretraining": {
            "encoder_sha256": "e" * 64,
            "datalist_hash": "f" * 64,
            "phantom": True,
            "patient_ids": ["0" * 16],
        },
        "subjects": {"training": 4, "validation": 2, "scored": 2, "unused": 0},
        "metrics": {"auroc": 0.75, "optimistic_threshold": 0.25},
        "intervals": {"auroc": [0.5, 1.0]},
        "threshold": 0.5,
    }
    save_model(path, network, record)
    return path


def names_of(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as zipped:
        return zipped.namelist()


def unpack(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as zipped:
        zipped.extractall(folder)
    return folder / path.name.split("_v")[0]
