# SPDX-License-Identifier: Apache-2.0
"""Classifiers: one tensor out, the encoder's weights load, pooling is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR

from volta_components.downstream.networks import SwinClassifier, VoltaClassifier, VoltaUNETR
from volta_components.downstream.start import LoadPretrained, freeze_encoder, freeze_for
from volta_components.errors import InputError
from volta_components.method.networks import VoltaViT, resample_position_embedding
from volta_components.method.weights import load_pretrained, save_encoder

SMALL: dict[str, Any] = {"img_size": (32, 32, 16), "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 4}
SIZES = {"hidden_size": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "summary_heads": 4}


def test_volta_classifier_is_encoder_pool_and_linear_head():
    image = torch.rand(2, 1, 32, 32, 48)
    for pool in ("summary", "mean"):
        network = VoltaClassifier(img_size=(32, 32, 48), num_classes=3, pool=pool, **SIZES).eval()
        tokens = network.encoder.encode(image)
        pooled = network.encoder.summarise(tokens) if pool == "summary" else tokens.sum(dim=1) / (2 * 2 * 3)
        expected = pooled @ network.head.weight.T + network.head.bias
        torch.testing.assert_close(network(image), expected)
        assert network(image).shape == (2, 3)
        assert {key.split(".")[0] for key in network.state_dict()} == {"encoder", "head"}


@pytest.mark.parametrize("pool", ["summary", "mean"])
def test_every_trainable_parameter_gets_a_gradient(pool):
    network = VoltaClassifier(img_size=(32, 32, 32), pool=pool, **SIZES)
    network(torch.rand(2, 1, 32, 32, 32)).square().sum().backward()
    # DDP waits for ever for a parameter without gradient.
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("pool", ["summary", "mean"])
@pytest.mark.parametrize("unfrozen", [0, 1, 2])
def test_every_parameter_that_trains_after_freezing_gets_a_gradient(pool, unfrozen):
    network = VoltaClassifier(img_size=(32, 32, 32), pool=pool, **SIZES)
    freeze_encoder(network.encoder, unfrozen)
    network(torch.rand(2, 1, 32, 32, 32)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    summarised = any(p.requires_grad for p in network.encoder.summariser.parameters())
    assert summarised == (pool == "summary" and unfrozen > 0)


def test_an_exported_encoder_of_another_grid_loads_with_nothing_left_but_the_head(tmp_path):
    encoder = VoltaViT(img_size=(32, 48, 48), decoder=False, **SIZES)
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    network = VoltaClassifier(img_size=(32, 32, 32), **SIZES)
    report = load_pretrained(network, tmp_path / "encoder.safetensors", prefix="encoder.")
    assert sorted(report.missing) == ["head.bias", "head.weight"]
    assert len(report.resampled) == 1 and "2x3x3 -> 2x2x2" in report.resampled[0]
    assert report.unused == []
    torch.testing.assert_close(network.encoder.summariser.cls_token, encoder.summariser.cls_token, rtol=0, atol=0)


def test_swin_classifier_pools_the_last_stage():
    network = SwinClassifier(
        num_classes=2, embed_dim=12, window_size=(2, 2, 2), depths=(1, 1, 1, 1), num_heads=(3, 3, 6, 6)
    ).eval()
    image = torch.rand(2, 1, 32, 32, 32)
    last = network.encoder(image)[-1]
    assert last.shape == (2, 16 * 12, 1, 1, 1)
    expected = last.flatten(2).mean(dim=-1) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(image), expected)


def test_swin_defaults_are_those_of_the_method():
    config = SwinClassifier().config
    assert (config["embed_dim"], config["window_size"], config["depths"], config["num_heads"]) == (
        48,
        [7, 7, 7],
        [2, 2, 2, 2],
        [3, 6, 12, 24],
    )


@pytest.mark.parametrize("pool", ["summary", "mean", None])
def test_scores_are_not_rounded_in_mixed_precision(pool):
    torch.manual_seed(0)
    network = (
        VoltaClassifier(img_size=(32, 32, 32), pool=pool, **SIZES)
        if pool
        else SwinClassifier(embed_dim=12, window_size=(2, 2, 2), depths=(1, 1, 1, 1), num_heads=(3, 3, 6, 6))
    ).eval()
    images = torch.rand(8, 1, 32, 32, 32) * torch.linspace(0.9, 1, 8)[:, None, None, None, None]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = network.features(images), network(images)
    assert logits.dtype == torch.float32
    weight, bias = network.head.weight.detach().double(), network.head.bias.detach().double()
    torch.testing.assert_close(logits.double(), features.double() @ weight.T + bias, atol=1e-6, rtol=0)
    assert (logits != logits.bfloat16().float()).any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VoltaClassifier(pool="max"), "summary or mean"),
        (lambda: VoltaClassifier(img_size=(30, 32, 32), **SIZES), "multiple of the patch"),
        (lambda: SwinClassifier(depths=(2, 2)), "four stages"),
        (lambda: SwinClassifier(embed_dim=12, num_heads=(5, 6, 12, 24)), "do not divide"),
    ],
)
def test_bad_sizes_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_with_twelve_blocks_it_is_monais_unetr() -> None:
    stock = UNETR(in_channels=1, out_channels=3, proj_type="conv", norm_name="instance", **SMALL)
    ours = VoltaUNETR(num_layers=12, **SMALL)
    assert ours.skips == (3, 6, 9)
    ours.load_state_dict(stock.state_dict())
    image = torch.rand(2, 1, 32, 32, 16)
    with torch.no_grad():
        assert torch.equal(ours(image), stock(image))


def test_a_smaller_encoder_has_its_skips_at_the_quarters(tmp_path: Path) -> None:
    network = VoltaUNETR(num_layers=6, **SMALL)
    assert len(network.vit.blocks) == 6 and network.skips == (1, 3, 4)
    assert network(torch.rand(1, 1, 32, 32, 16)).shape == (1, 3, 32, 32, 16)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    network(torch.rand(1, 1, 32, 32, 16)).sum().backward()
    without = [name for name in trained if network.get_parameter(name).grad is None]
    assert without == []  # else distributed training would wait for them


def test_the_encoder_of_pretraining_goes_into_it(tmp_path: Path) -> None:
    encoder = VoltaViT(
        img_size=(48, 64, 64), hidden_size=24, mlp_dim=32, num_layers=6, num_heads=4, summary_heads=4, decoder=False
    )
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    network = VoltaUNETR(num_layers=6, **SMALL)
    assert freeze_for(network, "volta", 2) is network
    report = LoadPretrained(network, "volta", tmp_path / "encoder.safetensors", tmp_path / "report.txt").load()
    assert report is not None
    assert len(report.loaded) + len(report.resampled) == len(network.vit.state_dict())
    assert all(name.startswith("summariser.") for name in report.unused)
    position = encoder.patch_embedding.position_embeddings
    expected = resample_position_embedding(position, (3, 4, 4), (2, 2, 1))
    assert torch.equal(network.vit.patch_embedding.position_embeddings, expected)
    assert torch.equal(network.vit.blocks[5].mlp.linear1.weight, encoder.blocks[5].mlp.linear1.weight)
    moving = {name.split(".")[1] for name, p in network.vit.blocks.named_parameters(prefix="b") if p.requires_grad}
    assert moving == {"4", "5"}
    assert all(p.requires_grad for name, p in network.named_parameters() if not name.startswith("vit."))
    assert "4x4 -> 2x2x1" in (tmp_path / "report.txt").read_text()


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="multiples"):
        VoltaUNETR(**{**SMALL, "img_size": (40, 32, 32)})
    with pytest.raises(InputError, match="4 blocks"):
        VoltaUNETR(num_layers=3, **SMALL)
