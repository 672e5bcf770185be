# SPDX-License-Identifier: Apache-2.0
"""Weights: what is written comes back, what is damaged or dangerous is refused, and every weight is accounted for."""

from __future__ import annotations

import hashlib
import json
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import HIDDEN, IMAGE, PATCH, TOKENS, flat, tiny_network
from monai.networks.nets import UNETR, ViT, ViTAutoEnc
from safetensors.torch import save_file
from scipy import ndimage
from small_files import error_of_a_full_disk
from torch import nn
from unpickled import Call

from volta_components.downstream.start import save_model
from volta_components.errors import InputError
from volta_components.files import sha256_file
from volta_components.method.weights import (
    LoadReport,
    find_encoder,
    load_encoder,
    load_pretrained,
    read_record,
    read_weights,
    save_encoder,
    trained_settings,
    write_weights,
)

POSITION = "patch_embedding.position_embeddings"


def saved(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "encoder.safetensors"
    network = tiny_network(3, **changes)
    with torch.no_grad():
        network.patch_embedding.position_embeddings.normal_()
    save_encoder(path, network, {"seed": 3})
    return path


def random_network(**changes: Any) -> Any:
    return tiny_network(11, **changes)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    network = tiny_network(3)
    path = tmp_path / "deep" / "encoder.safetensors"
    save_encoder(path, network, {"seed": 3})
    again = load_encoder(path)
    assert not again.training
    assert again.config == network.config
    expected = {name: value for name, value in flat(network).items() if not name.startswith("conv3d_transpose")}
    actual = flat(again)
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(value, actual[name]) for name, value in expected.items())
    image = torch.rand(1, 1, 12, 8, 12)
    with torch.no_grad():
        assert torch.equal(again(image), network.eval()(image))


def test_the_json_tells_what_the_weights_are(tmp_path: Path) -> None:
    path = saved(tmp_path)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["provenance"] == {"seed": 3}
    assert record["network"]["img_size"] == list(IMAGE)
    assert record["parameters"] == sum(value.size for value in flat(tiny_network(decoder=False)).values())


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for load in (load_encoder, read_weights, lambda p: load_pretrained(random_network(), p)):
        with pytest.raises(InputError, match=r"encoder\.safetensors: its SHA-256 is not that of encoder\.json"):
            load(path)


def packed(tmp_path: Path) -> Path:
    """The same encoder as a packed bundle has it: ``models/model.pt`` with its JSON."""
    path = saved(tmp_path)
    model = tmp_path / "bundle" / "models" / "model.pt"
    model.parent.mkdir(parents=True)
    torch.save(read_weights(path), model)
    record = json.loads(path.with_suffix(".json").read_text())
    model.with_suffix(".json").write_text(json.dumps({**record, "sha256": sha256_file(model)}))
    return model


def test_a_packed_encoder_loads_from_its_file_and_its_folders(tmp_path: Path) -> None:
    model = packed(tmp_path)
    expected = flat(load_encoder(tmp_path / "encoder.safetensors"))
    for place in (model, model.parent, model.parents[1], str(model.parents[1])):
        actual = flat(load_encoder(place))
        assert all(np.array_equal(value, actual[name]) for name, value in expected.items())
        assert load_pretrained(random_network(), place).resampled == []
    assert load_pretrained(random_network(img_size=(16, 8, 20)), model).resampled == [f"{POSITION} 2x3x3 -> 4x2x5"]
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    for load in (load_encoder, read_weights, lambda p: load_pretrained(random_network(), p)):
        with pytest.raises(InputError, match=r"model\.pt: its SHA-256 is not that of model\.json"):
            load(model)


def test_an_encoder_is_found_in_a_folder(tmp_path: Path) -> None:
    models = tmp_path / "bundle_v0.1.0" / "models"
    models.mkdir(parents=True)
    with pytest.raises(InputError, match=r"bundle_v0\.1\.0: no encoder in it \(encoder\.safetensors or model\.pt\)"):
        find_encoder(models.parent)
    with pytest.raises(InputError, match=r"no encoder in it \(encoder_a\.safetensors or model_a\.pt\)"):
        find_encoder(models, "_a")
    for name in ("model.pt", "encoder.safetensors", "model_a.pt"):
        (models / name).touch()
        suffix = "_a" if "_a" in name else ""
        assert find_encoder(models.parent, suffix) == find_encoder(models, suffix) == models / name
    assert find_encoder(models / "other.safetensors") == models / "other.safetensors"
    assert find_encoder(models / "model.pt") == models / "model.pt"
    for place in (tmp_path / "other", tmp_path / "other" / "models"):
        assert find_encoder(place, "_b", required=False) == tmp_path / "other" / "models" / "encoder_b.safetensors"


def test_other_networks_are_no_encoders(tmp_path: Path) -> None:
    path = tmp_path / "models" / "model.pt"
    save_model(path, Classifier(), {})
    with pytest.raises(InputError, match=r"model\.pt: a trained Classifier, not an encoder"):
        load_encoder(tmp_path)
    path.with_suffix(".json").write_text('{"network": {"hidden_size": 32, "colour": 3}}')
    with pytest.raises(InputError, match=r"model\.json: not an encoder's configuration .*colour"):
        load_encoder(tmp_path)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(InputError, match=r"model\.json: not the record of model\.pt"):
        read_weights(path)


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.ones(1000)}, whole)
    content = saved(tmp_path).read_bytes() if suffix == ".safetensors" else whole.read_bytes()
    path = tmp_path / f"weights{suffix}"
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"not found"}[damage])
    with pytest.raises(InputError, match=rf"weights\{suffix}: .*[fF]etch") as caught:
        read_weights(path)
    assert "weights_only" not in str(caught.value)  # PyTorch's advice is to load without protection


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_a_malicious_file_is_not_executed(tmp_path: Path, suffix: str, form: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / f"weights{suffix}"
    content = {"weight": torch.ones(2), "evil": Call(Path.touch, trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(InputError, match="weights"):
        read_weights(path)
    with pytest.raises(InputError, match="weights"):
        load_pretrained(random_network(), path)
    assert not trap.exists()
    if form == "pickle":  # the trap itself works
        pickle.loads(path.read_bytes())
        assert trap.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 10**9}, "num_layers  1000000000"),
        ({"hidden_size": 10**8}, "hidden_size  100000000"),
        ({"mlp_dim": 10**12}, "mlp_dim 1000000000000"),
        ({"img_size": [16 * 10**6] * 3}, "img_size"),
        ({"in_channels": 10**9}, "a network of"),
        ({"num_layers": -1}, "num_layers"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"patch_size": [16, 16]}, "patches of (16, 16)"),
    ],
)
def test_an_absurd_json_is_refused_before_memory_is_taken(
    tmp_path: Path, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    record = json.loads(path.with_suffix(".json").read_text())
    record["network"] |= changes
    path.with_suffix(".json").write_text(json.dumps(record))

    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("the network is being built")

    monkeypatch.setattr(ViTAutoEnc, "__init__", build)
    with pytest.raises(InputError) as caught:
        load_encoder(path)
    assert words in str(caught.value)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    """1.5 kB that say they are a tensor of 2^40 elements, in both formats."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "bomb.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1400))
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "bomb.pt")
    for name in ("bomb.safetensors", "bomb.pt"):
        with pytest.raises(InputError, match=rf"{name}: "):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    network = tiny_network(3)
    with torch.no_grad():
        network.norm.bias[0] = value
    save_encoder(tmp_path / "encoder.safetensors", network, {})
    with pytest.raises(InputError, match=r"encoder\.safetensors: 1 of its \d+ weights hold NaN .*norm\.bias"):
        load_encoder(tmp_path / "encoder.safetensors")


def test_an_encoder_s_spacing_is_that_of_its_crops(tmp_path: Path) -> None:
    settings = {"spacing": 1.0, "volume_size": [144, 192, 192], "global_size": [96, 96, 96]}
    own = {**settings, "global_extent_mm": [96, 96, 96]}
    coarse = {**settings, "global_extent_mm": [192, 192, 192]}
    uneven = {**settings, "global_extent_mm": [96, 192, 192]}
    for given, spacing, size in (
        (own, 1.0, [144, 192, 192]),
        (coarse, 2.0, [96] * 3),
        (uneven, [1.0, 2.0, 2.0], [96] * 3),
    ):
        found = trained_settings({"provenance": {"settings": given}})
        assert (found["spacing"], found["volume_size"]) == (spacing, size)
    assert trained_settings({"provenance": {"settings": settings}}) == settings
    assert trained_settings({}) == {}
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, tiny_network(3), {"settings": coarse})
    load_encoder(path)
    load_encoder(path, (2.0, 2.0, 2.0))
    with pytest.raises(InputError, match=r"trained at 2\.0 mm, for volumes of \[1\.0, 1\.0, 1\.0\] mm.*--spacing 2\.0"):
        load_encoder(path, (1.0, 1.0, 1.0))


def test_an_absent_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors: no such weights; run the pretraining first"):
        load_encoder(tmp_path / "none.safetensors")


def test_an_encoder_without_its_json_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"encoder\.json: no such file"):
        load_encoder(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(InputError, match=r"encoder\.json: has no network configuration"):
        load_encoder(path)


def test_plain_checkpoints_can_be_read(tmp_path: Path) -> None:
    state = tiny_network(3).state_dict()
    for number, content in enumerate((state, {"state_dict": state}, {"model": state, "epoch": 3})):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        assert read_weights(path).keys() == state.keys()
    torch.save({"epoch": 3}, tmp_path / "no.pt")
    with pytest.raises(InputError, match="holds no state dict of tensors"):
        read_weights(tmp_path / "no.pt")


def test_the_report_accounts_for_every_weight(tmp_path: Path) -> None:
    path = saved(tmp_path)
    expected = flat(load_encoder(path))
    network = random_network()
    before = flat(network)
    report = load_pretrained(network, path)
    after = flat(network)
    decoder = {name for name in before if name.startswith("conv3d_transpose")}
    assert (len(report.loaded), report.resampled, report.unused) == (len(before) - 4, [], [])
    assert set(report.missing) == decoder
    for name, value in after.items():
        assert np.array_equal(value, before[name] if name in decoder else expected[name]), name
    assert f"{len(before) - 4} weights loaded, 0 resampled, 4 of the network left as they were (conv3d" in str(report)


def test_stock_class_and_unetr(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 12, "num_heads": 2}
    path = saved(tmp_path, img_size=(32, 48, 48), patch_size=(16, 16, 16), **sizes)
    encoder = load_encoder(path)
    stock = ViTAutoEnc(1, (32, 48, 48), (16, 16, 16), proj_type="conv", **sizes)
    report = load_pretrained(stock, path)
    assert len(report.missing) == 4
    assert all(name.startswith("summariser.") for name in report.unused)
    assert len(report.unused) == 12
    assert len(report.loaded) == len(stock.state_dict()) - 4
    unetr = UNETR(1, 3, (32, 48, 48), hidden_size=24, mlp_dim=32, num_heads=2, feature_size=4, proj_type="conv")
    report = load_pretrained(unetr, path, prefix="vit.")
    assert not [name for name in report.missing if name.startswith("vit.")]
    assert len(report.loaded) == len(unetr.vit.state_dict())
    image = torch.rand(1, 1, 32, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(unetr.eval().vit(image)[0], encoder.encode(image), atol=1e-5, rtol=1e-4)


def resampled(embedding: np.ndarray, grid: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray:
    volume = embedding.reshape(*grid, -1)
    indices = [np.clip((np.arange(n) + 0.5) * g / n - 0.5, 0, g - 1) for g, n in zip(grid, new)]
    mesh = np.meshgrid(*indices, indexing="ij")
    channels = [ndimage.map_coordinates(volume[..., i], mesh, order=1) for i in range(volume.shape[-1])]
    return np.stack(channels, axis=-1).reshape(1, -1, volume.shape[-1])


def test_another_grid_is_resampled(tmp_path: Path) -> None:
    path = saved(tmp_path)
    network = random_network(img_size=(16, 8, 20))
    report = load_pretrained(network, path)
    assert report.resampled == [f"{POSITION} 2x3x3 -> 4x2x5"]
    assert POSITION not in report.loaded
    expected = resampled(flat(load_encoder(path))[POSITION], (2, 3, 3), (4, 2, 5))
    np.testing.assert_allclose(flat(network)[POSITION], expected, atol=1e-5)


def test_grids_of_as_many_tokens_but_another_shape_are_resampled(tmp_path: Path) -> None:
    """2 x 3 x 3 and 3 x 3 x 2 both have 18 tokens: the tensors fit, the positions do not."""
    path = saved(tmp_path)
    network = random_network(img_size=(12, 12, 8))
    report = load_pretrained(network, path)
    assert report.resampled == [f"{POSITION} 2x3x3 -> 3x3x2"]
    expected = resampled(flat(load_encoder(path))[POSITION], (2, 3, 3), (3, 3, 2))
    np.testing.assert_allclose(flat(network)[POSITION], expected, atol=1e-5)
    # The same where the caller gives the target's grid.
    stock = ViTAutoEnc(1, IMAGE, (4, 4, 4), hidden_size=32, mlp_dim=48, num_layers=2, num_heads=4, proj_type="conv")
    assert load_pretrained(stock, path, grid=(3, 2, 3)).resampled == [f"{POSITION} 2x3x3 -> 3x2x3"]


def test_a_module_that_does_not_tell_its_grid(tmp_path: Path) -> None:
    """MONAI's ``ViT`` alone: as many tokens are taken as they are; more or fewer need a grid."""
    sizes: dict[str, Any] = {"hidden_size": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "proj_type": "conv"}
    path = saved(tmp_path)
    assert load_pretrained(ViT(1, IMAGE, PATCH, **sizes), path).resampled == []
    with pytest.raises(InputError, match="ViT: the token grid of 12 position embeddings is not known"):
        load_pretrained(ViT(1, (8, 8, 12), PATCH, **sizes), path)
    report = load_pretrained(ViT(1, (8, 8, 12), PATCH, **sizes), path, grid=(2, 2, 3))
    assert report.resampled == [f"{POSITION} 2x3x3 -> 2x2x3"]


def test_unetr_of_another_size(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
    path = saved(tmp_path, img_size=(32, 48, 48), patch_size=(16, 16, 16), num_layers=12, **sizes)
    unetr = UNETR(1, 3, (64, 32, 48), feature_size=4, proj_type="conv", **sizes)
    report = load_pretrained(unetr, path, prefix="vit.")
    assert report.resampled == [f"vit.{POSITION} 2x3x3 -> 4x2x3"]
    cube = UNETR(1, 3, (48, 48, 48), feature_size=4, proj_type="conv", **sizes)
    assert load_pretrained(cube, path, prefix="vit.").resampled == [f"vit.{POSITION} 2x3x3 -> 3x3x3"]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = random_network(decoder=False, img_size=(8, 8, 8))
        self.head = nn.Linear(HIDDEN, 2)


def test_an_encoder_inside_a_classifier(tmp_path: Path) -> None:
    path, model = saved(tmp_path), Classifier()
    report = load_pretrained(model, path, prefix="encoder.")
    assert sorted(report.missing) == ["head.bias", "head.weight"]
    assert report.resampled == [f"encoder.{POSITION} 2x3x3 -> 2x2x2"]
    assert np.array_equal(flat(model)["encoder.norm.weight"], flat(load_encoder(path))["norm.weight"])


def test_no_matching_key_at_all_is_an_error(tmp_path: Path) -> None:
    path, network = saved(tmp_path), random_network()
    before = flat(network)
    with pytest.raises(InputError, match=r"none of its \d+ weights has a place in VoltaViT under the prefix 'vit\.'"):
        load_pretrained(network, path, prefix="vit.")
    assert all(np.array_equal(value, before[name]) for name, value in flat(network).items())
    with pytest.raises(InputError, match="none of its"):
        load_pretrained(nn.Linear(2, 2), path)


def test_weights_of_another_width_are_listed(tmp_path: Path) -> None:
    path, network = saved(tmp_path), random_network(mlp_dim=40)
    before = flat(network)
    with pytest.raises(InputError, match=r"another size[^$]*blocks\.0\.mlp\.linear1\.weight +\(48, 32\) +\(40, 32\)"):
        load_pretrained(network, path)
    assert all(np.array_equal(value, before[name]) for name, value in flat(network).items())


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"num_heads": 2}, r"num_heads +4 +2"),
        ({"summary_heads": 4}, r"summary_heads +2 +4"),
        ({"num_layers": 3}, r"num_layers +2 +3"),
    ],
)
def test_an_encoder_of_another_configuration_is_refused(tmp_path: Path, changes: dict[str, int], row: str) -> None:
    """Heads change no weight's shape: all would load, and compute something else."""
    path, network = saved(tmp_path), random_network(**changes)
    before = flat(network)
    with pytest.raises(InputError, match=rf"an encoder of another configuration(?s:.)*{row}"):
        load_pretrained(network, path)
    assert all(np.array_equal(value, before[name]) for name, value in flat(network).items())


def test_an_encoder_with_a_weight_missing_is_refused(tmp_path: Path) -> None:
    """Without a JSON, too: a checkpoint of two blocks into three."""
    path = tmp_path / "plain.pt"
    torch.save(tiny_network(3).state_dict(), path)
    with pytest.raises(InputError, match=r"not a whole encoder: it lacks \d+ weights(?s:.)*blocks\.2\."):
        load_pretrained(random_network(num_layers=3), path)
    state = {name: value for name, value in tiny_network(3).state_dict().items() if "summariser" not in name}
    torch.save(state, path)
    with pytest.raises(InputError, match=r"it lacks 12 weights(?s:.)*summariser\.cls_token"):
        load_pretrained(random_network(), path)


def test_ctrl_c_while_writing_leaves_weights_and_record_that_belong_together(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    write_weights(path, {"a": torch.ones(2)}, lambda target: save_file({"a": torch.ones(2)}, target), {"epoch": 1})

    def interrupted(target: Path) -> None:
        save_file({"a": torch.zeros(2)}, target)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write_weights(path, {"a": torch.zeros(2)}, interrupted, {"epoch": 2})
    assert read_weights(path)["a"].tolist() == [0, 0]
    assert read_record(path)["epoch"] == 2

    def failing(target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_weights(path, {"a": torch.zeros(2)}, failing, {"epoch": 3})
    assert read_weights(path)["a"].tolist() == [0, 0]
    assert read_record(path)["epoch"] == 2
    assert sorted(item.name for item in tmp_path.iterdir()) == ["encoder.json", "encoder.safetensors"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """safetensors raises an error of its own, in a process that may write no more than 10,000 bytes to a file."""
    setup = (
        "import torch\nfrom safetensors.torch import save_file\n"
        "from volta_components.method.weights import write_weights\nstate = {'a': torch.zeros(10_000)}"
    )
    call = "write_weights(path, state, lambda target: save_file(state, target), {})"
    path = tmp_path / "encoder.safetensors"
    assert error_of_a_full_disk(10_000, setup, call, path) == f"{path}: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_grid_that_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    """A checkpoint without a JSON, of 18 tokens, into 8: which grid had it?"""
    path = tmp_path / "plain.pt"
    torch.save(tiny_network(3).state_dict(), path)
    with pytest.raises(InputError, match=f"the token grid of {TOKENS} position embeddings is not known"):
        load_pretrained(random_network(img_size=(8, 8, 8)), path)
    assert load_pretrained(random_network(), path).resampled == []


def test_an_empty_report_is_readable() -> None:
    assert str(LoadReport("x")).startswith("x: 0 weights loaded, 0 resampled, 0 of the network")
