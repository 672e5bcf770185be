# SPDX-License-Identifier: Apache-2.0
"""A cross-validation of the sex bundle in real processes, killed in the middle and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from mlflow import MlflowClient

from volta_components.data.datalist import make_content
from volta_components.files import sha256_file, write_json
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "ixi_sex"
NETWORK = {"hidden_size": 24, "mlp_dim": 24, "num_layers": 2, "num_heads": 2, "summary_heads": 2}
SETTINGS = {
    "epochs": 3,
    "warmup_epochs": 1,
    "batch_size": 4,
    "spacing": 6.0,
    "volume_size": [24, 32, 32],
    "image_size": [32, 32, 32],
    "unfrozen_blocks": 1,
    **NETWORK,
}


@pytest.fixture
def data(tmp_path):
    """Forty volumes of 6 mm, brighter in women, in two folds; an encoder that was pretrained on somebody else."""
    rng = np.random.default_rng(0)
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    (tmp_path / "data/images").mkdir(parents=True)
    items = []
    for number in range(40):
        sex = "FM"[number % 2]
        volume = np.clip(rng.normal(0.4 + 0.1 * (sex == "F"), 0.1, (24, 32, 32)), 0, 1).astype(np.float32)
        name = f"images/sub-{number:04d}_ses-M000.nii"
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / "data" / name)
        item = {"subject_id": f"sub-{number:04d}", "patient_id": f"sub-{number:04d}", "session": "ses-M000", "sex": sex}
        item |= {"image": name, "site": "A", "cohort": "phantom", "diagnosis": "CN", "age": 60.0, "source": name}
        digest = sha256_file(tmp_path / "data" / name)
        items.append({**item, "fold": number // 2 % 2, "source_sha256": digest, "sha256": digest})
    shutil.copytree(BUNDLE / "configs", tmp_path / "bundles/ixi_sex/configs")
    content = make_content("phantom", [6.0] * 3, [24, 32, 32], 0, 2, items, [])
    write_json(tmp_path / "data/datalist.json", content)
    network = VoltaViT(in_channels=1, img_size=(32, 32, 32), patch_size=(16, 16, 16), decoder=True, **NETWORK)
    save_encoder(tmp_path / "encoder.safetensors", network, {"datalist_hash": "0" * 64, "patient_ids": []})
    return tmp_path


def command(data: Path) -> list[str]:
    settings = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
    return [
        *(sys.executable, "-m", "volta_components.cli", "crossval", "--bundle", str(data / "bundles/ixi_sex")),
        *("--datalist", str(data / "data/datalist.json"), "--inits", "volta,vit_scratch", "--folds", "2"),
        *("--fractions", "0.5,1.0", "--overlays", "tiny.json", "--encoder", str(data / "encoder.safetensors")),
        *("--set", settings, "--jobs", "2", "--output", str(data / "runs")),
    ]


def all_runs(data: Path) -> list:
    client = MlflowClient(f"sqlite:///{data}/runs/mlruns.db")
    experiment = client.get_experiment_by_name("volta3d_ixi_sex")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


@pytest.mark.slow
@pytest.mark.skipif(not (BUNDLE / "configs/train.json").is_file(), reason="the bundle is not here")
def test_two_folds_two_inits_two_fractions_killed_once_in_the_middle(data):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    first = subprocess.Popen(
        command(data),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 400
    # Killed when some runs are finished and another one has trained at least one epoch.
    while first.poll() is None and time.monotonic() < deadline:
        done = [*data.glob("runs/ixi_sex/*/result.json")]
        going = [
            path for path in data.glob("runs/ixi_sex/*/checkpoint.pt") if not (path.parent / "result.json").exists()
        ]
        if len(done) >= 2 and going:
            break
        time.sleep(0.05)
    assert first.poll() is None, first.communicate()[0].decode()[-3000:]
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    finished = {run.info.run_id for run in all_runs(data) if run.data.tags.get("finished") == "true"}
    assert 0 < len(finished) < 8

    second = subprocess.run(
        command(data), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=480, check=False
    )
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"8 of 8 runs are finished, {len(finished)} of them from before" in second.stdout
    runs = all_runs(data)
    names = Counter(run.info.run_name for run in runs)
    assert names == Counter(
        f"{init}_fold{fold}_frac{fraction:g}_seed{fold}"
        for init in ("volta", "vit_scratch")
        for fold in (0, 1)
        for fraction in (0.5, 1.0)
    )
    assert all(run.data.tags["finished"] == "true" for run in runs)
    assert finished <= {run.info.run_id for run in runs}
    assert {run.info.status for run in runs} == {"FINISHED"}
    # The broken runs went on: every epoch was trained, and counted, once.
    client = MlflowClient(f"sqlite:///{data}/runs/mlruns.db")
    for run in runs:
        record = json.loads(Path(client.download_artifacts(run.info.run_id, "result.json", str(data))).read_text())
        assert [row["epoch"] for row in record["history"]] == [1, 2, 3], run.info.run_name
        # MLflow hears of an epoch after its checkpoint: the one in between may be missing, none is there twice.
        steps = [item.step for item in client.get_metric_history(run.info.run_id, "train/loss")]
        assert len(steps) == len({*steps}) >= 2 and {*steps} <= {1, 2, 3}, (run.info.run_name, steps)
    # All inits of a fold and fraction were scored on the same patients.
    tables = {run.info.run_name: client.list_artifacts(run.info.run_id, "predictions") for run in runs}
    assert all([item.path for item in found] == ["predictions/predictions.csv"] for found in tables.values())

    from volta_components.report.command import report

    status = report(data / "report", f"sqlite:///{data}/runs/mlruns.db", bootstrap=200)
    assert status == 0  # everything that was begun is finished; the other tables of the paper have no runs
    page = (data / "report/index.html").read_text()
    assert "These are phantoms" in page and "Figure 2" in page
    # Nothing that is passed on names a folder of this machine.
    passed_on = [page, (data / "report/tables/made.csv").read_text()]
    passed_on += [str({**run.data.tags, **run.data.params}) for run in runs]
    texts = [path for path in data.glob("runs/mlruns/*/artifacts/**/*") if path.suffix in (".json", ".txt", ".csv")]
    passed_on += [path.read_text() for path in texts]
    assert len(texts) > len(runs) and not [text for text in passed_on if str(data) in text or sys.prefix in text]
