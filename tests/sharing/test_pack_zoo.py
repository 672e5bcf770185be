# SPDX-License-Identifier: Apache-2.0
"""What the MONAI model zoo's own script asks of a bundle in its full mode, asked of each packed bundle.

The script (``ci/verify_bundle.py`` of Project-MONAI/model-zoo) runs from the zoo's repository. The checks are the same
here, in the same order, by the same functions of MONAI.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ckpt_export, verify_metadata, verify_net_in_out
from packed import BUNDLES, ROOT, tiny_config, unpack

from volta_components.downstream.start import load_model
from volta_components.method.weights import load_encoder

SCHEMA = ROOT / "tests" / "resources" / "bundle_metadata_schema.json"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_zoos_script_would_pass_in_full_mode(packed: Path, tmp_path: Path, bundle: str) -> None:
    (path,) = packed.glob(f"{bundle}*.zip")
    folder = unpack(path, tmp_path / "models")
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt"):
        assert (folder / name).is_file(), name
    assert not list(folder.glob("large_files.*")), "nothing is left to download"

    meta_file, config_file = str(folder / "configs" / "metadata.json"), str(folder / "configs" / "inference.json")
    metadata = json.loads(Path(meta_file).read_text())
    assert metadata["version"] in metadata["changelog"]
    (folder / "eval").mkdir()
    shutil.copy(SCHEMA, folder / "eval" / "schema.json")
    verify_metadata(meta_file=meta_file, filepath=str(folder / "eval" / "schema.json"))
    # With an app named there, the script would look for a list of properties that only its repository has.
    assert metadata["supported_apps"] == {}

    files = {"meta_file": meta_file, "config_file": config_file, "bundle_root": str(folder)}
    verify_net_in_out(net_id="network_def", device="cpu", **files)
    exported = folder / "models" / "verify_model.ts"
    ckpt_export(
        net_id="network_def", filepath=str(exported), ckpt_file=str(folder / "models" / "model.pt"), **files
    )  # no use_trace: the network is scripted

    network = tiny_config(bundle).get_parsed_content("network_def")
    if bundle == "pretrain":
        network = load_encoder(folder)
    else:
        load_model(network, folder / "models" / "model.pt")
    sizes = [network.config["img_size"]]
    if bundle != "harp_hippocampus":
        sizes.append([size + 16 for size in sizes[0]])
    for size in sizes:
        image = torch.rand(2, 1, *size)
        with torch.no_grad():
            expected = network.eval()(image)
            torch.testing.assert_close(torch.jit.load(exported)(image), expected, atol=1e-5, rtol=0)
        assert expected.std() > 1e-3
