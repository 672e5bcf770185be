# SPDX-License-Identifier: Apache-2.0
"""The report's section on the pretraining."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from fake_runs import Writer
from PIL import Image

from volta_components.errors import InputError
from volta_components.inference.embeddings import EmbeddingTable
from volta_components.inference.probes import probe_report
from volta_components.report.command import report
from volta_components.report.pretraining import describe_pretraining
from volta_components.report.store import Store


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60), 90, np.uint8)).save(path)
    return path


def embeddings(matrix):
    table = EmbeddingTable()
    table.rows[:] = [{"summary": row, "mean": row} for row in matrix]
    return table


def test_curves_probes_and_reconstruction_have_a_section(store_uri, tmp_path):
    writer = Writer(tmp_path / "run")
    lines = {"train/loss": [3.0, 2.0], "train/global_teacher_entropy": [0.9, 0.8], "val/reconstruction": [0.2, 0.1]}
    lines |= {"cost/hours": [2.5], "cost/peak_memory_gib": [6.25]}
    drawn = [picture(tmp_path / f"reconstruction_{epoch:04d}.png") for epoch in (1, 10)]
    tags = {"hardware": "NVIDIA H100", "command": "python -m monai.bundle run", "finished": None}
    run_id = writer.run("pretrain", "volta", 0, curves=lines, files={"pictures": drawn[1]}, **tags)
    writer.client.log_artifact(run_id, str(drawn[0]), "pictures")
    rng = np.random.default_rng(0)
    items = [
        {"subject_id": f"s{n}", "patient_id": f"p{n // 2}", "fold": n // 2 % 2, "sex": "MF"[n // 4 % 2]}
        for n in range(48)
    ]
    sex = np.array([item["sex"] == "F" for item in items])
    tables = {
        name: embeddings(rng.normal(size=(48, 3)) + shift * sex[:, None])
        for name, shift in (("volta", 5), ("random", 0))
    }
    rows = probe_report(tables, items, {"sex": ["M", "F"]}, tmp_path / "eval" / "probes.json")
    [known] = [
        row for row in rows if [row[key] for key in ("encoder", "embedding", "probe")] == ["volta", "summary", "linear"]
    ]
    assert known["value"] > 0.95
    picture(tmp_path / "eval" / "embeddings.png")
    folders = [tmp_path / "run", tmp_path / "eval"]
    one = ["volta3d_aibl_ad"]
    assert report(tmp_path / "out", store_uri, experiments=one, bootstrap=100, pretraining=folders) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    [section] = re.findall(r'<section id="pretraining">.*?</section>', page, flags=re.DOTALL)
    assert "<dt>held-out reconstruction error</dt><dd>0.1000</dd>" in section and "NVIDIA H100" in section
    assert "<dd>2.50</dd>" in section and "<dd>6.2 GiB</dd>" in section
    assert "After epoch 10" in section and section.count("<img") == 3
    line = next(
        line for line in re.findall(r"<tr>.*?</tr>", section, flags=re.DOTALL) if "summary</td><td>linear" in line
    )
    assert f"<td>{known['value']:.2f}<small>" in line and "<td>0.50</td><td>24</td>" in line
    assert (tmp_path / "out/tables/pretraining_probes.csv").is_file()


def test_without_a_pretraining_there_is_no_section(store_uri, made, tmp_path):
    assert describe_pretraining(Store(store_uri), [], tmp_path, []) is None
    assert 'id="pretraining"' not in (made / "index.html").read_text()
    with pytest.raises(InputError, match=r"neither mlruns\.db nor probes\.json"):
        describe_pretraining(Store(store_uri), [tmp_path], tmp_path, [])


def test_the_pretraining_is_the_one_that_made_the_tasks_encoder(tmp_path):
    writer = Writer(tmp_path / "store")

    def write(fold, sha, status="FINISHED"):
        record = tmp_path / "encoder.json"
        record.write_text(json.dumps({"sha256": sha}))
        run_id = writer.run("pretrain", "volta", fold, metrics={"x": 1.0}, files={"encoder": record}, finished=None)
        writer.client.set_terminated(run_id, status)
        return f"volta_fold{fold}_frac1_seed{fold}"

    def described(*encoders):
        found = describe_pretraining(Store(writer.uri), [], tmp_path, encoders)
        return found.name, found.facts["status"], found.facts.get("encoder")

    theirs, finished, failed = write(0, "a" * 64), write(1, "b" * 64), write(2, "c" * 64, "FAILED")
    assert described("a" * 64) == (theirs, "finished", "the tasks'")
    assert described("d" * 64) == (finished, "finished", "not the tasks', which started from dddddddddddd")
    assert described() == (finished, "finished", None)
    assert described("c" * 64) == (failed, "failed", "the tasks'")
