# SPDX-License-Identifier: Apache-2.0
"""``docs/python.md`` as its reader runs it: every block, in order, on small weights, in a folder laid out for it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from labelled_scans import centred_affine, head, write_scan
from monai.bundle import ConfigParser
from prepared import PRETRAIN, ROOT, make_prepared

from volta_components.cli import main
from volta_components.data.datalist import load_datalist
from volta_components.downstream.start import save_model
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder
from volta_components.training.record import provenance

GUIDE = ROOT / "docs" / "python.md"
# Sizes that take no time; the encoder has twelve blocks, as MONAI's UNETR.
ENCODER: dict[str, Any] = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 12, "num_heads": 2, "summary_heads": 2}
SEGMENTATION: dict[str, Any] = {
    "volume_size": [32] * 3,
    "image_size": [32] * 3,
    "feature_size": 4,
    "hidden_size": 24,
    "mlp_dim": 32,
    "num_layers": 4,
    "num_heads": 4,
}


def blocks() -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles with small random weights, scans, and a data set with labels, under the names that the guide uses."""
    folder = tmp_path_factory.mktemp("workplace")
    for place in ("bundles/pretrain", "bundles/harp_hippocampus", "downloaded/harp_hippocampus"):
        shutil.copytree(ROOT / "bundles" / Path(place).name / "configs", folder / place / "configs")
        config = folder / place / "configs" / "inference.json"
        is_encoder = place.endswith("pretrain")
        config.write_text(json.dumps(json.loads(config.read_text()) | (ENCODER if is_encoder else SEGMENTATION)))
        if not is_encoder:
            parser = ConfigParser()
            parser.read_config(str(config))
            torch.manual_seed(1)
            save_model(folder / place / "models" / "model.pt", parser.get_parsed_content("network_def"), {})
    torch.manual_seed(2)
    record = provenance({}, "0" * 64, [{"patient_id": "somebody else"}])
    tiny = ENCODER | json.loads((PRETRAIN / "tiny.json").read_text())
    tiny_sizes = {name: tiny[name] for name in ENCODER} | {"img_size": tiny["global_size"]}
    for suffix, sizes in (("", ENCODER), ("_phantom_tiny", tiny_sizes)):
        network = VoltaViT(**sizes, decoder=False)
        save_encoder(folder / "bundles" / "pretrain" / "models" / f"encoder{suffix}.safetensors", network, record)
    for number in (1, 2):
        shape = (34 + number, 40, 36)
        affine = centred_affine(shape)
        for place in ("scans", f"bids/sub-{number:02d}/anat"):
            item = write_scan(folder / place, f"sub-{number:02d}", *head(shape, affine, number), affine)
            Path(item["label"]).unlink()
    make_prepared(folder / "data" / "ixi")
    return folder


@pytest.mark.slow
def test_every_block_of_the_guide_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    found = blocks()
    assert {language for language, _ in found} == {"bash", "python"}
    names: dict[str, Any] = {}
    for language, text in found:
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # exporters' own
                exec(compile(text, GUIDE.name, "exec"), names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line)
            assert program == "volta3d"
            assert main(words) == 0, capsys.readouterr().err

    out = workplace / "out"
    scan = nib.load(workplace / "scans" / "sub-01_T1w.nii.gz")
    for path in (out / "masks" / "sub-01_T1w_hippocampus.nii.gz", out / "bids" / "sub-01_T1w_hippocampus.nii.gz"):
        assert nib.load(path).shape == scan.shape
    assert nib.load(out / "embeddings" / "attention" / "sub-01_T1w_attention.nii.gz").shape == scan.shape
    with np.load(out / "embeddings" / "embeddings.npz") as all_, np.load(out / "two" / "embeddings.npz") as two:
        assert all_["subject_id"].tolist() == ["sub-01", "sub-02"]
        assert np.array_equal(all_["summary"], two["summary"])
    with np.load(out / "phantom" / "embeddings.npz") as tiny:
        assert tiny["summary"].shape == (2, 192)
    assert names["other"].shape == (2, 24) and names["maps"].shape == (1, 24, 9, 12, 12)
    assert names["attention"].mean() == pytest.approx(1, abs=0.05)

    # The classifier's numbers: whose they are, that nobody is fitted on himself, and the AUROC by counting pairs.
    items = load_datalist(workplace / "data" / "ixi").items
    assert names["female"].tolist() == [item["sex"] == "F" for item in items]
    scores, female = names["scores"], names["female"]
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[female] for b in scores[~female]]
    assert names["auroc"] == pytest.approx(np.mean(pairs))
    assert names["low"] <= names["auroc"] <= names["high"]
    printed = capsys.readouterr().out
    assert f"AUROC {names['auroc']:.3f}, out of fold, 12 scans of 12 patients" in printed
    assert "1 resampled (vit.patch_embedding.position_embeddings 9x12x12 -> 6x6x6)" in printed


def test_what_the_guide_says_of_the_position_embedding() -> None:
    """Another number of tokens is refused even by ``strict=False``; another shape of the same number is not."""
    from monai.networks.nets import ViT

    def vit(*size: int) -> ViT:
        return ViT(1, size, (16, 16, 16), hidden_size=12, mlp_dim=12, num_layers=1, num_heads=2, proj_type="conv")

    weights = vit(32, 48, 48).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for patch_embedding\.position_embeddings"):
        vit(32, 48, 32).load_state_dict(weights, strict=False)
    vit(48, 48, 32).load_state_dict(weights)
