# SPDX-License-Identifier: Apache-2.0
"""The classification bundles' configs: each overlay instantiated, alone and with the quick start's sizes."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_workflow import configs
from classification_bundle import BUNDLES, SIZES, workflow
from monai.bundle import ConfigParser, ConfigWorkflow
from prepared import ROOT
from torch.nn.parallel import DistributedDataParallel

from volta_components.downstream.networks import SwinClassifier, VoltaClassifier
from volta_components.files import read_json


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
        assert moving == [overlay in ("full", "gentle", "vit_scratch", "vit_mean_scratch"), True]
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
def test_overlays_change_ids_that_exist(bundle):
    train = read_json(configs(bundle, "train")[0])
    swin = read_json(configs(bundle, "swin_scratch")[0])
    for name in ("vit_scratch", "vit_mean_scratch", "swin_scratch", "frozen", "full", "gentle", "tiny"):
        overlay = read_json(configs(bundle, name)[0])
        known = set(train) | (set(swin) if name in ("swin_scratch", "tiny") else set())
        assert {key.split("#")[0] for key in overlay} <= known
        assert overlay["_desc_"]
        if name in ("vit_scratch", "full"):
            assert len(overlay.keys() - {"_desc_", "run_name"}) == 1
        # Each names its run, so that it does not go on with, or end as, that of train.json alone.
        assert name in str(overlay.get("run_name" if name in ("frozen", "full", "gentle") else "init", "tiny"))


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
    """MONAI's own is CUDA's, whatever the device: on a CPU the inferer does it."""
    for bundle in BUNDLES:
        made = workflow(bundle, ("train",), prepared, encoder, tmp_path, amp=amp, amp_dtype="$torch.float16")
        for name in ("train#trainer", "validate#evaluator", "results#scoring"):
            engine = made.parser.get_parsed_content(name)
            assert (engine.amp, engine.amp_kwargs) == (False, {"dtype": torch.float16})
            assert (engine.inferer.amp, engine.inferer.dtype) == (amp, torch.float16)
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


@pytest.mark.parametrize("balanced", [True, False])
def test_the_validation_loss_does_not_depend_on_the_batches(balanced, prepared, encoder, tmp_path):
    """With a weight for each class, PyTorch divides a batch's loss by the weights in it, not by its size."""
    made = workflow(
        "aibl_ad", ("train", "vit_scratch"), prepared, encoder, tmp_path, sizes={**SIZES, "balanced": balanced}
    )
    loss = made.parser.get_parsed_content("loss")
    if balanced:
        loss.weight = torch.tensor([0.3, 2.0])
    metric = made.parser.get_parsed_content("validate#additional_metrics")["val_loss"]
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(11, 2, generator=generator), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1])
    metric.reset()
    for part in torch.arange(11).split(4):
        metric.update((logits[part], label[part]))
    each = -logits.log_softmax(1)[torch.arange(11), label].numpy()
    weight = np.where(label == 1, 2.0, 0.3) if balanced else np.ones(11)
    assert metric.compute() == pytest.approx((weight * each).sum() / weight.sum(), rel=1e-5)
