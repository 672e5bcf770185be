# SPDX-License-Identifier: Apache-2.0
"""The classification bundles: every config instantiated, real runs on small volumes, bad input."""

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

import nibabel as nib
import numpy as np
import pytest
import torch
from csv_rows import read_rows
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata
from monai.transforms import LoadImage
from prepared import ROOT
from sklearn.metrics import roc_auc_score
from torch.nn.parallel import DistributedDataParallel

from volta_components.data.datalist import load_datalist
from volta_components.data.load import LoadScand
from volta_components.downstream.metrics import sensitivity_specificity, youden_threshold
from volta_components.downstream.networks import SwinClassifier, VoltaClassifier
from volta_components.errors import InputError
from volta_components.files import read_json
from volta_components.method.weights import save_encoder

BUNDLES = ("ixi_sex", "aibl_ad")
SIDE = 32
# Sizes at which a run takes a second or two.
SIZES: dict[str, Any] = {
    "volume_size": [SIDE] * 3,
    "input_extent_mm": [SIDE] * 3,
    "image_size": [SIDE] * 3,
    "hidden_size": 32,
    "mlp_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "summary_heads": 4,
    "swin_embed_dim": 12,
    "swin_window_size": [2] * 3,
    "swin_depths": [1] * 4,
    "num_workers": 0,
    "unfrozen_blocks": 1,
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 4,
    "learning_rate": 0.01,
    "checkpoint_minutes": 0,
}
INFERENCE_ONLY = {key: SIZES[key] for key in list(SIZES)[:8]}


def configs(bundle: str, *names: str) -> list[str]:
    return [str(ROOT / "bundles" / bundle / "configs" / f"{name}.json") for name in names]


def workflow(
    bundle: str,
    names: tuple[str, ...],
    data: Path,
    encoder: Path,
    output: Path,
    sizes: dict[str, Any] | None = None,
    **changes: Any,
) -> ConfigWorkflow:
    """A bundle's workflow on the small data set, as ``monai.bundle run`` makes it."""
    settings = {
        **(SIZES if sizes is None else sizes),
        "bundle_root": str(ROOT / "bundles" / bundle),
        "dataset_dir": str(data),
        "encoder_path": str(encoder),
        "output_dir": f"${str(output)!r}",
        **changes,
    }
    made = ConfigWorkflow(
        config_file=configs(bundle, *names),
        meta_file=configs(bundle, "metadata")[0],
        logging_file=False,
        workflow_type="train",
        **settings,
    )
    made.parser["train"]["handlers"] = [
        handler for handler in made.parser["train"]["handlers"] if "ProgressBar" not in str(handler)
    ]
    return made


def run(*args: Any, **changes: Any) -> dict[str, Any]:
    """Run a workflow to its end; its ``result.json``."""
    made = workflow(*args, **changes)
    made.initialize()
    made.run()
    made.finalize()
    return read_json(args[4] / "result.json")


# --- configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_is_valid(bundle, schema, tmp_path):
    copy = tmp_path / "schema.json"
    shutil.copy(schema, copy)
    verify_metadata(meta_file=configs(bundle, "metadata")[0], filepath=str(copy))


def overlays(bundle: str) -> list[str]:
    """Every overlay of train.json: whatever lies in the folder."""
    names = {path.stem for path in (ROOT / "bundles" / bundle / "configs").glob("*.json")}
    return sorted(names - {"train", "inference", "metadata", "tiny"})


def built(made: ConfigWorkflow) -> Any:
    """Initialise a workflow, in this process alone; its network, without a distributed wrapper."""
    parser = made.parser
    parser["initialize"] = [line for line in parser["initialize"] if "join_processes" not in line]
    made.initialize()
    assert made.check_properties() == []
    network = parser.get_parsed_content("plain_network")
    evaluators = ["results#scoring", "validate#evaluator"]
    # A wrapper would send buffers from process to process at every forward, and their shares differ in length.
    assert all(parser.get_parsed_content(name).network is network for name in evaluators)
    assert parser.get_parsed_content("results").network is network
    return network


@pytest.mark.parametrize(
    ("bundle", "overlay"), [(bundle, overlay) for bundle in BUNDLES for overlay in (None, *overlays(bundle))]
)
def test_every_overlay_is_instantiated_alone(bundle, overlay, prepared, encoder, tmp_path, one_process):
    names = ("train",) if overlay is None else ("train", overlay)
    changes = {name: value for name, value in SIZES.items() if name != "unfrozen_blocks"}
    if overlay != "swin_scratch":
        changes = {name: value for name, value in changes.items() if not name.startswith("swin_")}
    made = workflow(bundle, names, prepared, encoder, tmp_path, sizes=changes)
    network = built(made)
    if overlay == "evaluate":
        assert made.parser.get_parsed_content("results").parts.training == []
        return
    assert type(network) is (SwinClassifier if overlay == "swin_scratch" else VoltaClassifier)
    wrapped = isinstance(made.parser.get_parsed_content("network"), DistributedDataParallel)
    assert wrapped == (overlay == "multi_gpu_train")
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    trainer = made.parser.get_parsed_content("train#trainer")
    assert sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]) == trained
    if overlay == "frozen":
        assert trained == 32 * 2 + 2
    elif overlay != "swin_scratch":
        # Of the two blocks the second one trains, unless the overlay says otherwise.
        moving = [block.attn.qkv.weight.requires_grad for block in network.encoder.blocks]
        assert moving == [overlay in ("full", "vit_scratch"), True]
        assert network.encoder.patch_embedding.position_embeddings.requires_grad == moving[0]


@pytest.mark.parametrize(
    ("bundle", "overlay"), [(bundle, overlay) for bundle in BUNDLES for overlay in (None, *overlays(bundle))]
)
def test_every_overlay_is_instantiated_with_the_quick_starts(
    bundle, overlay, tiny_data, tiny_encoder, tmp_path, one_process
):
    """At the quick start's own sizes, on volumes of 3 mm: only paths are changed."""
    names = ("train",) if overlay is None else ("train", overlay)
    made = workflow(bundle, (*names, "tiny"), tiny_data, tiny_encoder, tmp_path, sizes={})
    network = built(made)
    tiny = read_json(configs(bundle, "tiny")[0])
    if overlay == "evaluate":
        return
    settings = made.parser.get_parsed_content("settings")
    sizes = ("hidden_size", "mlp_dim", "num_layers", "num_heads", "image_size", "epochs")
    own = [f"swin_{name}" for name in ("embed_dim", "window_size", "patch_size", "depths")]
    for name in (*sizes, *(own if overlay == "swin_scratch" else [])):
        assert settings[name] == tiny[name]
    trainer = made.parser.get_parsed_content("train#trainer")
    assert trainer.state.max_epochs == tiny["epochs"]
    image = next(iter(made.parser.get_parsed_content("train#dataloader")))["image"]
    assert image.shape == (tiny["batch_size"], 1, *tiny["image_size"])
    with torch.no_grad():
        assert network.eval()(image).shape == (tiny["batch_size"], 2)


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("overlay", [None, "vit_scratch", "swin_scratch"])
def test_the_quick_start_serves_inference_too(bundle, overlay, tiny_data, tmp_path):
    made = ConfigWorkflow(
        config_file=configs(bundle, "inference", *([overlay] if overlay else []), "tiny"),
        meta_file=configs(bundle, "metadata")[0],
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(ROOT / "bundles" / bundle),
        source=str(tiny_data),
        output_dir=str(tmp_path),
    )
    made.initialize()
    image = made.parser.get_parsed_content("dataset")[0]["image"]
    network = made.parser.get_parsed_content("network")
    if overlay != "swin_scratch":
        assert tuple(image.shape[1:]) == tuple(network.encoder.config["img_size"])
    with torch.no_grad():
        assert network.eval()(image[None]).shape == (1, 2)
    assert str(made.parser.get_parsed_content("model_path")).endswith("models/model_phantom_tiny.pt")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_overlays_are_a_few_lines_and_change_ids_that_exist(bundle):
    train = read_json(configs(bundle, "train")[0])
    swin = read_json(configs(bundle, "swin_scratch")[0])
    for name in ("vit_scratch", "swin_scratch", "frozen", "full", "tiny"):
        overlay = read_json(configs(bundle, name)[0])
        known = set(train) | (set(swin) if name in ("swin_scratch", "tiny") else set())
        assert set(overlay) <= known
        assert overlay["_desc_"]
        if name in ("vit_scratch", "frozen", "full"):
            assert len(overlay) == 2


def test_the_method_is_in_the_config():
    config = read_json(configs("ixi_sex", "train")[0])
    expected = {
        "learning_rate": 1e-4,
        "epochs": 50,
        "batch_size": 8,
        "warmup_epochs": 5,
        "weight_decay": 1e-5,
        "unfrozen_blocks": "$@num_layers // 2",
        "image_size": [96] * 3,
        "input_extent_mm": [192] * 3,
        "pool": "summary",
        "threshold": 0.5,
        "checkpoint_minutes": 10,
    }
    assert {key: config[key] for key in expected} == expected
    assert read_json(configs("aibl_ad", "train")[0])["threshold"] == "youden"


@pytest.mark.parametrize("amp", [True, False])
def test_the_type_of_mixed_precision_can_be_chosen(amp, prepared, encoder, tmp_path):
    for bundle in BUNDLES:
        made = workflow(bundle, ("train",), prepared, encoder, tmp_path, amp=amp, amp_dtype="$torch.float16")
        for name in ("train#trainer", "validate#evaluator", "results#scoring"):
            engine = made.parser.get_parsed_content(name)
            assert (engine.amp, engine.amp_kwargs) == (amp, {"dtype": torch.float16})
        settings = made.parser.get_parsed_content("settings")
        assert (settings["amp"], settings["config"]["amp_dtype"]) == (amp, "$torch.float16")
        assert read_json(configs(bundle, "train")[0])["amp_dtype"] == "$torch.bfloat16"


def test_input_is_the_padded_volume_averaged_over_blocks(tmp_path):
    rng = np.random.default_rng(0)
    volume = rng.random((12, 16, 16), dtype=np.float32)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii")
    parser = ConfigParser()
    parser.read_config(configs("ixi_sex", "train")[0])
    parser.update({"input_extent_mm": [16] * 3, "image_size": [8, 8, 8]})
    transform = parser.get_parsed_content("validate#preprocessing")
    image = transform({"image": str(tmp_path / "a.nii"), "label": 1})["image"]
    padded = np.pad(volume, ((2, 2), (0, 0), (0, 0)))
    expected = padded.reshape(8, 2, 8, 2, 8, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(image[0], expected, atol=1e-6)


@pytest.mark.slow
def test_the_networks_input_and_output_are_what_the_metadata_says():
    # One bundle: both have the same network. ViT-B at 96^3.
    from monai.bundle import verify_net_in_out

    verify_net_in_out(
        net_id="network_def",
        meta_file=configs("ixi_sex", "metadata")[0],
        config_file=configs("ixi_sex", "inference")[0],
    )
    parts = [read_json(configs(bundle, "inference")[0])["network_def"] for bundle in BUNDLES]
    formats = [read_json(configs(bundle, "metadata")[0])["network_data_format"]["inputs"] for bundle in BUNDLES]
    assert parts[0] == parts[1] and formats[0] == formats[1]


# --- training ----------------------------------------------------------------------------------------------------


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
    assert {"train_loss", "val_loss", "val_auroc"} <= set(first["history"][-1])
    assert first["settings"]["num_folds"] == 3
    assert first["subjects"] == {"training": 6, "validation": 2, "scored": 4, "unused": 0}
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
    assert {"auroc", "sensitivity", "specificity", "threshold", "train_loss", "val_loss", "val_auroc"} <= set(
        data.metrics
    )
    assert data.params["epochs"] == "2" and data.params["learning_rate"] == "0.01"
    run_id = runs[0].info.run_id
    history = client.get_metric_history(run_id, "train_loss")
    assert [metric.step for metric in history] == [1, 2]
    assert [metric.step for metric in client.get_metric_history(run_id, "val_loss")] == [1, 2]
    path = client.download_artifacts(run_id, "predictions/predictions.csv", str(tmp_path))
    assert set(read_rows(Path(path))[0]) == {
        *("subject_id", "patient_id", "session", "site", "sex", "age"),
        *("label", "score", "prediction", "threshold", "optimistic_threshold"),
    }


def command(bundle: str, names: tuple[str, ...], **settings: Any) -> list[str]:
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    files = str(configs(bundle, *names))
    return [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *options]


def process_settings(prepared: Path, encoder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {**SIZES, "dataset_dir": prepared, "encoder_path": encoder, "output_dir": output, **changes}


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
    resumed = run("ixi_sex", ("train",), prepared, encoder, tmp_path / "cut", epochs=12)
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
    made = workflow("ixi_sex", ("train",), prepared, encoder, tmp_path / "run")
    with pytest.raises(RuntimeError) as caught:
        made.parser.get_parsed_content("checks")
    assert "@checks" in made.parser["run"]
    assert "3 processes cannot share" in str(caught.value.__cause__)
    assert "inner validation  2 scans" in str(caught.value.__cause__)
    assert not (tmp_path / "run").exists()


# --- trained models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(prepared, encoder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    run("aibl_ad", ("train",), prepared, encoder, output, fold=0, validation_fraction=0.5)
    return output


def test_evaluation_gives_the_same_scores_at_the_same_threshold(trained, prepared, encoder, tmp_path, capsys):
    model = str(trained / "models" / "model.pt")
    made = workflow("aibl_ad", ("train", "evaluate"), prepared, encoder, tmp_path, fold=0, model_path=model)
    made.initialize()
    made.run()
    before, after = (read_rows(folder / "predictions.csv") for folder in (trained, tmp_path))
    assert before == after
    metrics = read_json(tmp_path / "metrics.json")["metrics"]
    assert metrics.items() >= read_json(trained / "result.json")["metrics"].items()
    assert metrics["auroc_low"] <= metrics["auroc"] <= metrics["auroc_high"]
    assert "AUROC" in capsys.readouterr().out


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
    from volta_components.training.record import patient_key

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
    front, back = raw[0, :, SIDE // 2 + 4 : -4], raw[0, :, 4 : SIDE // 2 - 4]
    assert front[front > 0.2].mean() < back[back > 0.2].mean()


# --- bad input ---------------------------------------------------------------------------------------------------


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
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
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
    from volta_components.method.weights import load_encoder
    from volta_components.training.record import patient_key

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
            assert told.rstrip().endswith(f"fold 0: {len(items)} of {len(everybody)} scans")
        names = {row["subject_id"] for row in read_rows(folder / "eval/predictions.csv")}
        assert names == {item["subject_id"] for item in items}
    assert len(part) < len(everybody)
