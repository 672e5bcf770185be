# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights, frozen blocks, and models that load whole or not at all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fine_tuning import SIZES, make_encoder
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.networks.nets import UNETR
from torch import nn

from volta_components.downstream.networks import VoltaClassifier, VoltaUNETR
from volta_components.downstream.start import (
    LoadPretrained,
    freeze_encoder,
    freeze_for,
    ids_as_trained,
    load_model,
    other_than_trained,
    pool_of,
    save_model,
    tuning_groups,
)
from volta_components.errors import InputError, find_input_error
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import load_encoder, save_encoder


def moved(network: nn.Module, image: torch.Tensor) -> set[str]:
    """Names of the parameters that one step of SGD changes."""
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    network(image).square().sum().backward()
    optimizer.step()
    return {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = VoltaViT(img_size=(32, 32, 32), decoder=False, **SIZES)
        self.head = nn.Linear(32, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(image))


@pytest.mark.parametrize("unfrozen", [0, 1, 2, 3])
def test_only_the_last_blocks_and_what_follows_them_move(unfrozen):
    network = Headed()
    freeze_encoder(network.encoder, unfrozen)
    names = moved(network, torch.rand(2, 1, 32, 32, 32))
    expected = {"head."}
    if unfrozen:
        expected |= {f"encoder.blocks.{index}." for index in range(3 - unfrozen, 3)}
        expected |= {"encoder.norm.", "encoder.summariser."}
    if unfrozen == 3:
        expected.add("encoder.patch_embedding.")
    for name, _ in network.named_parameters():
        trains = name.startswith(tuple(expected)) and "norm_cross_attn" not in name
        assert (name in names) == trains, name


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(InputError, match="the encoder has 3 blocks"):
        freeze_encoder(Headed().encoder, 4)


def test_the_start_is_frozen_at_once_and_loaded_when_the_training_starts(tmp_path):
    path = make_encoder(tmp_path / "encoder.safetensors", [])
    network = freeze_for(Headed(), "volta", 1)
    assert not network.encoder.blocks[0].attn.qkv.weight.requires_grad
    before = network.encoder.summariser.cls_token.clone()
    engine = Engine(lambda *_: None)
    load = LoadPretrained(network, "volta", path, tmp_path / "run" / "pretrained.txt")
    load.attach(engine)
    assert torch.equal(network.encoder.summariser.cls_token, before)
    engine.run([0])
    assert torch.equal(network.encoder.summariser.cls_token, load_encoder(path).summariser.cls_token)
    report = load.load()
    assert report is not None and sorted(report.missing) == ["head.bias", "head.weight"]
    text = (tmp_path / "run" / "pretrained.txt").read_text()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert f"{trained:,} of {sum(p.numel() for p in network.parameters()):,} parameters train" in text
    assert str(tmp_path) not in text
    assert "left  head.weight" in text and "loaded  encoder.summariser.cls_token" in text


def test_from_scratch_nothing_is_loaded_or_frozen(tmp_path):
    network = freeze_for(Headed(), "vit_scratch", 0)
    assert all(p.requires_grad for name, p in network.named_parameters() if "norm_cross_attn" not in name)
    assert LoadPretrained(network, "vit_scratch", tmp_path / "none").load() is None
    with pytest.raises(InputError, match="Linear has no encoder or vit"):
        freeze_for(nn.Linear(2, 2), "volta", 0)


def test_a_unetr_starts_from_a_whole_encoder_of_its_depth_and_heads_or_not_at_all(tmp_path):
    sizes: dict[str, Any] = {"feature_size": 4, "hidden_size": 32, "mlp_dim": 48}
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, VoltaViT(img_size=(32, 32, 32), decoder=False, **{**SIZES, "num_layers": 4}), {})
    unetr = VoltaUNETR(1, 3, (32, 32, 32), num_layers=4, num_heads=4, **sizes)
    report = LoadPretrained(freeze_for(unetr, "volta", 0), "volta", path).load()
    assert report is not None and report.loaded
    assert not any(p.requires_grad for p in unetr.vit.parameters())
    assert all(p.requires_grad for p in unetr.decoder2.parameters())
    # As many weights of the same shapes, but another function.
    with pytest.raises(InputError, match=r"another configuration(?s:.)*num_heads +4 +8"):
        LoadPretrained(VoltaUNETR(1, 3, (32, 32, 32), num_layers=4, num_heads=8, **sizes), "volta", path).load()
    stock = UNETR(1, 3, (32, 32, 32), num_heads=4, proj_type="conv", **sizes)
    with pytest.raises(InputError, match=r"another configuration(?s:.)*num_layers +4 +12"):
        LoadPretrained(stock, "volta", path).load()


def rates_of(groups: list[dict[str, Any]], network: nn.Module) -> dict[str, tuple[float, float, bool]]:
    """Rate, weight decay and mark of each parameter, by name; none may be in two groups."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found: dict[str, tuple[float, float, bool]] = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["rate"], group["weight_decay"], group["pretrained"])
    return found


@pytest.mark.parametrize("kind", ["classifier", "unetr"])
def test_deeper_layers_of_the_encoder_get_smaller_rates(kind):
    sizes = {**SIZES, "num_layers": 4}
    network: nn.Module
    if kind == "classifier":
        network, prefix = VoltaClassifier(2, (32, 32, 32), in_channels=1, **sizes), "encoder."
    else:
        del sizes["summary_heads"]
        network, prefix = VoltaUNETR(1, 3, (32, 32, 32), feature_size=4, **sizes), "vit."
    groups = tuning_groups(network, "volta", 0.01, encoder_rate=0.5, layer_decay=0.8)
    found = rates_of(groups, network)
    # 0.5 * 0.8 ** depth, by hand: four blocks lie between the final norm and the embeddings.
    expected = {
        f"{prefix}norm.": 0.5,
        f"{prefix}summariser.": 0.5,
        f"{prefix}blocks.3.": 0.4,
        f"{prefix}blocks.2.": 0.32,
        f"{prefix}blocks.1.": 0.256,
        f"{prefix}blocks.0.": 0.2048,
        f"{prefix}patch_embedding.": 0.16384,
    }
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert set(found) == trained
    for name, (rate, decay, pretrained) in found.items():
        want = next((value for start, value in expected.items() if name.startswith(start)), 1.0)
        assert rate == pytest.approx(want), name
        assert pretrained == name.startswith(prefix)
        plain = dict(network.named_parameters())[name].ndim <= 1 or name.endswith(("position_embeddings", "cls_token"))
        assert decay == (0.0 if plain else 0.01), name
    assert groups[0]["rate"] == 1.0  # what is logged as the learning rate


def test_only_what_trains_and_only_what_is_pretrained_has_a_rate_of_its_own():
    network = freeze_for(Headed(), "volta", 1)
    found = rates_of(tuning_groups(network, "volta", 0.0, 0.1), network)
    assert set(found) == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {rate for name, (rate, _, _) in found.items() if name.startswith("encoder.")} == {0.1}
    scratch = tuning_groups(Headed(), "vit_scratch", 0.01, 0.1, 0.5)
    assert len(scratch) == 2 and not any("rate" in group or "pretrained" in group for group in scratch)
    for wrong in ({"encoder_rate": 0.0}, {"layer_decay": 1.5}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} .*above 0 and at most 1"):
            tuning_groups(network, "volta", 0.0, **wrong)


def test_models_are_plain_tensors_with_a_record_and_load_whole_or_not_at_all(tmp_path):
    network = Headed()
    save_model(tmp_path / "model.pt", network, {"threshold": 0.3})
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(state) == set(network.state_dict())
    save_model(tmp_path / "again.pt", network, {"threshold": 0.3})
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "model.pt").read_bytes()
    other = Headed()
    assert load_model(other, tmp_path / "model.pt")["threshold"] == 0.3
    torch.testing.assert_close(other.head.weight, network.head.weight, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"another network(?s:.)*bias +- +\(2,\)") as caught:
        load_model(nn.Linear(32, 2), tmp_path / "model.pt")
    assert "tiny.json" in str(caught.value) and "of the bundle" not in str(caught.value)
    strangers = ({"bundle": "ixi_sex"}, "ixi_sex"), ({"network": {"summary_heads": 2}}, "pretrain, an encoder")
    for record, words in strangers:
        save_model(tmp_path / "stranger.pt", network, record)
        with pytest.raises(InputError, match=f"It is of the bundle {words}"):
            load_model(nn.Linear(32, 2), tmp_path / "stranger.pt")
    with pytest.raises(InputError, match="no such model"):
        load_model(other, tmp_path / "none.pt")
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="changed or cut"):
        load_model(other, tmp_path / "model.pt")


def test_a_classifiers_record_says_what_its_head_sees(tmp_path):
    sizes = {"img_size": (8, 8, 8), "patch_size": (4, 4, 4), "hidden_size": 16, "mlp_dim": 16, "num_layers": 1}
    for pool in ("mean", "summary"):
        network = VoltaClassifier(pool=pool, num_heads=2, summary_heads=2, **sizes)
        save_model(tmp_path / f"{pool}.pt", network, {})
        assert pool_of(tmp_path / f"{pool}.pt") == pool
    # What packing compares: a config that asks the record itself, and one that does not.
    asks = {"imports": ["$import volta_components.bundle as volta"], "pool": "$volta.pool_of(@model_path)"}
    for name, rows in (("mean", []), ("summary", [("pool", "mean", "summary")])):
        parser = ConfigParser({**asks, "model_path": str(tmp_path / f"{name}.pt")})
        assert other_than_trained({"pool": "mean"}, ids_as_trained(parser)) == rows
    assert other_than_trained({"pool": "mean"}, {"pool": "summary"}) == [("pool", "mean", "summary")]
    save_model(tmp_path / "other.pt", nn.Linear(3, 2), {})
    assert pool_of(tmp_path / "other.pt") == pool_of(tmp_path / "none.pt") == "summary"


def test_weights_are_not_used_under_other_settings_than_they_were_trained_with(tmp_path):
    settings = {"spacing": 2, "volume_size": [8, 8, 8], "classes": ["M", "F"], "epochs": 3}
    save_model(tmp_path / "model.pt", nn.Linear(3, 2), {"provenance": {"settings": settings}})

    def load(**ids):
        parser = ConfigParser(
            {
                "path": str(tmp_path / "model.pt"),
                "network": {"_target_": "torch.nn.Linear"} | {"in_features": 3, "out_features": 2},
                "imports": ["$from volta_components.downstream.start import load_model"],
                "model": "$load_model(@network, @path)",
                **ids,
            }
        )
        return parser.get_parsed_content("model")

    same = {"spacing": "$4 / 2", "volume_size": [8, 8, 8], "classes": ["M", "F"], "epochs": 5, "pool": "mean"}
    assert load(**same)["provenance"]["settings"] == settings
    assert load()["provenance"]["settings"] == settings
    told = (
        r"model\.pt was trained with other settings(?s:.)*spacing +2 +1\.0\n +classes +\['M', 'F'\] +\['CN', 'AD'\]\n"
    )
    with pytest.raises(RuntimeError) as caught:  # MONAI's
        load(**same | {"spacing": 1.0, "classes": ["CN", "AD"]})
    assert re.search(told, str(find_input_error(caught.value)))


def test_an_encoder_of_coarser_crops_is_not_used_at_the_spacing_of_its_volumes(tmp_path):
    settings = {"spacing": 1.0, "volume_size": [8, 16, 16], "global_size": [8, 8, 8], "global_extent_mm": [16, 16, 16]}
    save_model(tmp_path / "model.pt", nn.Linear(3, 2), {"provenance": {"settings": settings}})
    config = {
        "path": str(tmp_path / "model.pt"),
        "network": {"_target_": "torch.nn.Linear"} | {"in_features": 3, "out_features": 2},
        "imports": ["$from volta_components.downstream.start import load_model"],
        "model": "$load_model(@network, @path)",
        "global_size": [8, 8, 8],
    }
    wrong = {"spacing": 1.0, "volume_size": [8, 16, 16]}
    right = {"spacing": 2.0, "volume_size": [8, 8, 8]}
    ConfigParser(config | right).get_parsed_content("model")
    ConfigParser(config | right | {"grid": [[2.0, 2.0, 2.0], [8, 8, 8]]}).get_parsed_content("model")
    for other in (wrong, right | {"grid": [[1.0, 1.0, 1.0], [8, 16, 16]]}):  # a datalist has its own grid
        with pytest.raises(RuntimeError) as caught:
            ConfigParser(config | other).get_parsed_content("model")
        assert re.search(r"other settings(?s:.)*spacing +2\.0 +\[?1\.0", str(find_input_error(caught.value)))


def test_other_heads_than_those_trained_are_refused(tmp_path):
    sizes = {"img_size": (16, 16, 16), "hidden_size": 24, "mlp_dim": 24, "num_layers": 1, "decoder": False}
    save_encoder(tmp_path / "encoder.safetensors", VoltaViT(num_heads=2, summary_heads=2, **sizes), {})
    assert load_model(VoltaViT(num_heads=2, summary_heads=2, **sizes), tmp_path / "encoder.safetensors")
    with pytest.raises(InputError, match=r"other settings(?s:.)*num_heads +2 +4\n"):
        load_model(VoltaViT(num_heads=4, summary_heads=2, **sizes), tmp_path / "encoder.safetensors")
