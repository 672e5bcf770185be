# SPDX-License-Identifier: Apache-2.0
"""The pretraining bundle's configs: each parses, its objects can be built, and they say what the paper says."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from method_helpers import make_views
from monai.bundle import ConfigParser
from prepared import PRETRAIN, ROOT, TINY_SIZES
from torch.nn.parallel import DistributedDataParallel

from volta_components.data.datalist import load_datalist
from volta_components.files import sha256_file
from volta_components.method.ema import TeacherEMAHandler
from volta_components.method.koleo import KoLeoLoss
from volta_components.method.losses import CentredTargets, DiCoMLoss, SinkhornTargets
from volta_components.method.networks import VoltaTeacher, VoltaViT
from volta_components.method.trainer import VoltaTrainer
from volta_components.method.weights import load_encoder, read_weights
from volta_components.training.ids import undone_parts

TRAIN = json.loads((PRETRAIN / "train.json").read_text())
OVERLAYS = [
    "tiny",
    "crops_96",
    "resized_crops",
    "dino_gaps",
    "sinkhorn",
    "koleo",
    "token_centre",
    "masked_tokens",
    "stochastic_depth",
    "drop_air",
    "multi_gpu_train",
]
# Ids that monai.bundle itself looks for, which a config may do without.
WORKFLOW = {"initialize", "run", "finalize"}
# Sizes of a crop are what these overlays are about; their own values cost a second, so they are kept.
OWN_SIZES = {"tiny": ("local_size", "num_local"), "crops_96": ("global_size", "global_extent_mm", "local_size")}


def parsed(overlay: str | None, prepared: Path, folder: Path, **overrides: Any) -> ConfigParser:
    """``train.json`` with an overlay, made small for the prepared data set."""
    files = [PRETRAIN / f"{name}.json" for name in ("train", overlay) if name]
    parser = ConfigParser()
    parser.read_config([str(path) for path in files])
    sizes = {name: value for name, value in TINY_SIZES.items() if name not in OWN_SIZES.get(str(overlay), ())}
    settings = {
        **sizes,
        "dataset_dir": str(prepared),
        "output_dir": str(folder / "run"),
        "ckpt_dir": str(folder / "models"),
        "device": "$torch.device('cpu')",
        "num_workers": 0,
        "spacing": 1.0,
        "checkpoint_minutes": 0,
        **overrides,
    }
    for name, value in settings.items():
        parser[name] = value
    parser.parse()
    return parser


def test_there_are_no_other_configs() -> None:
    """A new config belongs into these tests."""
    found = {path.stem for path in PRETRAIN.glob("*.json")}
    # These are tested with the data set that they render, in tests/training/test_endless.py.
    rendered = {"synthetic", "two_scanners", "other_picture", "standard_picture", "recommended"}
    assert found == {"train", "evaluate", "inference", "metadata", *rendered, *OVERLAYS}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_change_only_what_is_there(overlay: str) -> None:
    changed = json.loads((PRETRAIN / f"{overlay}.json").read_text())
    assert changed.pop("_desc_")
    assert {name.removeprefix("+").split("#")[0] for name in changed} - TRAIN.keys() - WORKFLOW == set()


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "tiny"])
def test_a_variant_at_the_quick_start_s_sizes_is_still_that_variant(
    overlay: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the order of docs/variants.md."""
    files = [PRETRAIN / f"{name}.json" for name in ("train", "tiny", overlay)]
    parser = ConfigParser()
    parser.read_config([str(path) for path in files])
    for name, value in json.loads(files[-1].read_text()).items():
        if name[0] != "+":
            assert parser[name] == value, name
    sides = zip(parser["global_extent_mm"], parser["global_size"], strict=True)
    assert {extent / size for extent, size in sides} == {2.0 if overlay == "crops_96" else 3.0}  # nothing is stretched
    assert undone_parts(files) == []
    assert all("tiny" in message and f"{overlay}.json has" in message for message in caplog.messages)


def test_an_order_that_loses_the_recipe_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def undone(*names: str) -> list[tuple[str, str]]:
        return undone_parts([PRETRAIN / f"{name}.json" for name in ("train", *names)])

    assert undone("tiny", "synthetic", "recommended") == []
    assert undone("synthetic", "recommended", "tiny") == []  # with the quick start's gentle views, as the log says
    assert (
        "rotation_degrees: tiny.json has another value than recommended.json, and is the later one" in caplog.messages
    )
    names = {name for name, _ in undone("recommended", "synthetic")}
    assert {f"train#dataset#{part} in recommended.json" for part in ("scanners", "standard", "transform")} == names


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_objects_of_every_overlay_can_be_built(
    overlay: str | None, prepared: Path, tmp_path: Path, one_process: None
) -> None:
    parser = parsed(overlay, prepared, tmp_path)
    network = parser.get_parsed_content("network_def")
    assert isinstance(network, VoltaViT)
    image = torch.rand(1, 1, 32, 32, 32)
    assert network(image).shape == (1, 32)
    assert isinstance(parser.get_parsed_content("teacher"), VoltaTeacher)

    views = make_views(parser.get_parsed_content("views"), image, [(1, 0)])
    size = tuple(parser.get_parsed_content("global_size"))
    local = tuple(parser.get_parsed_content("local_size"))
    assert views.teacher.shape == views.student.shape == (2, 1, 1, *size)
    assert views.local.shape == (parser.get_parsed_content("num_local"), 1, 1, *local)
    assert 0.5 <= views.masked.float().mean() <= 0.65

    loss = parser.get_parsed_content("loss")
    assert isinstance(loss, DiCoMLoss)
    assert loss.reconstruction_weight == 100
    kinds = [type(term.targets) for term in (loss.global_loss, loss.patch_loss)]
    assert kinds == [SinkhornTargets if overlay == "sinkhorn" else CentredTargets, CentredTargets]
    assert isinstance(loss.koleo_loss, KoLeoLoss) == (overlay == "koleo")

    trainer = parser.get_parsed_content("train#trainer")
    assert isinstance(trainer, VoltaTrainer)
    assert trainer.loss is loss
    assert (trainer.views.air is not None) == (overlay == "drop_air")
    # On a CPU one after the other, but for the quick start's size and for losses that compare the views.
    together = torch.cuda.is_available() or overlay in ("tiny", "koleo", "masked_tokens")
    assert trainer.views_together == together
    assert trainer.state.max_epochs == parser.get_parsed_content("epochs")
    # tiny.json keeps fold 0, four of the twelve volumes, for the reconstruction check.
    volumes, batch = 8 if overlay == "tiny" else 12, parser.get_parsed_content("batch_size")
    assert batch == (2 if overlay == "tiny" else 1)
    assert trainer.sampler.iterations == volumes // batch
    assert isinstance(trainer.student, DistributedDataParallel) == (overlay == "multi_gpu_train")
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.plain_student.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    (ema,) = [item for item in parser.get_parsed_content("train#handlers") if isinstance(item, TeacherEMAHandler)]
    torch.nn.init.ones_(trainer.teacher.network.norm.bias)
    ema.update(0.0)
    assert torch.equal(trainer.teacher.network.norm.bias, trainer.plain_student.network.norm.bias)


def test_a_picture_every_0_epochs_is_refused_before_the_training(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        parsed(None, prepared, tmp_path, picture_interval=0).get_parsed_content("run#0")
    assert "--picture_interval  0" in str(caught.value.__cause__)


def test_held_out_volumes_are_not_trained_on(prepared: Path, tmp_path: Path) -> None:
    parser = parsed(None, prepared, tmp_path, validation_fold=1)
    items = load_datalist(prepared).items
    data, held_out = parser.get_parsed_content("parts")
    assert [item["fold"] for item in held_out] == [1] * 4
    assert sorted(item["subject_id"] for item in [*data, *held_out]) == [item["subject_id"] for item in items]
    assert parser.get_parsed_content("train#trainer").sampler.num_samples == 8


def test_the_exported_network_must_be_known(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        parsed(None, prepared, tmp_path, export="Teacher").get_parsed_content("train#trainer")
    assert "export 'Teacher': choose teacher or student" in str(caught.value.__cause__)


def test_a_fold_that_does_not_exist_is_an_error(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        parsed(None, prepared, tmp_path, validation_fold=7).get_parsed_content("parts")
    assert "no fold 7" in str(caught.value.__cause__)


# What the paper gives, with the sizes and the length of a run that it leaves to ViT-B and DINO.
PAPER = {
    "volume_size": [144, 192, 192],
    "global_size": [144, 192, 192],
    "local_size": [96, 96, 96],
    "patch_size": [16, 16, 16],
    "spacing": 1.0,
    "hidden_size": 768,
    "mlp_dim": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "summary_heads": 8,
    "mask_coverage": 0.5,
    "mask_max_side": 0.3,
    "student_temperature": 0.1,
    "reconstruction_weight": 100.0,
    "learning_rate": 5e-4,
    "warmup_epochs": 10,
    "batch_size": 1,
    "accumulation_steps": 8,
    "teacher_momentum": [0.996, 1.0],
    "epochs": 300,
    "num_local": 8,
    "head_out_dim": 8192,
}


def test_train_json_is_the_recipe() -> None:
    assert {name: TRAIN[name] for name in PAPER} == PAPER
    assert TRAIN["global_loss"]["targets"]["_target_"].endswith("CentredTargets")  # centring by a running mean
    assert TRAIN["patch_loss"]["targets"]["_target_"].endswith("CentredTargets")
    assert TRAIN["optimizer"]["_target_"] == "torch.optim.AdamW"


def test_schedules_of_the_paper_as_built(prepared: Path, tmp_path: Path) -> None:
    """Twelve volumes: 12 mini-batches and 2 optimiser steps an epoch."""
    parser = parsed(None, prepared, tmp_path, checkpoint_minutes=0)
    rate = parser.get_parsed_content("train#trainer").learning_rate
    momentum = parser.get_parsed_content("train#handlers#0").momentum
    assert rate(10) == pytest.approx(2.5e-4)
    assert rate(20) == pytest.approx(5e-4)  # after ten epochs of warm-up
    assert rate(599) == pytest.approx(1e-6)
    assert momentum(0) == 0.996
    assert momentum(1799) == pytest.approx(0.998, abs=2e-6)
    assert 1 - 1e-6 < momentum(3599) <= 1.0


def test_only_dinos_temperatures_rise(prepared: Path, tmp_path: Path) -> None:
    """Under entropy control a ramp has no effect; ``dino_gaps.json`` has neither control nor a constant."""
    for overlay, last, control in ((None, 0.04, 0.7), ("dino_gaps", 0.07, None)):
        parser = parsed(overlay, prepared, tmp_path)
        trainer = parser.get_parsed_content("train#trainer")
        for schedule in (trainer.teacher_temperature, trainer.patch_teacher_temperature):
            assert (schedule(0), schedule(30 * 12), schedule(10**6)) == pytest.approx((0.04, last, last))
        assert trainer.loss.global_loss.targets.target_entropy == control


@pytest.mark.parametrize("name", ["evaluate", "inference"])
def test_evaluation_and_inference_can_be_built(name: str, prepared: Path, encoder: Path, tmp_path: Path) -> None:
    parser = ConfigParser()
    parser.read_config(str(PRETRAIN / f"{name}.json"))
    for key, value in {
        **TINY_SIZES,
        "dataset_dir": str(prepared),
        "encoder_path": str(encoder),
        "output_dir": str(tmp_path),
        "num_workers": 0,
        "device": "$torch.device('cpu')",
    }.items():
        parser[key] = value
    parser.parse()
    network = parser.get_parsed_content("network_def")
    assert network.config["hidden_size"] == 32
    parser.get_parsed_content("evaluator")
    loader = parser.get_parsed_content("dataloader")
    batch = next(iter(loader))
    assert batch["image"].shape[1:] == (1, 32, 32, 32)
    assert len(loader.dataset) == 12
    if name == "evaluate":
        untrained = parser.get_parsed_content("random_network")
        assert untrained.config == network.config
        assert not torch.equal(untrained.blocks[0].mlp.linear1.weight, network.blocks[0].mlp.linear1.weight)


@pytest.mark.parametrize("name", ["evaluate", "inference"])
def test_the_encoder_is_found_in_a_bundle_that_was_trained_or_packed(name: str, encoder: Path, tmp_path: Path) -> None:
    """``encoder.safetensors`` of the training, else ``model.pt``, as it is packed; the first one wins."""
    models = tmp_path / "models"
    models.mkdir()
    for place in ("model.pt", "encoder.safetensors"):
        torch.save(read_weights(encoder), models / place) if place == "model.pt" else shutil.copy(encoder, models)
        record = json.loads(encoder.with_suffix(".json").read_text()) | {"sha256": sha256_file(models / place)}
        (models / place).with_suffix(".json").write_text(json.dumps(record))
        parser = ConfigParser()
        parser.read_config(str(PRETRAIN / f"{name}.json"))
        for key, value in {**TINY_SIZES, "bundle_root": str(tmp_path), "device": "$torch.device('cpu')"}.items():
            parser[key] = value
        assert parser.get_parsed_content("encoder_path") == str(models / place)
        parser.get_parsed_content("network" if name == "evaluate" else "model")
        network = parser.get_parsed_content("network")
        assert torch.equal(network.norm.weight, load_encoder(encoder).norm.weight)
        assert torch.equal(network.summariser.cls_token, load_encoder(encoder).summariser.cls_token)


def monai_bundle(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """``python -m monai.bundle ...``, without the seconds that a new process takes to import it."""
    monkeypatch.setattr(sys, "argv", ["monai.bundle", *arguments])
    runpy.run_module("monai.bundle", run_name="__main__")


def test_metadata_fits_the_config_and_the_pinned_versions() -> None:
    meta = json.loads((PRETRAIN / "metadata.json").read_text())
    image, pred = (meta["network_data_format"][side] for side in ("inputs", "outputs"))
    assert image["image"]["spatial_shape"] == [f"{side}*n" for side in TRAIN["patch_size"]]
    assert pred["pred"]["num_channels"] == TRAIN["hidden_size"]
    assert meta["version"] in meta["changelog"]
    pins = dict(
        line.strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    versions = {
        "monai": meta["monai_version"],
        "torch": meta["pytorch_version"],
        "numpy": meta["numpy_version"],
        **meta["required_packages_version"],
    }
    versions.pop("volta-components")
    assert versions == {name: pins[name] for name in versions}


@pytest.mark.parametrize("n", [1, 2])
def test_network_takes_and_gives_what_metadata_says(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Volumes of 16^3 and 32^3 through a network for 32^3: both token grids."""
    names = ("hidden_size", "mlp_dim", "num_layers", "num_heads", "summary_heads", "global_size")
    settings = [part for name in names for part in (f"--{name}", str(TINY_SIZES[name]))]
    monai_bundle(
        monkeypatch,
        *("verify_net_in_out", "network_def", "--meta_file", str(PRETRAIN / "metadata.json")),
        *("--config_file", str(PRETRAIN / "train.json"), "--device", "cpu", "--n", str(n), *settings),
        *("--_meta_#network_data_format#outputs#pred#num_channels", "32"),
    )
