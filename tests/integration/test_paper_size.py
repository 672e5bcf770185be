# SPDX-License-Identifier: Apache-2.0
"""The README's pretraining command at the paper's size: ViT-B, 144 x 192 x 192, nothing made smaller."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prepared import PRETRAIN, make_prepared

from volta_components.method.networks import VoltaViT
from volta_components.method.weights import load_encoder

# Starts the command and prints the peak of resident memory, in GiB, of it and its workers.
MEASURED = """
import resource, subprocess, sys
status = subprocess.call([sys.executable, "-m", "monai.bundle", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
sys.exit(status)
"""


@pytest.mark.slow
def test_a_step_of_the_papers_recipe_fits_into_24_gib(tmp_path: Path) -> None:
    """One volume, one epoch, no warm-up; everything else is ``train.json`` as it is, run from the root."""
    shutil.copytree(PRETRAIN, tmp_path / "bundles" / "pretrain" / "configs")
    make_prepared(tmp_path / "data" / "pretrain", 1, 1, (144, 192, 192))
    config = "bundles/pretrain/configs/train.json"
    done = subprocess.run(
        [
            *(sys.executable, "-c", MEASURED, "run", "--config_file", config),
            *("--epochs", "1", "--warmup_epochs", "0", "--num_workers", "1"),
        ],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    peak = float(done.stdout.splitlines()[-1])
    assert 1 < peak < 24
    print(f"peak {peak:.1f} GiB")
    encoder = load_encoder(tmp_path / "bundles" / "pretrain")
    assert isinstance(encoder, VoltaViT)
    assert (encoder.config["hidden_size"], encoder.grid) == (768, (9, 12, 12))
    record = json.loads((tmp_path / "bundles" / "pretrain" / "models" / "encoder.json").read_text())
    assert record["provenance"]["iterations"] == 1
    assert record["provenance"]["settings"]["head_out_dim"] == 8192
    assert (tmp_path / "bundles" / "pretrain" / "runs" / "volta3d" / "pictures" / "reconstruction_0001.png").is_file()
