# SPDX-License-Identifier: Apache-2.0
"""A trained model in MLflow's registry."""

from __future__ import annotations

from pathlib import Path

import mlflow
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from fake_runs import Writer
from packed import ROOT, random_weights

from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.sharing.registry import register


def test_a_registered_model_takes_a_scan_and_gives_its_class(
    weights: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", before)  # MLflow writes it, and no later test shall see that
    writer = Writer(tmp_path / "store")
    metrics = read_json(weights["ixi_sex"].with_suffix(".json"))["metrics"]
    writer.run("ixi_sex", "volta", 0, metrics={**metrics, "auroc": 0.6})  # another run of the same init and fold
    for other in ({"encoder_sha256": "d" * 64}, {"fraction": 0.2}):  # of other settings, with the same results
        writer.run("ixi_sex", "volta", 0, metrics=metrics, **other)
    run_id = writer.run("ixi_sex", "volta", 0, metrics=metrics)
    bundle = ROOT / "bundles" / "ixi_sex"
    assert register(bundle, overlays=["tiny"], model=weights["ixi_sex"], tracking_uri=writer.uri) == 0
    assert "models:/ixi_sex_phantom_tiny/1: the model of volta_fold0_frac1_seed0" in capsys.readouterr().out
    version = writer.client.get_model_version("ixi_sex_phantom_tiny", "1")
    assert version.run_id == run_id
    logged = Path(writer.client.download_artifacts(run_id, "model", str(tmp_path)))
    texts = [path.read_text() for path in logged.rglob("*") if path.suffix in ("", ".json", ".yaml") and path.is_file()]
    assert len(texts) > 5 and not [text for text in texts if str(ROOT) in text or str(tmp_path) in text]

    scan = tmp_path / "001.nii.gz"
    grid = np.indices((60, 64, 60)).transpose(1, 2, 3, 0)
    head = np.clip(28 - np.linalg.norm(grid - np.array([30, 32, 30]), axis=-1), 0, 8)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = [-90, -96, -90]
    nib.save(nib.Nifti1Image((100 * head).astype(np.float32), affine), scan)
    try:
        model = mlflow.pyfunc.load_model("models:/ixi_sex_phantom_tiny/1")
        table = model.predict([str(scan)])
        kept = model.predict([str(scan)], params={"output": str(tmp_path / "kept")})
    finally:
        mlflow.set_tracking_uri(before)
    [row] = table.to_dict("records")
    assert row["prediction"] in ("male", "female") and row["male"] + row["female"] == pytest.approx(1, abs=1e-3)
    assert row["file"] == str(scan) and row["subject_id"] == "001"
    text = {"subject_id": str, "session": str}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "kept" / "predictions.csv", dtype=text), kept)


def test_a_model_whose_settings_name_a_folder_is_refused(weights: dict[str, Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"dataset_dir": "/home/anna/study"}')
    with pytest.raises(InputError, match="places have an absolute path"):
        register(ROOT / "bundles/ixi_sex", overlays=["tiny", str(mine)], model=weights["ixi_sex"], tracking_uri="none")


@pytest.mark.parametrize("changes", [{"tags": {}}, {"tags": None}, {"metrics": None}, {"metrics": {}}])
def test_a_model_that_no_run_has_scored_is_refused(tmp_path: Path, changes: dict[str, None]) -> None:
    """As an encoder, a model that annotators have trained, or the one that ships."""
    model = random_weights("ixi_sex", tmp_path)
    path = model.with_suffix(".json")
    write_json(path, {key: value for key, value in {**read_json(path), **changes}.items() if value is not None})
    writer = Writer(tmp_path / "store")
    writer.run("ixi_sex", "volta", 0, metrics={"auroc": 0.1})
    with pytest.raises(InputError, match=r"model\.json: no tags or no results of a fine-tuning"):
        register(ROOT / "bundles/ixi_sex", overlays=["tiny"], model=model, tracking_uri=writer.uri)


def test_a_model_without_its_run_is_refused(weights: dict[str, Path], tmp_path: Path) -> None:
    writer = Writer(tmp_path / "store")
    writer.run("ixi_sex", "volta", 0, metrics={"auroc": 0.1})
    with pytest.raises(InputError, match="no finished run has this model's results"):
        register(ROOT / "bundles/ixi_sex", overlays=["tiny"], model=weights["ixi_sex"], tracking_uri=writer.uri)
