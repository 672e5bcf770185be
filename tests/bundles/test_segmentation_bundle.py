# SPDX-License-Identifier: Apache-2.0
"""The hippocampus bundle: every config instantiated, real runs on small volumes, a scan's own space, bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR, UNet
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from prepared import ROOT
from torch.nn.parallel import DistributedDataParallel

from volta_components.data.datalist import load_datalist, make_content
from volta_components.data.load import LoadScand
from volta_components.downstream.networks import VoltaUNETR
from volta_components.downstream.start import load_model
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import save_encoder
from volta_components.training.record import patient_key

BUNDLE = ROOT / "bundles" / "harp_hippocampus"
OVERLAYS = ["unetr_scratch", "unet_scratch", "frozen", "full", "tiny", "multi_gpu_train"]
# Sizes at which a run takes a few seconds.
NETWORK: dict[str, Any] = {
    "volume_size": [SIDE] * 3,
    "image_size": [32, 32, 16],
    "feature_size": 4,
    "hidden_size": 24,
    "mlp_dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_workers": 0,
}
SIZES: dict[str, Any] = {
    **NETWORK,
    "unet_channels": [4, 8, 16],
    "unet_strides": [2, 2],
    "unet_res_units": 0,
    "unfrozen_blocks": 2,
    "epochs": 3,
    "val_interval": 1,
    "crops_per_volume": 1,
    "learning_rate": 0.01,
    "checkpoint_minutes": 0,
}


def configs(*names: str) -> list[str]:
    return [str(BUNDLE / "configs" / f"{name}.json") for name in names]


def workflow(
    names: tuple[str, ...], data: Path, output: Path, sizes: dict[str, Any] | None = None, **changes: Any
) -> ConfigWorkflow:
    """The bundle's workflow on the small data set, as ``monai.bundle run`` makes it."""
    settings = {
        **(SIZES if sizes is None else sizes),
        "bundle_root": str(BUNDLE),
        "dataset_dir": str(data),
        "output_dir": f"${str(output)!r}",
        **changes,
    }
    made = ConfigWorkflow(
        config_file=configs(*names),
        meta_file=configs("metadata")[0],
        logging_file=False,
        workflow_type="train",
        **settings,
    )
    handlers = made.parser["train"]["handlers"]
    made.parser["train"]["handlers"] = [item for item in handlers if "ProgressBar" not in str(item)]
    return made


def run(names: tuple[str, ...], data: Path, output: Path, **changes: Any) -> ConfigWorkflow:
    """Run a workflow to its end."""
    made = workflow(names, data, output, **changes)
    made.initialize()
    made.run()
    made.finalize()
    return made


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set with label maps; nobody may change it."""
    return make_labelled(tmp_path_factory.mktemp("labelled") / "data")


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder of four blocks of 24, with random weights."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(3)
    network = VoltaViT(
        img_size=(32, 32, 32), hidden_size=24, mlp_dim=32, num_layers=4, num_heads=4, summary_heads=4, decoder=False
    )
    save_encoder(path, network, {"datalist_hash": "0" * 64, "patient_ids": []})
    return path


@pytest.fixture(scope="session")
def finished(labelled: Path, small_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the VolTA init, recorded by MLflow; nobody may change it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    run(
        ("train",),
        labelled,
        output,
        encoder_path=str(small_encoder),
        tracking="mlflow",
        tracking_uri=f"sqlite:///{output.parent}/mlruns.db",
        run_name="volta_fold0_frac1_seed0",
    )
    return output


# --- configs -----------------------------------------------------------------------------------------------------


def test_metadata_is_valid(schema: Path, tmp_path: Path) -> None:
    copy = tmp_path / "schema.json"
    shutil.copy(schema, copy)
    verify_metadata(meta_file=configs("metadata")[0], filepath=str(copy))
    data_format = read_json(configs("metadata")[0])["network_data_format"]
    assert list(data_format["outputs"]["pred"]["channel_def"].values()) == read_json(configs("train")[0])["class_names"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["train", "inference"])
def test_the_network_takes_and_gives_what_the_metadata_say(config: str) -> None:
    verify_net_in_out("network_def", configs("metadata")[0], configs(config)[0], device="cpu")


def test_there_are_no_other_configs() -> None:
    """A new config belongs into these tests."""
    found = {path.stem for path in (BUNDLE / "configs").glob("*.json")}
    # synthetic.json is tested with the data set that it renders, in tests/training/test_endless.py.
    assert found == {"train", "evaluate", "inference", "metadata", "starter", "synthetic", *OVERLAYS}


def test_the_starter_model_fits_its_overlay_and_says_what_it_was_trained_on() -> None:
    path = BUNDLE / "models" / "model_starter.pt"
    assert path.stat().st_size < 12 * 2**20
    parser = ConfigParser()
    parser.read_config([str(file) for file in configs("inference", "starter")])
    parser["bundle_root"] = str(BUNDLE)
    assert Path(parser.get_parsed_content("model_path")) == path
    network = parser.get_parsed_content("network_def")
    record = load_model(network, path)  # every weight, after its hash is verified
    overlay = read_json(configs("starter")[0])
    settings = record["provenance"]["settings"]
    shared = set(settings) & set(overlay)
    assert {"spacing", "volume_size", "image_size", "unet_channels"} <= shared
    assert all(settings[name] == overlay[name] for name in shared)
    assert len(record["provenance"]["patient_ids"]) == 15
    assert record["tags"]["phantom"] == "true"


def test_overlays_are_a_few_lines_and_change_ids_that_exist() -> None:
    train, unet = (read_json(path) for path in configs("train", "unet_scratch"))
    for name in OVERLAYS:
        overlay = read_json(configs(name)[0])
        assert overlay.pop("_desc_")
        known = set(train) | {"+initialize", "finalize"} | (set(unet) if name in ("unet_scratch", "tiny") else set())
        assert set(overlay) <= known
        if name in ("unetr_scratch", "frozen", "full"):
            assert len(overlay) == 1


def test_the_method_is_in_the_config() -> None:
    train, unet = (read_json(path) for path in configs("train", "unet_scratch"))
    expected = {
        "init": "volta",
        "fold": 0,
        "validation_fraction": 0.2,
        "epochs": 500,
        "batch_size": 2,
        "crops_per_volume": 2,
        "foreground_share": 0.5,
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "unfrozen_blocks": "$@num_layers // 2",
        "volume_size": [160] * 3,
        "image_size": [96] * 3,
        "spacing": 1.0,
        "window_overlap": 0.5,
        "feature_size": 16,
        "hidden_size": 768,
        "num_layers": 12,
        "cross_entropy_weights": None,
        "checkpoint_minutes": 10,
    }
    assert {key: train[key] for key in expected} == expected
    assert (unet["unet_channels"], unet["unet_strides"], unet["unet_res_units"]) == (
        [16, 32, 64, 128, 256],
        [2, 2, 2, 2],
        2,
    )
    assert train["loss"]["_target_"] == "DiceCELoss" and train["loss"]["include_background"] is False
    assert train["validate"]["inferer"]["mode"] == "gaussian"


def test_the_type_of_mixed_precision_can_be_chosen(labelled: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"amp": True, "amp_dtype": "$torch.float16"}
    made = workflow(("train", "unetr_scratch"), labelled, tmp_path, **changes)
    for name in ("train#trainer", "validate#evaluator", "results#scoring"):
        assert made.parser.get_parsed_content(name).amp_kwargs == {"dtype": torch.float16}
    assert made.parser.get_parsed_content("settings")["config"]["amp_dtype"] == "$torch.float16"
    parser = ConfigParser()
    parser.read_config(configs("inference"))
    parser.update({**NETWORK, **changes, "data": [{"image": "scan.nii"}], "handlers": []})
    assert parser.get_parsed_content("evaluator").amp_kwargs == {"dtype": torch.float16}
    assert {read_json(path)["amp_dtype"] for path in configs("train", "inference")} == {"$torch.bfloat16"}


def built(made: ConfigWorkflow, overlay: str | None) -> Any:
    """Initialise a workflow, in this process alone; its network, without a distributed wrapper."""
    parser = made.parser
    parser["initialize"] = [line for line in parser["initialize"] if "join_processes" not in line]
    made.initialize()
    assert made.check_properties() == []
    plain = parser.get_parsed_content("plain_network")
    assert isinstance(plain, UNet if overlay == "unet_scratch" else VoltaUNETR)
    assert parser.get_parsed_content("results#scoring").network is plain
    assert parser.get_parsed_content("results").network is plain
    return plain


def check_training(made: ConfigWorkflow, overlay: str | None) -> None:
    network = made.parser.get_parsed_content("network")
    assert isinstance(network, DistributedDataParallel) == (overlay == "multi_gpu_train")
    plain = made.parser.get_parsed_content("plain_network")
    if overlay != "unet_scratch":
        # The upper half trains, unless the overlay says otherwise.
        count = len(plain.vit.blocks)
        frozen = {"frozen": count, "full": 0, "unetr_scratch": 0}.get(str(overlay), count // 2)
        moving = [any(p.requires_grad for p in block.parameters()) for block in plain.vit.blocks]
        assert moving == [False] * frozen + [True] * (count - frozen)
    trainer = made.parser.get_parsed_content("train#trainer")
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in plain.parameters() if p.requires_grad}
    assert isinstance(trainer.loss_function, DiceCELoss)
    batch = next(iter(made.parser.get_parsed_content("train#dataloader")))
    volumes, crops, size = (made.parser.get_parsed_content(i) for i in ("batch_size", "crops_per_volume", "image_size"))
    assert batch["image"].shape == (volumes * crops, 1, *size) and batch["label"].shape == batch["image"].shape
    assert set(batch["label"].unique().tolist()) <= {0, 1, 2}
    settings = made.parser.get_parsed_content("settings")
    assert json.dumps(settings) and settings["network_def.class"] == type(plain).__name__
    assert (settings["encoder_sha256"] == "") == ("scratch" in str(overlay))


@pytest.mark.parametrize("overlay", [None, "evaluate", *(name for name in OVERLAYS if name != "tiny")])
def test_every_overlay_is_instantiated_alone(
    overlay: str | None, labelled: Path, small_encoder: Path, tmp_path: Path, one_process: None
) -> None:
    names = ("train", overlay) if overlay else ("train",)
    sizes = {key: value for key, value in SIZES.items() if key != "unfrozen_blocks"}
    if overlay != "unet_scratch":
        sizes = {key: value for key, value in sizes.items() if not key.startswith("unet_")}
    made = workflow(names, labelled, tmp_path / "run", sizes=sizes, encoder_path=str(small_encoder))
    built(made, overlay)
    if overlay != "evaluate":
        check_training(made, overlay)


@pytest.mark.parametrize("overlay", [None, "evaluate", *(name for name in OVERLAYS if name != "tiny")])
def test_every_overlay_is_instantiated_with_the_quick_starts(
    overlay: str | None, tiny_data: Path, tiny_encoder: Path, tmp_path: Path, one_process: None
) -> None:
    """At the quick start's own sizes, on volumes of 3 mm: only paths are changed."""
    names = ("train", overlay, "tiny") if overlay else ("train", "tiny")
    made = workflow(names, tiny_data, tmp_path / "run", sizes={}, encoder_path=str(tiny_encoder))
    built(made, overlay)
    if overlay == "evaluate":
        return
    check_training(made, overlay)
    tiny = read_json(configs("tiny")[0])
    settings = made.parser.get_parsed_content("settings")
    sizes = ("feature_size", "hidden_size", "mlp_dim", "num_layers", "num_heads", "epochs", "image_size")
    for name in (*sizes, *(["unet_channels"] if overlay == "unet_scratch" else [])):
        assert settings[name] == tiny[name]


def test_the_quick_start_serves_inference_too(tiny_data: Path, tmp_path: Path) -> None:
    made = ConfigWorkflow(
        config_file=configs("inference", "tiny"),
        meta_file=configs("metadata")[0],
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(BUNDLE),
        source=str(tiny_data),
        output_dir=str(tmp_path),
    )
    made.initialize()
    tiny = read_json(configs("tiny")[0])
    assert made.parser.get_parsed_content("dataset")[0]["image"].shape == (1, *tiny["volume_size"])
    assert made.parser.get_parsed_content("network").config["num_layers"] == tiny["num_layers"]
    assert str(made.parser.get_parsed_content("model_path")).endswith("models/model_phantom_tiny.pt")


def test_the_paper_sized_networks_are_monais() -> None:
    """Without their weights, which would take a second each: only names and shapes."""
    with torch.device("meta"):
        stock = UNETR(in_channels=1, out_channels=3, img_size=(96, 96, 96), proj_type="conv", norm_name="instance")
        parser = ConfigParser()
        parser.read_config(configs("train"))
        ours = parser.get_parsed_content("network_def")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert ours.skips == (3, 6, 9)


def test_a_smaller_share_of_crops_has_foreground_in_the_middle(labelled: Path, tmp_path: Path) -> None:
    def share(foreground: float) -> float:
        made = workflow(
            ("train", "unetr_scratch"),
            labelled,
            tmp_path,
            foreground_share=foreground,
            image_size=[16] * 3,
            augment_probability=0.0,
        )
        dataset = made.parser.get_parsed_content("train#dataset")
        crops = [crop for epoch in range(12) for index in range(len(dataset)) for crop in dataset[epoch, index]]
        return float(np.mean([bool(crop["label"][0, 7:9, 7:9, 7:9].any()) for crop in crops]))

    assert share(1.0) == 1.0
    assert share(0.0) < 0.2
    assert 0.3 < share(0.5) < 0.75


# --- runs --------------------------------------------------------------------------------------------------------


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


def test_it_learns(labelled: Path, tmp_path: Path) -> None:
    """Bright ellipsoids, told apart by the side they are on."""
    run(
        ("train", "unet_scratch"),
        labelled,
        tmp_path / "run",
        epochs=30,
        val_interval=15,
        image_size=[32, 16, 16],
        learning_rate=0.02,
        foreground_share=0.9,
    )
    metrics = read_json(tmp_path / "run" / "result.json")["metrics"]
    assert metrics["mean_dice"] > 0.7 and metrics["hd95_failures"] == 0
    assert metrics["hd95"] < metrics["hd95_with_penalty"] + 1e-6


def test_mlflow_has_all_that_the_report_needs(finished: Path) -> None:
    client = MlflowClient(f"sqlite:///{finished.parent}/mlruns.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "volta3d_harp_hippocampus"]
    (record,) = client.search_runs([experiment.experiment_id])
    tags = record.data.tags
    expected = {"bundle": "harp_hippocampus", "init": "volta", "fold": "0", "fraction": "1", "finished": "true"}
    assert {key: tags[key] for key in expected} == expected
    assert tags["leak"] == "none" and tags["phantom"] == "false" and len(tags["encoder_sha256"]) == 64
    metrics = read_json(finished / "result.json")["metrics"]
    assert {key: record.data.metrics[key] for key in metrics} == pytest.approx(metrics)
    assert record.data.params["learning_rate"] == "0.01"
    for name in ("train_loss", "val_loss", "val_mean_dice", "optimistic_epoch_mean_dice"):
        assert [item.step for item in client.get_metric_history(record.info.run_id, name)] == [1, 2, 3]
    names = {item.path for item in client.list_artifacts(record.info.run_id, "predictions")}
    assert names == {f"predictions/{name}" for name in ("scores.csv", "paths.csv", "masks", "images", "labels")}
    listed = read_rows(finished / "predictions" / "paths.csv")
    assert all(Path(row["image"]).is_file() and Path(row["label"]).is_file() for row in listed)
    picture = nib.load(finished / "predictions" / "images" / "sub-0000_ses-M000.nii.gz")
    difference = np.asarray(picture.dataobj) - np.asarray(nib.load(listed[0]["image"]).dataobj)
    assert np.abs(difference).max() < 0.5 / 255 + 1e-6


def test_the_model_is_plain_weights_and_tells_whom_it_was_trained_on(finished: Path, labelled: Path) -> None:
    state = torch.load(finished / "models" / "model.pt", weights_only=True)
    record = read_json(finished / "models" / "model.json")
    network = VoltaUNETR(**record["network"]["config"])
    network.load_state_dict(state)
    trained = {patient_key(item["patient_id"], "fake") for item in load_datalist(labelled).items if item["fold"] != 0}
    assert set(record["provenance"]["patient_ids"]) == trained
    assert record["pretraining"]["patient_ids"] == [] and len(record["pretraining"]["encoder_sha256"]) == 64
    assert "vit." in (finished / "pretrained.txt").read_text()


class Broken(Exception):
    pass


@contextmanager
def input_error(*words: str) -> Iterator[None]:
    """Expect an ``InputError`` with these words; MONAI wraps what an expression raises."""
    with pytest.raises((InputError, RuntimeError)) as caught:
        yield
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    assert error is not None, caught.value
    assert [word for word in words if word not in str(error)] == []


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
    finished: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


# --- inference ---------------------------------------------------------------------------------------------------


def infer(finished: Path, source: Path, output: Path, **changes: Any) -> list[dict[str, str]]:
    made = ConfigWorkflow(
        config_file=configs("inference"),
        meta_file=configs("metadata")[0],
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(BUNDLE),
        source=str(source),
        output_dir=str(output),
        model_path=str(finished / "models" / "model.pt"),
        **{**NETWORK, **changes},
    )
    made.parser["handlers"] = made.parser["handlers"][:1]
    made.initialize()
    assert made.check_properties() == []
    made.run()
    return read_rows(output / "volumes.csv")


def test_a_mask_lies_in_its_scans_own_space(finished: Path, tmp_path: Path) -> None:
    """The same head in four orientations and two types of file: the same mask in the world, on each file's grid."""
    affine = centred_affine((36, 40, 34))
    volume, _ = head((36, 40, 34), affine, seed=20)
    image = nib.Nifti1Image((volume * 1000).astype(np.int16), affine)
    image.set_qform(affine, code=1)
    (tmp_path / "raw").mkdir()
    for codes, suffix in (("RAS", "nii.gz"), ("LPS", "nii"), ("PIR", "nii.gz"), ("SLA", "mgz")):
        turned = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes))))
        if suffix == "mgz":
            turned = nib.MGHImage(np.asarray(turned.dataobj), turned.affine)
        nib.save(turned, tmp_path / "raw" / f"sub-{codes}_T1w.{suffix}")
    rows = infer(finished, tmp_path / "raw", tmp_path / "out")
    assert [row["subject_id"] for row in rows] == ["sub-LPS", "sub-PIR", "sub-RAS", "sub-SLA"]
    masks = []
    for row in rows:
        scan = nib.load(row["file"])
        mask = nib.load(tmp_path / "out" / f"{row['subject_id']}_T1w_hippocampus.nii.gz")
        assert mask.shape == scan.shape and np.allclose(mask.affine, scan.affine, atol=1e-4)
        assert mask.get_data_dtype() == np.uint8
        canonical = nib.as_closest_canonical(mask)
        masks.append(np.asarray(canonical.dataobj))
        assert np.allclose(canonical.affine, affine, atol=1e-4)
        for side, value in (("left", 1), ("right", 2)):
            assert float(row[f"{side}_mm3"]) == pytest.approx((masks[-1] == value).sum(), abs=0.06)
    assert masks[0].any()
    assert all(np.array_equal(mask, masks[0]) for mask in masks[1:])


def test_a_prepared_scan_gets_the_mask_that_was_scored(finished: Path, labelled: Path, tmp_path: Path) -> None:
    source = Path(load_datalist(labelled).split(0)[1][1]["image"])
    infer(finished, source, tmp_path)
    scored = nib.load(finished / "predictions" / "masks" / "sub-0005_ses-M000.nii.gz")
    mask = nib.load(tmp_path / "sub-0005_ses-M000_hippocampus.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(scored.dataobj))


def test_workers_load_in_memory_and_leave_the_device_alone(finished: Path, labelled: Path, tmp_path: Path) -> None:
    """A forked process cannot use CUDA; the evaluator moves each batch."""
    parser = ConfigParser()
    parser.read_config(configs("inference"))
    parser.update({**NETWORK, "device": "$torch.device('meta')"})
    item = {"image": str(labelled / "images" / "sub-0000_ses-M000.nii")}
    image = parser.get_parsed_content("preprocessing")(item)["image"]
    assert image.device.type == "cpu"
    for workers in (0, 2):
        infer(finished, labelled / "images", tmp_path / str(workers), num_workers=workers)
    alone, helped = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".jsonl"}
        for name in ("0", "2")
    )
    assert len(alone) == 11 and alone == helped


def test_scans_of_the_same_file_name_get_masks_of_their_own(finished: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("sub-1", "sub-2")):
        affine = centred_affine((36, 40, 34))
        volume, _ = head((36, 40, 34), affine, seed=number)
        (tmp_path / "raw" / name).mkdir(parents=True)
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / "raw" / name / "T1.nii.gz")
    infer(finished, tmp_path / "raw", tmp_path / "out")
    masks = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.nii.gz"))
    assert masks == ["sub-1/T1_hippocampus.nii.gz", "sub-2/T1_hippocampus.nii.gz"]
    with input_error("choose a folder outside of it"):
        infer(finished, tmp_path / "raw", tmp_path / "raw" / "masks")
    shutil.copy(tmp_path / "raw" / "sub-1" / "T1.nii.gz", tmp_path / "raw" / "sub-1" / "T1.mgz")
    with input_error("the same name", "T1.mgz", "T1.nii.gz"):
        infer(finished, tmp_path / "raw", tmp_path / "again")


def test_bad_scans_are_all_named_before_any_is_segmented(finished: Path, labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled / "images", tmp_path / "scans")
    for name in ("sub-0003_ses-M000.nii", "sub-0007_ses-M000.nii"):
        path = tmp_path / "scans" / name
        path.write_bytes(path.read_bytes()[:2000])
    with input_error("2 of 10 scans cannot be used", "sub-0003", "sub-0007"):
        infer(finished, tmp_path / "scans", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- bad input ---------------------------------------------------------------------------------------------------


def test_bad_input_ends_a_run_before_training(labelled: Path, small_encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(labelled, data)
    scratch = ("train", "unetr_scratch")

    label = data / "labels" / "sub-0003_ses-M000.nii"
    good = label.read_bytes()
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.array([0, 2, 1], np.uint8)[np.asarray(image.dataobj)], image.affine), label)
    with input_error("sub-0003", "left and right are swapped"):
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
    words = [f"--{key}={value}" for key, value in changes.items()]
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
