# SPDX-License-Identifier: Apache-2.0
"""The report's section on the pretraining."""

from __future__ import annotations

import re

import numpy as np
import pytest
from fake_runs import Writer
from PIL import Image

from volta_components.errors import InputError
from volta_components.files import write_json
from volta_components.report.command import report
from volta_components.report.pretraining import describe_pretraining
from volta_components.report.store import Store


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60), 90, np.uint8)).save(path)
    return path


def test_curves_probes_and_reconstruction_have_a_section(store_uri, tmp_path):
    writer = Writer(tmp_path / "run")
    lines = {"train/loss": [3.0, 2.0], "train/global_teacher_entropy": [0.9, 0.8], "val/reconstruction": [0.2, 0.1]}
    drawn = [picture(tmp_path / f"reconstruction_{epoch:04d}.png") for epoch in (1, 10)]
    tags = {"hardware": "NVIDIA H100", "command": "python -m monai.bundle run", "finished": None}
    run_id = writer.run("pretrain", "volta", 0, curves=lines, files={"pictures": drawn[1]}, **tags)
    writer.client.log_artifact(run_id, str(drawn[0]), "pictures")
    probe = {"label": "sex", "embedding": "summary", "probe": "linear", "subjects": 120, "positive": 60, "leak": "none"}
    areas = {"volta": (0.91, 0.85, 0.95), "random": (0.5, 0.4, 0.6)}
    rows = [
        {**probe, "encoder": name, "auroc": area, "auroc_low": low, "auroc_high": high}
        for name, (area, low, high) in areas.items()
    ]
    (tmp_path / "eval").mkdir()
    write_json(tmp_path / "eval" / "probes.json", rows)
    picture(tmp_path / "eval" / "embeddings.png")
    folders = [tmp_path / "run", tmp_path / "eval"]
    one = ["volta3d_aibl_ad"]
    assert report(tmp_path / "out", store_uri, experiments=one, bootstrap=100, pretraining=folders) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    [section] = re.findall(r'<section id="pretraining">.*?</section>', page, flags=re.DOTALL)
    assert "<dt>held-out reconstruction error</dt><dd>0.1000</dd>" in section and "NVIDIA H100" in section
    assert "After epoch 10" in section and section.count("<img") == 3
    assert re.search(r"<td>0.91<small>\[0.85, 0.95\]</small></td><td>0.50<small>\[0.40, 0.60\]</small></td>", section)
    assert (tmp_path / "out/tables/pretraining_probes.csv").is_file()


def test_without_a_pretraining_there_is_no_section(store_uri, made, tmp_path):
    assert describe_pretraining(Store(store_uri), [], tmp_path) is None
    assert 'id="pretraining"' not in (made / "index.html").read_text()
    with pytest.raises(InputError, match=r"neither mlruns\.db nor probes\.json"):
        describe_pretraining(Store(store_uri), [tmp_path], tmp_path)
