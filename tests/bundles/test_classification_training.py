# SPDX-License-Identifier: Apache-2.0
"""The classification bundles trained and resumed on small volumes; bad input."""

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
from typing import Any

import numpy as np
import pytest
import torch
from bundle_workflow import configs
from classification_bundle import SIZES, run, workflow
from csv_rows import read_rows
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.transforms import LoadImage
from prepared import ROOT
from segmentation_bundle import Broken
from sklearn.metrics import roc_auc_score

from volta_components.downstream.metrics import sensitivity_specificity, youden_threshold
from volta_components.errors import InputError, find_input_error
from volta_components.files import read_json
from volta_components.method.weights import load_encoder, save_encoder


def test_a_run_scores_the_fold_writes_everything_and_repeats_itself(prepared, encoder, tmp_path):
    first = run("ixi_sex", ("train",), prepared, encoder, tmp_path / "a", fold=1)
    items = {item["subject_id"]: item for item in read_json(prepared / "datalist.json")["training"]}
    rows = read_rows(tmp_path / "a" / "predictions.csv")
    assert {row["subject_id"] for row in rows} == {name for name, item in items.items() if item["fold"] == 1}
    assert all(int(row["label"]) == (items[row["subject_id"]]["sex"] == "F") for row in rows)
    labels = [int(row["label"]) for row in rows]
    scores = [float(row["score"]) for row in rows]
    assert first["metrics"]["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    called = [int(score >= 0.5) for score in scores]
    assert called == [int(row["prediction"]) for row in rows]
    assert first["metrics"]["threshold"] == 0.5 and rows[0]["optimistic_threshold"] == ""
    expected = sensitivity_specificity(labels, scores, 0.5)
    assert (first["metrics"]["sensitivity"], first["metrics"]["specificity"]) == expected
    assert [row["epoch"] for row in first["history"]] == [1, 2]
    assert set(first["history"][-1]) == {"epoch", "train_loss", "learning_rate"}  # nobody validates
    assert first["settings"]["num_folds"] == 3
    assert first["subjects"] == {"training": 8, "validation": 0, "scored": 4, "unused": 0}
    assert "loaded  encoder.summariser.cls_token" in (tmp_path / "a" / "pretrained.txt").read_text()

    model = tmp_path / "a" / "models" / "model.pt"
    record = read_json(model.with_suffix(".json"))
    assert record["classes"] == ["M", "F"] and record["provenance"]["volumes"] == 8
    assert record["network"]["config"]["hidden_size"] == 32

    second = run("ixi_sex", ("train",), prepared, encoder, tmp_path / "b", fold=1)
    assert second["history"] == first["history"]
    states = [torch.load(tmp_path / name / "models" / "model.pt", weights_only=True) for name in "ab"]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert (tmp_path / "a" / "predictions.csv").read_text() == (tmp_path / "b" / "predictions.csv").read_text()


def test_a_curve_on_the_scored_part_chooses_nothing(prepared, encoder, tmp_path):
    """Where nobody validates, a study may follow the scored part while it trains; the last model is the result."""
    plain = run("ixi_sex", ("train",), prepared, encoder, tmp_path / "a", fold=1)
    scored = {"validate#dataset#data": "$@parts.scored"}
    followed = run("ixi_sex", ("train",), prepared, encoder, tmp_path / "b", fold=1, **scored)
    assert followed["history"][-1]["val_auroc"] == pytest.approx(followed["metrics"]["auroc"])
    assert followed["metrics"] == plain["metrics"] and followed["subjects"] == plain["subjects"]
    records = [read_json(tmp_path / name / "models" / "model.json") for name in "ab"]
    assert records[0]["provenance"]["patient_ids"] == records[1]["provenance"]["patient_ids"]
    assert records[0]["sha256"] == records[1]["sha256"]


@pytest.mark.parametrize("last", [1, 2])
def test_a_gentle_training_resumes_from_frozen_and_from_trained_epochs(last, prepared, encoder, tmp_path):
    changes = {"epochs": 4, "frozen_epochs": 2 if last == 1 else 1, "unfrozen_blocks": 2, "layer_decay": 0.5}
    names = ("train", "gentle")
    run("ixi_sex", names, prepared, encoder, tmp_path / "whole", **changes)
    made = workflow("ixi_sex", names, prepared, encoder, tmp_path / "cut", **changes)
    made.initialize()
    trainer = made.parser.get_parsed_content("train#trainer")
    loaded = load_encoder(encoder).state_dict()

    def break_off(engine: Any) -> None:
        moved = [
            name
            for name, value in made.parser.get_parsed_content("plain_network").encoder.state_dict().items()
            if not torch.equal(value, loaded[name])
        ]
        assert bool(moved) == (engine.state.epoch > changes["frozen_epochs"])
        if engine.state.epoch > last:
            raise Broken

    trainer.add_event_handler(Events.ITERATION_COMPLETED, break_off)
    with pytest.raises(RuntimeError) as caught:
        made.run()
    assert isinstance(caught.value.__cause__, Broken)
    run("ixi_sex", names, prepared, encoder, tmp_path / "cut", **changes)
    files = [tmp_path / name / "models" / "model.pt" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_volume_is_loaded_once_whatever_the_epochs_and_workers(prepared, encoder, tmp_path, monkeypatch):
    inner = LoadImage.__call__

    def counted(self, filename, *args, **kwargs):
        with (tmp_path / "loads.txt").open("a") as stream:
            stream.write(f"{Path(filename).name}\n")
        return inner(self, filename, *args, **kwargs)

    monkeypatch.setattr(LoadImage, "__call__", counted)
    run("ixi_sex", ("train",), prepared, encoder, tmp_path / "run", epochs=3, num_workers=2)
    loads = Counter((tmp_path / "loads.txt").read_text().splitlines())
    assert loads == {path.name: 1 for path in (prepared / "images").iterdir()}


def test_all_inits_see_the_same_subjects_and_scratch_trains_whole(prepared, encoder, tmp_path):
    seen = {}
    for name in (None, "vit_scratch", "swin_scratch"):
        names = ("train",) if name is None else ("train", name)
        made = workflow("aibl_ad", names, prepared, encoder, tmp_path, fold=2, seed=5, fraction=0.75)
        parts = made.parser.get_parsed_content("parts")
        seen[name] = [
            [item["subject_id"] for item in part] for part in (parts.training, parts.validation, parts.scored)
        ]
        made.initialize()
        network = made.parser.get_parsed_content("network")
        frozen = [n for n, p in network.named_parameters() if not p.requires_grad and "norm_cross_attn" not in n]
        assert bool(frozen) == (name is None)
    assert seen[None] == seen["vit_scratch"] == seen["swin_scratch"]


def test_aibl_balances_classes_and_chooses_its_threshold_on_the_validation_part(prepared, encoder, tmp_path):
    # One AD case fewer, so that the weights are not 1.
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    content = read_json(data / "datalist.json")
    content["training"][2]["diagnosis"] = "MCI"
    (data / "datalist.json").write_text(json.dumps(content))
    made = workflow("aibl_ad", ("train",), data, encoder, tmp_path / "run", fold=1, validation_fraction=0.5)
    made.initialize()
    with pytest.warns(UserWarning, match="was changed"):
        parts = made.parser.get_parsed_content("parts")
    counts = np.bincount([item["label"] for item in parts.training])
    np.testing.assert_allclose(made.parser.get_parsed_content("loss").weight, counts.sum() / (2 * counts), rtol=1e-6)
    made.run()
    result = read_json(tmp_path / "run" / "result.json")
    table = made.parser.get_parsed_content("results").validation_scores
    assert result["metrics"]["threshold"] == youden_threshold(table.labels, table.scores)
    rows = read_rows(tmp_path / "run" / "predictions.csv")
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    best = youden_threshold(labels, scores)
    assert result["metrics"]["optimistic_threshold"] == best == float(rows[0]["optimistic_threshold"])
    pair = sensitivity_specificity(labels, scores, best)
    assert (result["metrics"]["optimistic_sensitivity"], result["metrics"]["optimistic_specificity"]) == pair
    labelled = made.parser.get_parsed_content("labelled")
    assert labelled.left_out == [("sub-0002_ses-M000", "diagnosis is MCI")]


def test_mlflow_holds_what_the_report_reads(prepared, encoder, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlruns.db"
    made = ConfigWorkflow(
        config_file=configs("ixi_sex", "train", "vit_scratch"),
        meta_file=configs("ixi_sex", "metadata")[0],
        logging_file=False,
        workflow_type="train",
        tracking="mlflow",
        tracking_uri=uri,
        **{
            **SIZES,
            "bundle_root": str(ROOT / "bundles" / "ixi_sex"),
            "dataset_dir": str(prepared),
            "output_dir": f"${str(tmp_path / 'run')!r}",
        },
    )
    for _ in range(2):  # the second time, nothing is done again and no second run counts
        made.initialize()
        made.run()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("volta3d_ixi_sex")
    runs = client.search_runs([experiment.experiment_id], "tags.finished = 'true'")
    assert [item.info.run_name for item in runs] == ["vit_scratch_fold0_frac1_seed0"]
    data = runs[0].data
    expected = {"bundle": "ixi_sex", "init": "vit_scratch", "fold": "0", "fraction": "1", "seed": "0", "leak": "none"}
    assert {key: data.tags[key] for key in expected} == expected
    assert data.tags["phantom"] == "false" and data.tags["datalist_name"] == "fake"
    assert data.tags["encoder_sha256"] == "" and data.tags["code_version"]
    assert set(data.metrics) >= {
        *("score/auroc", "score/sensitivity", "score/specificity"),
        *("score/threshold", "train/loss", "train/learning_rate"),
    }
    assert 0 < data.metrics["cost/hours"] < 1 and data.metrics["cost/peak_memory_gib"] > 0.1
    parts = {given.tags[0].value: json.loads(given.dataset.profile) for given in runs[0].inputs.dataset_inputs}
    assert set(parts) == {"training", "scored"} and parts["scored"]["scans"] > 0
    assert not [name for name in data.metrics if name.startswith("val/")]
    pictures = {item.path for item in client.list_artifacts(runs[0].info.run_id, "pictures")}
    assert pictures == {"pictures/scored.png"}
    assert data.params["epochs"] == "2" and data.params["learning_rate"] == "0.01"
    run_id = runs[0].info.run_id
    history = client.get_metric_history(run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2]
    path = client.download_artifacts(run_id, "predictions/predictions.csv", str(tmp_path))
    assert set(read_rows(Path(path))[0]) == {
        *("subject_id", "patient_id", "session", "site", "sex", "age"),
        *("label", "score", "prediction", "threshold", "optimistic_threshold"),
    }


def command(bundle: str, names: tuple[str, ...], **settings: Any) -> list[str]:
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    files = str(configs(bundle, *names))
    return [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *options]


# A command takes no ids that only an overlay has which it does not name.
OWN_SIZES = {name: value for name, value in SIZES.items() if not name.startswith("swin_")}


def process_settings(prepared: Path, encoder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {**OWN_SIZES, "dataset_dir": prepared, "encoder_path": encoder, "output_dir": output, **changes}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(prepared, encoder, tmp_path):
    whole = run("ixi_sex", ("train",), prepared, encoder, tmp_path / "whole", epochs=12)
    words = command("ixi_sex", ("train",), **process_settings(prepared, encoder, tmp_path / "cut", epochs=12))
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        checkpoint = tmp_path / "cut" / "checkpoint.pt"
        deadline = time.monotonic() + 300
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert checkpoint.exists() and not (tmp_path / "cut" / "result.json").exists(), (tmp_path / "log.txt").read_text()
    done = torch.load(checkpoint, weights_only=True)["engine"]["iteration"] // 2
    assert 1 <= done < 12
    resumed = run("ixi_sex", ("train",), prepared, encoder, tmp_path / "cut", OWN_SIZES, epochs=12)
    assert resumed["history"] == whole["history"]
    assert resumed["metrics"] == whole["metrics"]
    assert not checkpoint.exists()


@pytest.mark.slow
def test_two_processes_train_and_score_every_subject_once(prepared, encoder, tmp_path):
    words = command(
        "aibl_ad",
        ("train", "multi_gpu_train"),
        **process_settings(prepared, encoder, tmp_path / "run", batch_size=2, validation_fraction=0.5),
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launcher, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = read_json(tmp_path / "run" / "result.json")
    rows = read_rows(tmp_path / "run" / "predictions.csv")
    assert len({row["subject_id"] for row in rows}) == len(rows) == 4
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert result["metrics"]["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert result["settings"]["processes"] == 2
    # One process with batches of four sees the same samples; the classes' weights are 1.
    alone = run("aibl_ad", ("train",), prepared, encoder, tmp_path / "alone", batch_size=4, validation_fraction=0.5)
    losses, expected = ([row["train_loss"] for row in record["history"]] for record in (result, alone))
    assert losses == pytest.approx(expected, rel=1e-4)


def test_more_processes_than_scans_of_a_part_end_before_training(prepared, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("volta_components.distributed.process_count", lambda: 3)
    made = workflow("aibl_ad", ("train",), prepared, encoder, tmp_path / "run")
    with pytest.raises(RuntimeError) as caught:
        made.parser.get_parsed_content("checks")
    assert "@checks" in made.parser["run"]
    assert "3 processes cannot share" in str(caught.value.__cause__)
    assert "inner validation  2 scans" in str(caught.value.__cause__)
    assert not (tmp_path / "run").exists()


def changed(prepared: Path, folder: Path, change: Any) -> Path:
    """A copy of the data set whose items are changed by ``change(item)``."""
    shutil.copytree(prepared, folder)
    content = read_json(folder / "datalist.json")
    for item in content["training"]:
        change(item)
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


def cause_of(bundle: str, data: Path, encoder: Path, output: Path, *names: str, **changes: Any) -> str:
    """The message of the input error that a run ends with, before anything is trained."""
    with pytest.raises((RuntimeError, InputError)) as caught:
        run(bundle, ("train", *names), data, encoder, output, **changes)
    error = find_input_error(caught.value)
    assert error is not None, caught.value
    assert not (output / "checkpoint.pt").exists()
    return str(error)


@pytest.mark.filterwarnings("ignore:.*was changed since")
def test_a_datalist_without_the_label_is_an_error(prepared, encoder, tmp_path):
    data = changed(prepared, tmp_path / "data", lambda item: item.pop("sex"))
    message = cause_of("ixi_sex", data, encoder, tmp_path / "run")
    assert "no scan with sex M or F among 12 items" in message and "sub-0000" in message
    assert "participants.tsv" in message


@pytest.mark.filterwarnings("ignore:.*was changed since")
def test_a_class_missing_from_the_fold_is_an_error(prepared, encoder, tmp_path):
    def healthy(item: dict[str, Any]) -> None:
        if item["fold"] == 1:
            item["diagnosis"] = "CN"

    data = changed(prepared, tmp_path / "data", healthy)
    message = cause_of("aibl_ad", data, encoder, tmp_path / "run", fold=1)
    assert "scored fold has no scan labelled AD" in message and "sub-0004" in message and "--folds" in message
    message = cause_of("aibl_ad", data, encoder, tmp_path / "run", fold=3)
    assert "fold 3 cannot be scored" in message


def test_a_fraction_that_is_too_small_is_an_error(prepared, encoder, tmp_path):
    message = cause_of("ixi_sex", prepared, encoder, tmp_path / "run", fraction=0.1)
    assert "fraction 0.1 is too small" in message and "8 scans" in message
    message = cause_of("aibl_ad", prepared, encoder, tmp_path / "run", fraction=0.5)
    assert "no scan labelled healthy, AD for inner validation" in message


def test_pretraining_on_scored_patients_is_an_error_unless_allowed_and_then_tagged(prepared, tmp_path, encoder):
    from volta_components.training.people import patient_key

    path = tmp_path / "leaky.safetensors"
    save_encoder(path, load_encoder(encoder), {"datalist_hash": "1", "patient_ids": [patient_key("sub-0001")]})
    message = cause_of("ixi_sex", prepared, path, tmp_path / "run")
    assert "1 of the 4 scored patients" in message and "sub-0001" in message and "--allow_leak" in message
    result = run("ixi_sex", ("train",), prepared, path, tmp_path / "run", allow_leak=True, epochs=1)
    assert result["tags"]["leak"] == "allowed"


def test_data_or_encoder_that_is_not_there_says_what_to_run_first(tmp_path, prepared):
    # Without a flag, from an empty place: the bundle's own folder elsewhere, as after a download.
    for part in ("configs", "docs"):
        shutil.copytree(ROOT / "bundles" / "ixi_sex" / part, tmp_path / "ixi_sex" / part)
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.json"]
    done = subprocess.run(words, cwd=tmp_path / "ixi_sex", capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "error: data/ixi/datalist.json: no such datalist" in done.stderr
    assert "volta3d prepare --layout" in done.stderr and "Traceback" not in done.stderr
    message = cause_of("ixi_sex", prepared, tmp_path / "none.safetensors", tmp_path / "run")
    assert "bundles/pretrain/configs/train.json" in message
