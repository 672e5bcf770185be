# SPDX-License-Identifier: Apache-2.0
"""The hippocampus bundle trained, resumed and scored on small volumes; bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from csv_rows import read_rows
from ignite.engine import Events
from labelled_scans import SIDE, centred_affine, head, make_labelled, write_scan
from mlflow import MlflowClient
from prepared import ROOT
from segmentation_bundle import SIZES, Broken, input_error, run, workflow

from benchmarks.study.plan import OWN_IDS
from volta_components.data.datalist import load_datalist, make_content
from volta_components.data.load import LoadScand
from volta_components.downstream.networks import VoltaUNETR
from volta_components.files import read_json, sha256_file, write_json
from volta_components.training.people import patient_key
from volta_components.training.tracking import group_metrics


def test_scores_are_those_of_the_masks_that_were_written(finished: Path, labelled: Path) -> None:
    rows = read_rows(finished / "predictions" / "scores.csv")
    items = load_datalist(labelled).split(0)[1]
    assert [row["subject_id"] for row in rows] == [item["subject_id"] for item in items]
    dices = []
    for row, item in zip(rows, items, strict=True):
        mask = nib.load(finished / "predictions" / "masks" / f"{row['subject_id']}_{row['session']}.nii.gz")
        truth = nib.load(item["label"])
        assert np.allclose(mask.affine, truth.affine) and mask.get_data_dtype() == np.uint8
        a, b = np.asarray(mask.dataobj), np.asarray(truth.dataobj)
        for side, value in (("left", 1), ("right", 2)):
            expected = 2 * ((a == value) & (b == value)).sum() / ((a == value).sum() + (b == value).sum())
            assert float(row[f"dice_{side}"]) == pytest.approx(expected, abs=1e-6)
            assert float(row[f"volume_{side}_mm3"]) == (a == value).sum()
            assert (row[f"hd95_{side}"] == "") == (not (a == value).any())
        assert float(row["failures"]) == sum(not (a == value).any() for value in (1, 2))
        assert row["sex"] == item["sex"] and float(row["age"]) == item["age"]
        dices.append(float(row["dice"]))
    metrics = read_json(finished / "result.json")["metrics"]
    assert metrics["mean_dice"] == pytest.approx(np.mean(dices))
    assert metrics["hd95_failures"] == sum(float(row["failures"]) for row in rows)


def test_the_epoch_is_chosen_by_inner_validation_and_the_optimistic_one_is_named(finished: Path) -> None:
    result = read_json(finished / "result.json")
    metrics, history = result["metrics"], result["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    values = [row["val_mean_dice"] for row in history]
    assert result["epoch_from"] == "inner validation"
    assert metrics["epoch"] == result["epoch"] == 1 + int(np.argmax(values))
    assert metrics["optimistic_mean_dice"] >= metrics["mean_dice"]
    assert {"dice_left", "dice_right", "hd95_with_penalty", "optimistic_hd95_failures"} <= metrics.keys()
    assert result["hd95_penalty_mm"] == pytest.approx(math.sqrt(3) * SIDE)
    assert result["subjects"] == {"training": 6, "validation": 2, "scored": 2, "unused": 0}
    assert not list(finished.glob("*.pt"))


def test_every_scan_is_loaded_once_whatever_the_epochs_and_workers(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = LoadScand._load

    def counted(self: LoadScand, path: Path, label_path: Path | None) -> Any:
        with (tmp_path / "loads.txt").open("a") as stream:
            stream.write(f"{path.name}\n")
        return inner(self, path, label_path)

    monkeypatch.setattr(LoadScand, "_load", counted)
    run(("train", "unet_scratch"), labelled, tmp_path / "run", epochs=2, num_workers=2)
    loads = Counter((tmp_path / "loads.txt").read_text().splitlines())
    assert loads == {path.name: 1 for path in (labelled / "images").iterdir()}


@pytest.mark.parametrize("amp", [False, True])
def test_it_learns(amp: bool, labelled: Path, tmp_path: Path) -> None:
    """Bright ellipsoids, told apart by the side they are on; on a CPU, in bfloat16 as well."""
    run(
        ("train", "unet_scratch"),
        labelled,
        tmp_path / "run",
        epochs=30,
        val_interval=15,
        image_size=[32, 16, 16],
        learning_rate=0.02,
        foreground_share=0.9,
        amp=amp,
    )
    metrics = read_json(tmp_path / "run" / "result.json")["metrics"]
    assert metrics["mean_dice"] > 0.7 and metrics["hd95_failures"] == 0
    assert metrics["hd95"] < metrics["hd95_with_penalty"] + 1e-6


def test_mlflow_has_all_that_the_report_needs(finished: Path, labelled: Path) -> None:
    client = MlflowClient(f"sqlite:///{finished.parent}/mlruns.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "volta3d_harp_hippocampus"]
    (record,) = client.search_runs([experiment.experiment_id])
    tags = record.data.tags
    expected = {"bundle": "harp_hippocampus", "init": "volta", "fold": "0", "fraction": "1", "finished": "true"}
    assert {key: tags[key] for key in expected} == expected
    assert tags["leak"] == "none" and tags["phantom"] == "false" and len(tags["encoder_sha256"]) == 64
    metrics = read_json(finished / "result.json")["metrics"]
    assert "mean_dice_low" not in metrics  # of so few people
    logged = group_metrics(metrics, "score/")
    assert {key: record.data.metrics[key] for key in logged} == pytest.approx(logged)
    assert [item.path for item in client.list_artifacts(record.info.run_id, "pictures")] == ["pictures/scored.png"]
    assert record.data.params["learning_rate"] == "0.01"
    for name in ("train/loss", "val/loss", "val/mean_dice", "optimistic/epoch_mean_dice"):
        assert [item.step for item in client.get_metric_history(record.info.run_id, name)] == [1, 2, 3]
    names = {item.path for item in client.list_artifacts(record.info.run_id, "predictions")}
    assert names == {f"predictions/{name}" for name in ("scores.csv", "paths.csv", "masks", "images", "labels")}
    listed = read_rows(finished / "predictions" / "paths.csv")
    # Outside of the working folder only the ends of paths are passed on.
    assert listed[0]["image"] == "images/sub-0000_ses-M000.nii" and listed[0]["label"].startswith("labels/")
    picture = nib.load(finished / "predictions" / "images" / "sub-0000_ses-M000.nii.gz")
    difference = np.asarray(picture.dataobj) - np.asarray(nib.load(labelled / listed[0]["image"]).dataobj)
    assert np.abs(difference).max() < 0.5 / 255 + 1e-6


def test_nobodys_folders_are_in_the_store_or_the_results(finished: Path, labelled: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{finished.parent}/mlruns.db"
    client = MlflowClient(store)
    for experiment in client.search_experiments():
        for record in client.search_runs([experiment.experiment_id]):
            said = json.dumps([record.data.params, record.data.tags])
            assert str(labelled.parent) not in said and str(finished.parent) not in said
            folder = Path(client.download_artifacts(record.info.run_id, "", str(tmp_path)))
            texts = [path for path in folder.rglob("*") if path.suffix in (".csv", ".json", ".txt", ".html", ".md")]
            assert texts
            for path in texts:
                text = path.read_text()
                assert str(labelled.parent) not in text and str(finished.parent) not in text, path


def test_the_model_is_plain_weights_and_tells_whom_it_was_trained_on(finished: Path, labelled: Path) -> None:
    state = torch.load(finished / "models" / "model.pt", weights_only=True)
    record = read_json(finished / "models" / "model.json")
    network = VoltaUNETR(**record["network"]["config"])
    network.load_state_dict(state)
    trained = {patient_key(item["patient_id"], "fake") for item in load_datalist(labelled).items if item["fold"] != 0}
    assert set(record["provenance"]["patient_ids"]) == trained
    assert record["pretraining"]["patient_ids"] == [] and len(record["pretraining"]["encoder_sha256"]) == 64
    assert "vit." in (finished / "pretrained.txt").read_text()


@pytest.mark.parametrize(("minutes", "last"), [(0, 2), (10, 1)])
def test_a_broken_run_goes_on_to_the_same_weights_and_is_not_done_again(
    minutes: int,
    last: int,
    finished: Path,
    labelled: Path,
    small_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken in the third epoch, with a checkpoint of the second or, as the second took five minutes, of the first."""
    output = tmp_path / "run"
    changes: dict[str, Any] = {
        "encoder_path": str(small_encoder),
        "run_name": "volta_fold0_frac1_seed0",
        "checkpoint_minutes": minutes,
    }
    made = workflow(("train",), labelled, output, **changes)
    made.initialize()
    trainer = made.parser.get_parsed_content("train#trainer")
    clock = SimpleNamespace(monotonic=lambda: 60 * (0, 11, 16, 21)[trainer.state.epoch])
    monkeypatch.setattr("volta_components.training.checkpoint.time", clock)

    def break_off(engine: Any) -> None:
        if engine.state.epoch == 3:
            raise Broken

    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), break_off)
    with pytest.raises(RuntimeError) as caught:
        made.run()
    assert isinstance(caught.value.__cause__, Broken)
    assert not (output / "result.json").exists()
    progress = torch.load(output / "checkpoint.pt", weights_only=True)["engine"]
    assert progress["iteration"] == last * progress["epoch_length"]

    run(("train",), labelled, output, **changes)
    ours, theirs = (read_json(folder / "result.json") for folder in (output, finished))
    assert ours["metrics"] == theirs["metrics"] and ours["history"] == theirs["history"]
    states = [torch.load(folder / "models" / "model.pt", weights_only=True) for folder in (output, finished)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    for name in ("scores.csv", "masks/sub-0000_ses-M000.nii.gz"):
        assert (output / "predictions" / name).read_bytes() == (finished / "predictions" / name).read_bytes()

    model = output / "models" / "model.pt"
    before = model.stat().st_mtime_ns
    run(("train",), labelled, output, **changes)
    assert model.stat().st_mtime_ns == before
    with input_error("other settings", "learning_rate"):
        run(("train",), labelled, output, **changes, learning_rate=0.02)


def test_a_trained_model_is_scored_again(
    finished: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volta_components.downstream.metrics.FEWEST", 2)
    changes: dict[str, Any] = {"model_path": str(finished / "models" / "model.pt"), "encoder_path": "/nowhere"}
    run(("train", "evaluate"), labelled, tmp_path / "eval", **changes)
    content, result = read_json(tmp_path / "eval" / "metrics.json"), read_json(finished / "result.json")
    metrics = content["metrics"]
    assert "mean_dice_low" in metrics
    for name in ("mean_dice", "hd95"):
        if f"{name}_low" in metrics:  # one patient alone has none
            assert metrics.pop(f"{name}_low") <= metrics[name] <= metrics.pop(f"{name}_high")
    assert {name: result["metrics"][name] for name in metrics} == metrics
    assert (content["leak"], content["scored"]) == ("none", 2)
    assert content["model_sha256"] == sha256_file(finished / "models" / "model.pt")
    data = load_datalist(labelled)
    assert (content["datalist_name"], content["datalist_hash"]) == (data.name, data.hash)
    made = workflow(("train", "evaluate"), labelled, tmp_path / "eval", **changes, fold="all")
    assert made.parser.get_parsed_content("run_name") == f"volta_foldall_{data.name}_{content['model_sha256'][:8]}"
    assert "Dice" in capsys.readouterr().out
    with input_error("trained or pretrained on 2 of the 2 scored patients", "sub-0001"):
        run(("train", "evaluate"), labelled, tmp_path / "other", fold=1, **changes)

    model = tmp_path / "model.pt"
    shutil.copy(finished / "models" / "model.pt", model)
    changes["model_path"] = str(model)
    with input_error("does not say on which subjects it was trained and pretrained"):
        run(("train", "evaluate"), labelled, tmp_path / "bare", **changes)
    record = read_json(finished / "models" / "model.json")
    record["pretraining"]["patient_ids"] = [patient_key("sub-0005", "fake")]
    write_json(model.with_suffix(".json"), record)
    with input_error("1 of the 2 scored patients", "sub-0005  pretrained on"):
        run(("train", "evaluate"), labelled, tmp_path / "leaky", **changes)
    run(("train", "evaluate"), labelled, tmp_path / "leaky", **changes, allow_leak=True)
    assert read_json(tmp_path / "leaky" / "metrics.json")["leak"] == "allowed"


def test_of_many_scans_every_label_map_and_three_images_reach_mlflow(tmp_path: Path) -> None:
    """As many as HarP's hold-out has; from MLflow alone, worst, median and best can be shown and all be scored."""
    data = make_labelled(tmp_path / "data", count=31, folds=2)
    content = read_json(data / "datalist.json")
    items = [{**item, "fold": int(number >= 27)} for number, item in enumerate(content["training"])]
    write_json(data / "datalist.json", make_content("fake", [1.0] * 3, [SIDE] * 3, 0, 2, items, []))
    store = f"sqlite:///{tmp_path}/mlruns.db"
    run(
        ("train", "unet_scratch"),
        data,
        tmp_path / "run",
        epochs=1,
        validation_fraction=0.0,
        val_interval=10,
        tracking="mlflow",
        tracking_uri=store,
    )
    client = MlflowClient(store)
    (record,) = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.finished = 'true'")

    assert record.data.params["num_folds"] == "2"

    def names(folder: str) -> set[str]:
        found = client.list_artifacts(record.info.run_id, f"predictions/{folder}")
        return {Path(item.path).name.removesuffix(".nii.gz") for item in found}

    everybody = {f"sub-{number:04d}_ses-M000" for number in range(27)}
    assert names("masks") == names("labels") == everybody
    rows = read_rows(tmp_path / "run" / "predictions" / "scores.csv")
    order = sorted(rows, key=lambda row: float(row["dice"]))
    shown = {f"{order[place]['subject_id']}_{order[place]['session']}" for place in (0, 13, 26)}
    assert len({float(row["dice"]) for row in rows}) < 27 or names("images") == shown
    assert len(names("images")) == 3
    label = nib.load(client.download_artifacts(record.info.run_id, f"predictions/labels/{sorted(shown)[0]}.nii.gz"))
    assert set(np.unique(np.asarray(label.dataobj))) == {0, 1, 2}


def test_a_study_follows_the_scored_part_and_takes_the_last_epoch(labelled: Path, tmp_path: Path) -> None:
    run(("train", "unet_scratch"), labelled, tmp_path / "run", **OWN_IDS["harp_hippocampus"])
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["epoch"], result["epoch_from"]) == (3, "last")
    assert result["history"][-1]["val_mean_dice"] == pytest.approx(result["metrics"]["mean_dice"], abs=1e-6)
    assert result["subjects"]["validation"] == 0 and not [name for name in result["metrics"] if "optimistic" in name]
    record = read_json(tmp_path / "run" / "models" / "model_unet_scratch.json")
    assert record["provenance"]["volumes"] == result["subjects"]["training"]  # and nobody who is scored


def test_an_annotation_server_gives_its_own_scans(tmp_path: Path) -> None:
    """MONAI Label changes these ids and no others; raw scans, no datalist, no encoder."""
    items = []
    for number in range(3):
        affine = centred_affine((36, 40, 34))
        item = write_scan(tmp_path / "studies", f"scan{number}", *head((36, 40, 34), affine, number), affine)
        items.append({key: item[key] for key in ("image", "label")})
    made = workflow(
        ("train",),
        tmp_path / "nothing",
        tmp_path / "run",
        **{
            "train#dataset#data": items[:2],
            "validate#dataset#data": items[2:],
            "train#trainer#max_epochs": 1,
            "device": "cpu",
        },
    )
    made.parser["device"] = "$torch.device('cpu')"
    for _ in range(2):  # a second time, it trains again
        made.parser.parse(reset=True)
        made.initialize()
        made.run()
        model = tmp_path / "run" / "models" / "model.pt"
        VoltaUNETR(**read_json(model.with_suffix(".json"))["network"]["config"]).load_state_dict(
            torch.load(model, weights_only=True)
        )
        assert read_json(model.with_suffix(".json"))["epoch_from"] == "inner validation"
        model.unlink()
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_bad_input_ends_a_run_before_training(labelled: Path, small_encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(labelled, data)
    scratch = ("train", "unetr_scratch")

    label = data / "labels" / "sub-0003_ses-M000.nii"
    good = label.read_bytes()
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.array([0, 2, 1], np.uint8)[np.asarray(image.dataobj)], image.affine), label)
    with input_error("sub-0003", "lies right of label 2"):
        run(scratch, data, tmp_path / "run")
    label.write_bytes(good)

    content = read_json(data / "datalist.json")
    del content["training"][6]["label"]
    write_json(data / "datalist.json", make_content("fake", [1.0] * 3, [SIDE] * 3, 0, 5, content["training"], []))
    with input_error("1 of 10 items have no label map", "sub-0006"):
        run(scratch, data, tmp_path / "run")

    with input_error("volta3d prepare"):
        run(scratch, tmp_path / "nothing", tmp_path / "run")
    with input_error("no such encoder"):
        run(("train",), labelled, tmp_path / "run", encoder_path=str(tmp_path / "no.safetensors"))
    with input_error("nobody to train on"):
        run(scratch, labelled, tmp_path / "run", fraction=0.01)

    leaky = tmp_path / "encoder.safetensors"
    shutil.copy(small_encoder, leaky)
    record = read_json(small_encoder.with_suffix(".json"))
    record["provenance"]["patient_ids"] = [patient_key("sub-0005", "fake")]
    write_json(leaky.with_suffix(".json"), record)
    with input_error("pretrained on 1 of the 2 scored patients", "sub-0005"):
        run(("train",), labelled, tmp_path / "run", encoder_path=str(leaky))
    assert not (tmp_path / "run").exists()


def test_more_processes_than_scans_of_a_part_end_before_training(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volta_components.distributed.process_count", lambda: 3)
    made = workflow(("train", "unetr_scratch"), labelled, tmp_path / "run")
    with input_error("3 processes cannot share", "inner validation  2 scans", "scored            2 scans"):
        made.parser.get_parsed_content("checks")
    assert "@checks" in made.parser["run"]
    # Without a datalist, the validation scans are those that an annotation server gives.
    own = {"train#dataset#data": [{"image": "a", "label": "a"}] * 3, "validate#dataset#data": [{"image": "b"}]}
    made = workflow(("train", "unetr_scratch"), tmp_path / "none", tmp_path / "run", **own)
    with input_error("inner validation  1 scans"):
        made.parser.get_parsed_content("checks")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_and_score_together(labelled: Path, tmp_path: Path) -> None:
    """The command line, as a user types it, from the repository root."""
    changes = {**SIZES, "epochs": 1, "dataset_dir": str(labelled), "output_dir": str(tmp_path / "run")}
    words = [f"--{key}={value}" for key, value in changes.items() if not key.startswith("unet_")]
    files = [f"bundles/harp_hippocampus/configs/{n}.json" for n in ("train", "unetr_scratch", "multi_gpu_train")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "monai.bundle", "run", "--config_file", str(files), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = read_json(tmp_path / "run" / "result.json")
    assert result["settings"]["processes"] == 2
    rows = read_rows(tmp_path / "run" / "predictions" / "scores.csv")
    assert [row["subject_id"] for row in rows] == ["sub-0000", "sub-0005"]
    assert len(list((tmp_path / "run" / "predictions" / "masks").iterdir())) == 2
    assert result["metrics"]["mean_dice"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]))
