# SPDX-License-Identifier: Apache-2.0
"""What the tests of all bundles share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from labelled_scans import make_labelled, make_quick_start
from monai.bundle import ConfigParser
from prepared import PRETRAIN, make_prepared
from segmentation_bundle import run

from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of twelve volumes of 32^3; nobody may change it."""
    return make_prepared(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder of two blocks of 32, with random weights."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    network = VoltaViT(
        img_size=(32, 32, 32), hidden_size=32, mlp_dim=48, num_layers=2, num_heads=4, summary_heads=4, decoder=False
    )
    save_encoder(path, network, {"datalist_hash": "0" * 64, "patient_ids": []})
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of the quick start's grid, of both sexes and diagnoses, with label maps; nobody may change it."""
    return make_quick_start(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder of the quick start's sizes, with random weights."""
    path = tmp_path_factory.mktemp("tiny_encoder") / "encoder_phantom_tiny.safetensors"
    parser = ConfigParser()
    parser.read_config([str(PRETRAIN / f"{name}.json") for name in ("train", "tiny")])
    config = dict(parser.get_parsed_content("network_def").config)
    save_encoder(path, VoltaViT(**config, decoder=False), {"datalist_hash": "0" * 64, "patient_ids": []})
    return path


@pytest.fixture(scope="session")
def schema() -> Path:
    """The form that a bundle's ``metadata.json`` must have."""
    return Path(__file__).parents[1] / "resources" / "bundle_metadata_schema.json"


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set with label maps; nobody may change it."""
    return make_labelled(tmp_path_factory.mktemp("labelled") / "data")


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder of four blocks of 24, with random weights."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(3)
    network = VoltaViT(
        img_size=(32, 32, 32), hidden_size=24, mlp_dim=32, num_layers=4, num_heads=4, summary_heads=4, decoder=False
    )
    save_encoder(path, network, {"datalist_hash": "0" * 64, "patient_ids": []})
    return path


@pytest.fixture(scope="session")
def finished(labelled: Path, small_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the VolTA init, recorded by MLflow; nobody may change it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    run(
        ("train",),
        labelled,
        output,
        encoder_path=str(small_encoder),
        tracking="mlflow",
        tracking_uri=f"sqlite:///{output.parent}/mlruns.db",
        run_name="volta_fold0_frac1_seed0",
    )
    return output
