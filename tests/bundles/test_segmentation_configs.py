# SPDX-License-Identifier: Apache-2.0
"""The hippocampus bundle's configs: each overlay instantiated, alone and with the quick start's sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR, UNet
from segmentation_bundle import BUNDLE, NETWORK, OVERLAYS, SIZES, configs, workflow
from torch.nn.parallel import DistributedDataParallel

from volta_components.downstream.networks import VoltaUNETR
from volta_components.downstream.start import load_model
from volta_components.files import read_json


def test_metadata_name_the_channels_as_the_classes() -> None:
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


@pytest.mark.parametrize("names", [("train", "starter"), ("train", "starter", "evaluate")])
def test_the_starter_model_can_be_scored_and_its_network_trained(names: tuple[str, ...]) -> None:
    """Its init is none that starts from an encoder: nothing is loaded from one, nothing frozen."""
    parser = ConfigParser()
    parser.read_config([str(file) for file in configs(*names)])
    parser["bundle_root"], parser["device"] = str(BUNDLE), "cpu"
    network = parser.get_parsed_content("plain_network")
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert len(parser.get_parsed_content("optimizer").param_groups) > 0
    if "evaluate" in names:
        record = parser.get_parsed_content("model")
        assert record["sha256"] == read_json(BUNDLE / "models" / "model_starter.json")["sha256"]


def test_overlays_change_ids_that_exist() -> None:
    train, unet = (read_json(path) for path in configs("train", "unet_scratch"))
    for name in OVERLAYS:
        overlay = read_json(configs(name)[0])
        assert overlay.pop("_desc_")
        known = set(train) | {"+initialize", "finalize"} | (set(unet) if name in ("unet_scratch", "tiny") else set())
        assert set(overlay) <= known
        if name in ("frozen", "full", "gentle"):
            assert name in overlay.pop("run_name")
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
        frozen = {"frozen": count, "full": 0, "gentle": 0, "unetr_scratch": 0}.get(str(overlay), count // 2)
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
