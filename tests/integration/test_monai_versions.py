# SPDX-License-Identifier: Apache-2.0
"""State dicts of MONAI 1.5, which registers whole unused cross-attention blocks, of 1.6, and of neither: both ways.

What 1.5 adds to a block (``cross_attn.to_q``, ``to_k``, ``to_v`` and ``out_proj``) is written out here;
``tests/integration/test_monai_label.py`` has real files of both versions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.blocks import TransformerBlock
from monai.networks.nets import UNETR
from torch import Tensor, nn
from unpickled import Call

from volta_components.downstream.networks import VoltaClassifier, VoltaUNETR
from volta_components.downstream.start import freeze_encoder, load_model, save_model
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file, write_json
from volta_components.method.monai_versions import fit_cross_attention, settle_cross_attention
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import load_encoder, save_encoder
from volta_components.sharing.annotation import SaveModel, annotation_record, find_start

HIDDEN = 24
SIZES: dict[str, Any] = {
    "img_size": (32, 32, 32),
    "hidden_size": HIDDEN,
    "mlp_dim": 32,
    "num_layers": 4,
    "num_heads": 4,
}
NETWORKS = {
    "": lambda: VoltaViT(**SIZES, summary_heads=4),
    "vit.": lambda: VoltaUNETR(**SIZES, feature_size=4),
    "encoder.": lambda: VoltaClassifier(**SIZES, summary_heads=4),
}
NEW = {"cross_attn.to_q.weight": (HIDDEN, HIDDEN), "cross_attn.out_proj.bias": (HIDDEN,)}


def make(prefix: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[prefix]()


def without_cross_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "cross_attn" not in name}


def as_version(version: str, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A state dict as a version of MONAI would write it; ``none`` has no weights of cross-attention at all."""
    state = without_cross_attention(state)
    parts = {"1.5": {**NEW, "norm_cross_attn.weight": (HIDDEN,)}, "1.6": {"norm_cross_attn.weight": (HIDDEN,)}}
    for block in range(SIZES["num_layers"]):
        for name, shape in parts.get(version, {}).items():
            state[f"{prefix}blocks.{block}.{name}"] = torch.full(shape, 7.0)
    return state


@pytest.mark.parametrize("version", ["1.5", "1.6", "none"])
@pytest.mark.parametrize("prefix", list(NETWORKS))
def test_either_version_loads_strictly(prefix: str, version: str, tmp_path: Path) -> None:
    source, target = make(prefix, 1), make(prefix, 2).eval()
    state = as_version(version, source.state_dict(), prefix)
    before = set(state)
    # A copy of a network, as annotation servers make it, loads as the network does.
    twin = copy.deepcopy(target)
    path = tmp_path / "model.pt"
    torch.save(state, path)
    target.load_state_dict(state, strict=True)
    twin.load_state_dict({f"{name}": value for name, value in state.items()}, strict=True)
    loaded = make(prefix, 3).eval()
    load_model(loaded, path)
    assert set(state) == before  # the caller's own is left alone
    expected = without_cross_attention(source.state_dict())
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        outputs = [network(image) for network in (source.eval(), target, twin, loaded)]
    for network, output in zip((target, twin, loaded), outputs[1:], strict=True):
        found = without_cross_attention(network.state_dict())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=0)


@pytest.mark.parametrize("prefix", list(NETWORKS))
def test_other_keys_are_as_strict_as_ever(prefix: str, tmp_path: Path) -> None:
    """Including cross-attention outside of the blocks, and in a block that is not there."""
    network = make(prefix, 1)
    state = as_version("1.5", network.state_dict(), prefix)
    missing = {name: value for name, value in state.items() if "blocks.1.norm1.weight" not in name}
    odd = {f"{prefix}blocks.4.cross_attn.to_q.weight": torch.zeros(1), f"{prefix}cross_attn.x": torch.zeros(1)}
    cases = [missing, *({**state, name: value} for name, value in odd.items())]
    for number, changed in enumerate(cases):
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
            network.load_state_dict(changed)
        torch.save(changed, tmp_path / f"{number}.pt")
        with pytest.raises(InputError, match="weights of another network"):
            load_model(network, tmp_path / f"{number}.pt")


def test_cross_attention_that_is_used_is_needed() -> None:
    block = nn.Sequential(TransformerBlock(HIDDEN, 32, 4, with_cross_attention=True))
    settle_cross_attention(block)
    assert all(parameter.requires_grad for parameter in block.parameters())
    with pytest.raises(RuntimeError, match="cross_attn"):
        block.load_state_dict(without_cross_attention(block.state_dict()))


def test_unused_weights_are_frozen_and_stay_so() -> None:
    for prefix in NETWORKS:
        network = make(prefix, 1)
        encoder = network.get_submodule(prefix.rstrip(".")) if prefix else network
        for _ in range(2):
            unused = {name for name, p in network.named_parameters() if "cross_attn" in name}
            assert unused and not any(p.requires_grad for n, p in network.named_parameters() if n in unused)
            freeze_encoder(encoder, 2)


def test_an_encoder_of_either_version_is_whole(tmp_path: Path) -> None:
    network = make("", 1)
    assert isinstance(network, VoltaViT)
    path = tmp_path / "model.pt"
    save_encoder(tmp_path / "encoder.safetensors", network, {})
    record = read_json(tmp_path / "encoder.json")
    names = [name for name in network.state_dict() if not name.startswith("conv3d_transpose")]
    for version in ("1.5", "1.6", "none"):
        state = as_version(version, {name: network.state_dict()[name] for name in names}, "")
        torch.save(state, path)
        write_json(path.with_suffix(".json"), {**record, "sha256": sha256_file(path)})
        assert torch.equal(load_encoder(path).norm.weight, network.norm.weight)
    torch.save({name: value for name, value in state.items() if name != "norm.weight"}, path)
    write_json(path.with_suffix(".json"), record | {"sha256": sha256_file(path)})
    with pytest.raises(InputError, match="not a whole encoder"):
        load_encoder(path)


def test_a_stock_network_is_left_as_it_is() -> None:
    """Without ``settle_cross_attention`` nothing changes; ``fit_cross_attention`` alone makes a state dict fit."""
    stock = UNETR(1, 3, (32, 32, 32), hidden_size=HIDDEN, mlp_dim=32, num_heads=4, feature_size=4, proj_type="conv")
    state = as_version("1.5", stock.state_dict(), "vit.")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        stock.load_state_dict(state)
    stock.load_state_dict(fit_cross_attention(state, stock))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    network = make("vit.", 1)
    torch.save({**network.state_dict(), "x": Call(Path.touch, tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="could run code"):
        load_model(network, tmp_path / "model.pt")
    assert find_start(network, tmp_path) == {}
    assert not (tmp_path / "ran").exists()


# --- the record of a model that an annotation server trained -------------------------------------------------------


def scan(folder: Path, name: str) -> dict[str, str]:
    """Files that are hashed, not read."""
    folder.mkdir(exist_ok=True)
    item = {"image": str(folder / f"{name}.nii.gz"), "label": str(folder / f"{name}_label.nii.gz")}
    for key, path in item.items():
        Path(path).write_text(f"{name} {key}")
    return item


def test_the_start_is_found_by_its_weights(tmp_path: Path) -> None:
    network, other = make("vit.", 1), make("vit.", 2)
    save_model(tmp_path / "model.pt", other, {})
    save_model(tmp_path / "model_x.pt", network, {"tags": {"phantom": "true"}})
    found = find_start(network, tmp_path)
    assert (found["file"], found["sha256"]) == ("model_x.pt", sha256_file(tmp_path / "model_x.pt"))
    assert found["record"]["tags"] == {"phantom": "true"}
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert find_start(network, tmp_path) == {}


def test_the_record_tells_of_everybody_and_has_no_metrics(tmp_path: Path) -> None:
    from volta_components.training.people import patient_key

    items = [scan(tmp_path, f"sub-IXI{number:03d}_ses-1_T1w") for number in range(3)]
    before = {
        "tags": {"phantom": "true", "datalist_hash": "a"},
        "provenance": {"patient_ids": ["f" * 16], "datalist_hash": "a", "volumes": 9, "cohort": "phantom"},
        "metrics": {"mean_dice": 0.9},
    }
    start = {"file": "model.pt", "sha256": "s", "record": before}
    config = {"tags": {"datalist_hash": "empty", "phantom": "false"}, "provenance": {"monai_version": "1.5.2"}}
    record = annotation_record(config, start, items[:2], items[2:])
    assert record["started_from"] == {
        "file": "model.pt",
        "sha256": "s",
        "cohort": "phantom",
        "volumes": 9,
        "datalist_hash": "a",
    }
    keys = {patient_key(f"IXI{number:03d}") for number in range(3)}
    assert set(record["provenance"]["patient_ids"]) == {"f" * 16, *keys}
    assert record["provenance"]["monai_version"] == "1.5.2" and record["provenance"]["volumes"] == 9 + 3
    assert record["tags"]["phantom"] == "false" and record["tags"]["datalist_name"] == "annotated"
    assert record["subjects"] == {"training": 2, "validation": 1, "scored": 0, "unused": 0}
    assert "metrics" not in record
    again = annotation_record(config, start, items[::-1][:2], items[:1])
    assert again["provenance"]["datalist_hash"] == record["provenance"]["datalist_hash"]
    Path(items[0]["label"]).write_text("corrected")
    assert annotation_record(config, {}, items, [])["provenance"]["datalist_hash"] != record["tags"]["datalist_hash"]
    assert annotation_record(config, {}, items, [])["started_from"] is None
    second = annotation_record(config, {**start, "record": record}, items, [])
    assert second["started_from"]["started_from"] == record["started_from"]


def test_nothing_is_looked_for_where_no_model_is_kept() -> None:
    class NoModel:
        model_path = None

    saver = SaveModel(NoModel())  # type: ignore[arg-type]
    saver._started(None)
    assert saver._start == {}
