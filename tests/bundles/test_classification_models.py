# SPDX-License-Identifier: Apache-2.0
"""Trained classification models: scored again, and used for inference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundle_workflow import configs
from classification_bundle import INFERENCE_ONLY, SIDE, run, workflow
from csv_rows import read_rows
from monai.bundle import ConfigWorkflow
from prepared import ROOT

from volta_components.data.datalist import load_datalist
from volta_components.data.load import LoadScand
from volta_components.errors import InputError, find_input_error
from volta_components.files import read_json


@pytest.fixture(scope="module")
def trained(prepared, encoder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    run("aibl_ad", ("train",), prepared, encoder, output, fold=0, validation_fraction=0.5)
    return output


@pytest.mark.parametrize("fewest", [20, 1])
def test_evaluation_gives_the_same_scores_at_the_same_threshold(
    fewest, trained, prepared, encoder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("volta_components.downstream.metrics.FEWEST", fewest)
    model = str(trained / "models" / "model.pt")
    made = workflow("aibl_ad", ("train", "evaluate"), prepared, encoder, tmp_path, fold=0, model_path=model)
    made.initialize()
    made.run()
    before, after = (read_rows(folder / "predictions.csv") for folder in (trained, tmp_path))
    assert before == after
    metrics = read_json(tmp_path / "metrics.json")["metrics"]
    assert metrics.items() >= read_json(trained / "result.json")["metrics"].items()
    printed = capsys.readouterr().out
    if fewest == 20:
        assert "auroc_low" not in metrics and "(too few people for an interval)" in printed
    else:
        limits = f"({metrics['auroc_low']:.3f} to {metrics['auroc_high']:.3f})"
        assert metrics["auroc_low"] <= metrics["auroc"] <= metrics["auroc_high"] and limits in printed


def test_evaluation_refuses_those_whom_the_model_was_trained_on(trained, prepared, encoder, tmp_path):
    model = str(trained / "models" / "model.pt")
    made = workflow("aibl_ad", ("train", "evaluate"), prepared, encoder, tmp_path, fold="all", model_path=model)
    made.initialize()
    with pytest.raises(RuntimeError) as caught:
        made.run()
    assert isinstance(caught.value.__cause__, InputError)
    assert "trained or pretrained on 8 of the 12 scored patients" in str(caught.value.__cause__)


def evaluated(trained: Path, prepared: Path, encoder: Path, folder: Path, change: Any, **changes: Any) -> Any:
    """Evaluate a copy of the trained model whose record is changed by ``change(record)``; metrics.json."""
    for name in ("model.pt", "model.json"):
        folder.mkdir(exist_ok=True)
        shutil.copy(trained / "models" / name, folder / name)
    record = read_json(folder / "model.json")
    if change(record) is None:
        (folder / "model.json").write_text(json.dumps(record))
    else:
        (folder / "model.json").unlink()
    made = workflow(
        "aibl_ad",
        ("train", "evaluate"),
        prepared,
        encoder,
        folder / "eval",
        model_path=str(folder / "model.pt"),
        **{"fold": 0, **changes},
    )
    made.initialize()
    made.run()
    return read_json(folder / "eval" / "metrics.json")


def test_evaluation_refuses_those_whom_the_encoder_was_pretrained_on(trained, prepared, encoder, tmp_path):
    from volta_components.training.people import patient_key

    def leak(record: dict[str, Any]) -> None:
        record["pretraining"]["patient_ids"] = [patient_key("sub-0001", "fake")]

    with pytest.raises(RuntimeError) as caught:
        evaluated(trained, prepared, encoder, tmp_path / "a", leak)
    assert "sub-0001  pretrained on" in str(caught.value.__cause__)
    assert evaluated(trained, prepared, encoder, tmp_path / "b", leak, allow_leak=True)["leak"] == "allowed"
    assert evaluated(trained, prepared, encoder, tmp_path / "c", lambda record: None)["leak"] == "none"
    assert evaluated(trained, prepared, encoder, tmp_path / "d", lambda r: None, allow_leak=True)["leak"] == "none"


def test_evaluation_without_a_record_or_a_threshold_says_what_is_missing(trained, prepared, encoder, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        evaluated(trained, prepared, encoder, tmp_path / "a", lambda record: "no record")
    assert "does not say on which subjects it was trained and pretrained" in str(caught.value.__cause__)
    for name, change in (("b", lambda record: "no record"), ("c", lambda record: record.pop("threshold") and None)):
        with pytest.raises(RuntimeError) as caught:
            evaluated(trained, prepared, encoder, tmp_path / name, change, allow_leak=True)
        assert "has no threshold" in str(caught.value.__cause__)
    found = evaluated(trained, prepared, encoder, tmp_path / "d", lambda record: "none", allow_leak=True, threshold=0.3)
    assert found["metrics"]["threshold"] == 0.3 and found["leak"] == "allowed"
    own = read_json(trained / "models" / "model.json")["threshold"]
    for name, given, expected, origin in (("e", None, own, "inner validation"), ("f", 0.25, 0.25, "given")):
        changes = {} if given is None else {"threshold": given}
        found = evaluated(trained, prepared, encoder, tmp_path / name, lambda record: None, **changes)
        assert (found["metrics"]["threshold"], found["threshold_from"]) == (expected, origin)
        assert ("optimistic_threshold" in found["metrics"]) == (given is None)


def test_another_question_than_the_models_is_not_scored(trained, prepared, encoder, tmp_path):
    other = {"label_key": "sex", "classes": ["F", "M"], "pool": "mean"}
    with pytest.raises(RuntimeError) as caught:
        evaluated(trained, prepared, encoder, tmp_path / "a", lambda record: None, **other)
    rows = [line.split() for line in str(find_input_error(caught.value)).splitlines()]
    assert ["label_key", "diagnosis", "sex"] in rows and ["pool", "summary", "mean"] in rows
    assert "classes" in {row[0] for row in rows}


def inference(trained: Path, source: Any, output: Path, **changes: Any) -> list[dict[str, str]]:
    made = ConfigWorkflow(
        config_file=configs("aibl_ad", "inference"),
        meta_file=configs("aibl_ad", "metadata")[0],
        logging_file=False,
        workflow_type="inference",
        **{
            **INFERENCE_ONLY,
            "bundle_root": str(ROOT / "bundles" / "aibl_ad"),
            "model_path": str(trained / "models" / "model.pt"),
            "source": source,
            "output_dir": str(output),
            **changes,
        },
    )
    made.initialize()
    assert made.check_properties() == []
    made.run()
    return read_rows(output / "predictions.csv")


def test_bad_scans_are_all_named_before_any_is_predicted(trained, prepared, tmp_path):
    shutil.copytree(prepared / "images", tmp_path / "scans")
    for name in ("sub-0003_ses-M000.nii", "sub-0007_ses-M000.nii"):
        path = tmp_path / "scans" / name
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RuntimeError) as caught:
        inference(trained, str(tmp_path / "scans"), tmp_path / "out")
    message = str(caught.value.__cause__)
    assert "2 of 12 scans cannot be used" in message and "sub-0003" in message and "sub-0007" in message
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_results_in_the_folder_of_the_scans_are_refused(trained, prepared, tmp_path):
    shutil.copytree(prepared / "images", tmp_path / "scans")
    for output in (tmp_path / "scans", tmp_path / "scans" / "results"):
        with pytest.raises(RuntimeError) as caught:
            inference(trained, str(tmp_path / "scans"), output)
        assert "choose a folder outside of it" in str(caught.value.__cause__)


def test_without_a_threshold_nobody_is_called(trained, prepared, tmp_path, caplog):
    (tmp_path / "models").mkdir()
    shutil.copy(trained / "models" / "model.pt", tmp_path / "models")
    source = str(prepared / "images" / "sub-0001_ses-M000.nii")
    (row,) = inference(tmp_path, source, tmp_path / "a")
    assert row["prediction"] == "" and float(row["AD"]) >= 0 and "--threshold" in caplog.text
    (row,) = inference(tmp_path, source, tmp_path / "b", threshold=0.0)
    assert row["prediction"] == "AD"


def test_inference_gives_the_trainings_probabilities_for_folder_datalist_and_list(trained, prepared, tmp_path):
    expected = {row["subject_id"]: float(row["score"]) for row in read_rows(trained / "predictions.csv")}
    files = [str(path) for path in sorted((prepared / "images").glob("*.nii"))[:2]]
    for index, source in enumerate([str(prepared), str(prepared / "images"), files]):
        rows = inference(trained, source, tmp_path / str(index))
        assert list(rows[0]) == ["subject_id", "session", "file", "healthy", "AD", "prediction", "marks"]
        assert len(rows) == (2 if source is files else 12)
        found = {row["subject_id"]: row for row in rows}
        for name in set(found) & set(expected):
            assert float(found[name]["AD"]) == pytest.approx(expected[name], abs=2e-6)
            assert float(found[name]["AD"]) + float(found[name]["healthy"]) == pytest.approx(1, abs=2e-6)
    threshold = read_json(trained / "models" / "model.json")["threshold"]
    assert all((float(row["AD"]) >= threshold) == (row["prediction"] == "AD") for row in rows)
    for given, called in ((0.0, "AD"), (1.0, "healthy")):  # one that is given comes before the model's
        rows = inference(trained, str(prepared), tmp_path / str(given), threshold=given)
        assert {row["prediction"] for row in rows} == {called}


def test_a_raw_scan_is_prepared_on_the_way_and_a_prepared_one_is_taken_as_it_is(prepared, tmp_path):
    path = sorted((prepared / "images").glob("*.nii"))[0]
    image = nib.load(path)
    load = LoadScand("image", spacing=1.0, shape=[SIDE] * 3)
    as_is = load({"image": str(path)})["image"]
    np.testing.assert_array_equal(as_is[0].numpy(), image.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(as_is.affine.numpy(), image.affine)
    # A head in LPS at 2 mm, with intensities of a scanner.
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 24)] * 3, indexing="ij"))
    head = 900.0 * ((grid**2).sum(axis=0) < 0.3) * (1 + 0.2 * grid[1])
    nib.save(nib.Nifti1Image(head.astype(np.int16), np.diag([-2.0, -2.0, 2.0, 1.0])), tmp_path / "raw.nii.gz")
    raw = load({"image": str(tmp_path / "raw.nii.gz")})["image"]
    assert raw.shape == (1, SIDE, SIDE, SIDE)
    np.testing.assert_allclose(raw.affine[:3, :3].numpy(), np.eye(3), atol=1e-6)
    assert raw.min() >= 0 and raw.max() <= 1
    # The source is brighter towards its +y, which is the subject's back: towards the front it is darker.
    middle = int((raw[0] > 0.2).nonzero()[:, 1].float().mean())
    front, back = raw[0, :, middle + 2 :], raw[0, :, : middle - 2]
    assert front[front > 0.2].mean() < back[back > 0.2].mean()


def test_fold_all_scores_everybody_and_says_how_many(trained, prepared, encoder, tmp_path, capsys):
    everybody = load_datalist(prepared).items
    part = [item for item in everybody if item["fold"] == 0]
    for fold, items in (("all", everybody), (0, part)):
        folder = tmp_path / f"fold_{fold}"
        capsys.readouterr()
        evaluated(trained, prepared, encoder, folder, lambda _: None, fold=fold, allow_leak=True)
        people = len({item["patient_id"] for item in items})
        told = capsys.readouterr().out
        assert f"{len(items)} scans of {people} people" in told
        if fold == 0:
            counts = f"fold 0: {len(items)} of {len(everybody)} scans; --fold all scores everybody"
            assert told.rstrip().endswith(f"{counts}\n{folder / 'eval'}")
        names = {row["subject_id"] for row in read_rows(folder / "eval/predictions.csv")}
        assert names == {item["subject_id"] for item in items}
    assert len(part) < len(everybody)
