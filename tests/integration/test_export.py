# SPDX-License-Identifier: Apache-2.0
"""Export as the model cards say: each card's own commands, in a packed bundle's folder, then numbers compared."""

from __future__ import annotations

import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from bundle_process import BundleProcess
from monai.bundle import ConfigParser
from packed import BUNDLES, ROOT, random_weights
from torch import nn

from volta_components.downstream.start import load_model
from volta_components.method.weights import load_encoder
from volta_components.sharing.pack import pack_bundle

pytestmark = pytest.mark.slow


def commands(card: Path) -> list[list[str]]:
    """Arguments of each ``python -m monai.bundle`` in the section about export."""
    section = card.read_text(encoding="utf-8").split("\n## Export\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    words = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert all(line[:3] == ["python", "-m", "monai.bundle"] for line in words)
    return [line[3:] for line in words]


def reference(folder: Path) -> nn.Module:
    """The bundle's network with its weights, by the package's own loaders."""
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser["bundle_root"] = str(folder)
    if "encoder_path" in parser:
        return load_encoder(folder)
    network = parser.get_parsed_content("network_def")
    load_model(network, folder / "models" / "model.pt")
    return network.eval()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_exported_networks_give_the_networks_output(bundle: str, tmp_path: Path) -> None:
    packed = pack_bundle(
        ROOT / "bundles" / bundle, tmp_path, ["tiny"], model=random_weights(bundle, tmp_path / "weights")
    )
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / f"{bundle}_phantom_tiny"
    to_torchscript, to_onnx = commands(folder / "docs" / "README.md")
    assert (to_torchscript[0], to_onnx[0]) == ("ckpt_export", "onnx_export")
    for number, words in enumerate((to_torchscript, to_onnx)):
        process = BundleProcess(words, folder, tmp_path / f"log{number}.txt")
        assert process.wait() == 0, process.output[-3000:]

    network = reference(folder)
    image = torch.rand(1, 1, *network.config["img_size"])
    with torch.no_grad():
        expected = network(image)
        exported = torch.jit.load(folder / "models" / "model.ts")
        torch.testing.assert_close(exported(image), expected, atol=1e-5, rtol=0)
        both = torch.cat([image, 0.5 * image])
        torch.testing.assert_close(exported(both), network(both), atol=1e-5, rtol=0)
    session = onnxruntime.InferenceSession(folder / "models" / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(["pred"], {"image": image.numpy()})
    assert output.shape == expected.shape
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-4, rtol=0)
    assert expected.std() > 1e-3  # an output of zeros would be easily equal
    assert sorted(path.name for path in (folder / "models").iterdir()) == [
        "model.json",
        "model.onnx",
        "model.pt",
        "model.ts",
    ]
