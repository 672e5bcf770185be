# SPDX-License-Identifier: Apache-2.0
"""What the tests of inference share."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from inference_bundles import CUBE, ORIENTATIONS, SHAPE, BrightSides, affine_of, image_of
from labelled_scans import head
from prepared import PRETRAIN, ROOT

from volta_components.downstream.start import save_model
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder


@pytest.fixture(scope="session")
def sides_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hippocampus bundle around a network whose output is known."""
    folder = tmp_path_factory.mktemp("bundle") / "sides"
    shutil.copytree(ROOT / "bundles" / "harp_hippocampus" / "configs", folder / "configs")
    config = folder / "configs" / "inference.json"
    content = json.loads(config.read_text())
    network = {"_target_": f"{BrightSides.__module__}.BrightSides"}
    content |= {"network_def": network, "volume_size": CUBE, "image_size": CUBE}
    config.write_text(json.dumps(content))
    save_model(folder / "models" / "model.pt", BrightSides(), {})
    return folder


@pytest.fixture(scope="session")
def encoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretraining bundle as it is packed: weights in ``model.pt``, sizes of its volumes in the config."""
    folder = tmp_path_factory.mktemp("bundle") / "encoder"
    shutil.copytree(PRETRAIN, folder / "configs")
    config = folder / "configs" / "inference.json"
    sizes = {"hidden_size": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "summary_heads": 4}
    places = {"volume_size": CUBE, "global_size": CUBE, "bundle_root": ".", "num_workers": 0}
    config.write_text(json.dumps(json.loads(config.read_text()) | places | sizes))
    torch.manual_seed(4)
    network = VoltaViT(img_size=CUBE, decoder=False, **sizes)
    with torch.no_grad():
        network.summariser.cls_token.normal_()
        network.patch_embedding.position_embeddings.normal_()
    save_encoder(folder / "models" / "encoder.safetensors", network, {"patient_ids": []})
    record = json.loads((folder / "models" / "encoder.json").read_text())
    for name in ("encoder.safetensors", "encoder.json"):
        (folder / "models" / name).unlink()
    save_model(folder / "models" / "model.pt", network, {})
    made = json.loads((folder / "models" / "model.json").read_text())
    (folder / "models" / "model.json").write_text(json.dumps({**record, "sha256": made["sha256"]}))
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head in every orientation of three kinds of grid, and beside it in ``truth`` its label map."""
    folder = tmp_path_factory.mktemp("raw")
    for kind in SHAPE:
        affine = affine_of(kind)
        voxels, label = head(SHAPE[kind], affine, seed=7)
        for number, orientation in enumerate(ORIENTATIONS):
            for name, array in (("scans", (voxels * 1000).astype(np.int16)), ("truth", label)):
                (folder / name).mkdir(exist_ok=True)
                turned = image_of(array, affine).as_reoriented(orientation)
                nib.save(turned, folder / name / f"sub-{kind}{number:02d}_T1w.nii")
    return folder


@pytest.fixture
def scans(raw: Path, tmp_path: Path) -> Path:
    """Two good scans, one in a zipped file."""
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(raw / "scans" / "sub-isotropic00_T1w.nii", folder)
    nib.save(nib.load(raw / "scans" / "sub-oblique20_T1w.nii"), folder / "sub-zipped_T1w.nii.gz")
    return folder


@pytest.fixture(autouse=True)
def _path_of_modules() -> Iterator[None]:
    """``monai.bundle`` puts each bundle's folder on the path."""
    before = list(sys.path)
    yield
    sys.path[:] = before
