# SPDX-License-Identifier: Apache-2.0
"""Classifiers: one tensor out, the encoder's weights load, pooling is what it says."""

from __future__ import annotations

import pytest
import torch

from volta_components.downstream.networks import SwinClassifier, VoltaClassifier
from volta_components.downstream.start import freeze_encoder
from volta_components.errors import InputError
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import load_pretrained, save_encoder

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
