# SPDX-License-Identifier: Apache-2.0
"""``volta3d pack``: what is in the zip, that it is reproducible, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from packed import BUNDLES, ROOT, names_of, random_weights, unpack

from volta_components import __version__
from volta_components.cli import main
from volta_components.downstream.leaks import check_origin
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.method.weights import read_weights
from volta_components.sharing.pack import (
    absolute_path,
    assemble,
    check_paths,
    pack_bundle,
    write_zip,
)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_one_top_folder_with_what_a_bundle_needs(packed: Path, bundle: str) -> None:
    name = f"{bundle}_phantom_tiny"
    found = set(names_of(packed / f"{name}_v{__version__}.zip"))
    assert {entry.split("/")[0] for entry in found} == {name}
    needed = (
        "LICENSE",
        "configs/metadata.json",
        "configs/inference.json",
        "configs/train.json",
        "configs/logging.conf",
    )
    needed += ("docs/README.md", "docs/data_license.txt", "models/model.pt", "models/model.json")
    assert {f"{name}/{entry}" for entry in needed} <= found
    # The overlay is part of the configs now, and the folder has nothing of anybody's runs.
    assert not [entry for entry in found if "tiny.json" in entry or "/runs/" in entry or "/eval/" in entry]


def test_the_same_content_gives_the_same_bytes(
    weights: dict[str, Path], packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another folder, file times and permissions, another order of directory entries, another hour."""
    copy = tmp_path / "elsewhere" / "pretrain"
    shutil.copytree(ROOT / "bundles" / "pretrain", copy, ignore=shutil.ignore_patterns("models", "runs", "eval"))
    for number, path in enumerate(sorted(copy.rglob("*"), reverse=True)):
        os.utime(path, (1e9 + number, 1e9 + number))
        if path.is_file():
            path.chmod(0o600)
    time.sleep(2.1)  # zip's clock ticks every two seconds
    again = pack_bundle(copy, tmp_path / "out", ["tiny"], model=weights["pretrain"])
    assert again.path.read_bytes() == (packed / again.path.name).read_bytes()
    pack_bundle(copy, tmp_path / "out", ["tiny"], model=weights["pretrain"])
    assert "replaces one" not in capsys.readouterr().out
    (copy / "docs" / "README.md").write_text("# Another card\n")
    pack_bundle(copy, tmp_path / "out", ["tiny"], model=weights["pretrain"])
    assert f"{again.path}: replaces one of other content ({again.sha256[:8]}...)" in capsys.readouterr().out


def test_nothing_depends_on_a_version_of_zlib(packed: Path) -> None:
    for path in packed.glob("*.zip"):
        with zipfile.ZipFile(path) as zipped:
            assert {entry.compress_type for entry in zipped.infolist()} == {zipfile.ZIP_STORED}


def test_hidden_files_stay_out(weights: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "ixi_sex"
    shutil.copytree(ROOT / "bundles" / "ixi_sex", bundle, ignore=shutil.ignore_patterns("models", "runs", "eval"))
    for folder in ("docs", "configs"):
        (bundle / folder / ".DS_Store").write_bytes(b"\x00\xff\xfe")
        (bundle / folder / "._train.json").write_bytes(b"\x00\xff\xfe")
    result = pack_bundle(bundle, tmp_path / "out", ["tiny"], model=weights["ixi_sex"])
    assert not [name for name in names_of(result.path) if "/." in name]


def test_hashes_are_those_that_other_tools_compute(packed: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=packed, check=True, capture_output=True)
    info = read_json(packed / "model_info.json")
    assert sorted(info) == sorted(f"{bundle}_phantom_tiny_v{__version__}" for bundle in BUNDLES)
    for name, entry in info.items():
        assert entry["checksum"] == hashlib.sha1((packed / f"{name}.zip").read_bytes()).hexdigest()
        assert entry["source"] == f"https://host.example/x/{name}.zip"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_configs_fit_the_weights(packed: Path, weights: dict[str, Path], tmp_path: Path, bundle: str) -> None:
    """The packed configs alone build the network of the overlay, and it takes the weights."""
    folder = unpack(packed / f"{bundle}_phantom_tiny_v{__version__}.zip", tmp_path)
    state = torch.load(folder / "models" / "model.pt", weights_only=True)
    original = read_weights(weights[bundle])
    assert state.keys() == original.keys() and all(torch.equal(state[name], original[name]) for name in state)
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    assert parser["bundle_root"] == "."
    parser["bundle_root"] = str(folder)
    network = parser.get_parsed_content("network_def")
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in state.items()}
    metadata = read_json(folder / "configs" / "metadata.json")
    assert "phantom" in metadata["name"] and "phantom" in metadata["description"]
    shape = metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]
    channels = metadata["network_data_format"]["outputs"]["pred"]["num_channels"]
    image = torch.rand(1, 1, *(32 if isinstance(side, str) else side for side in shape))
    with torch.inference_mode():
        assert network.eval()(image).shape[1] == channels
    assert read_json(folder / "configs" / "train.json")["hidden_size"] == 192


def test_the_metadata_count_no_choice_as_a_metric(weights: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    shutil.copy(weights["ixi_sex"], model)
    record = read_json(weights["ixi_sex"].with_suffix(".json"))
    record["metrics"] = {"auroc": 0.75, "threshold": 0.5, "epoch": 7.0, "optimistic_threshold": 0.2}
    write_json(model.with_suffix(".json"), record)
    packed = pack_bundle(ROOT / "bundles" / "ixi_sex", tmp_path / "out", ["tiny"], model=model)
    path = unpack(packed.path, tmp_path) / "configs" / "metadata.json"
    assert read_json(path)["eval_metrics"] == {"auroc": 0.75}
    assert path.read_text().splitlines()[1].startswith('    "')


def test_what_ids_of_an_overlay_are_not_the_inference_configs_stay_out(packed: Path, tmp_path: Path) -> None:
    folder = unpack(packed / f"ixi_sex_phantom_tiny_v{__version__}.zip", tmp_path)
    inference = read_json(folder / "configs" / "inference.json")
    assert not {"epochs", "learning_rate", "swin_depths"} & inference.keys()
    assert (inference["suffix"], inference["spacing"], inference["image_size"]) == ("", 3.0, [48, 64, 64])
    assert read_json(folder / "configs" / "vit_scratch.json") == read_json(
        ROOT / "bundles" / "ixi_sex" / "configs" / "vit_scratch.json"
    )


def test_a_baselines_weights_bring_their_network_along(tmp_path: Path) -> None:
    from monai.networks.nets import UNet

    from volta_components.downstream.start import save_model

    torch.manual_seed(0)
    unet = UNet(3, 1, 3, (8, 16, 32, 64, 128), (2, 2, 2, 2), num_res_units=2)
    model = tmp_path / "model_unet_scratch_phantom_tiny.pt"
    record = {"provenance": {"datalist_hash": "0", "code_version": "0", "settings": {}, "volumes": 1}}
    save_model(model, unet, record)
    folder = assemble(ROOT / "bundles" / "harp_hippocampus", tmp_path / "unet_tiny", ["unet_scratch", "tiny"], model)
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser.get_parsed_content("network_def").load_state_dict(torch.load(folder / "models" / "model.pt"))


def test_an_overlay_that_is_not_named_is_missed(
    weights: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / weights["pretrain"].name
    shutil.copy(weights["pretrain"], model)
    record = read_json(weights["pretrain"].with_suffix(".json"))
    tiny = read_json(ROOT / "bundles" / "pretrain" / "configs" / "tiny.json")
    koleo = {"koleo_loss.class": "KoLeoLoss", "koleo_loss.queue_size": 256}
    record["provenance"]["settings"] |= {"epochs": tiny["epochs"], **koleo}
    write_json(model.with_suffix(".json"), record)
    said = {}
    for overlays in ("tiny", "koleo,tiny"):
        arguments = ["pack", "--bundle", str(ROOT / "bundles" / "pretrain"), "--output", str(tmp_path / "packed")]
        assert main([*arguments, "--overlays", overlays, "--model", str(model)]) == 0
        said[overlays] = re.search(r"other values of ([\w., ]+) than", capsys.readouterr().out)
    assert said["tiny"] is not None and "koleo" in said["tiny"][1] and "epochs" not in said["tiny"][1]
    assert said["koleo,tiny"] is None or "koleo" not in said["koleo,tiny"][1]


def test_weights_of_an_overlay_with_paths_are_packed_without_it(weights: dict[str, Path], tmp_path: Path) -> None:
    """``token_centre.json`` sets ``patch_loss#token_centre_momentum``; the card lists that setting."""
    bundle, model = ROOT / "bundles" / "pretrain", tmp_path / weights["pretrain"].name
    shutil.copy(weights["pretrain"], model)
    record = read_json(weights["pretrain"].with_suffix(".json"))
    record["provenance"]["settings"] |= {"patch_loss.token_centre_momentum": 0.9}
    write_json(model.with_suffix(".json"), record)
    with pytest.raises(InputError, match=r"patch_loss#token_centre_momentum cannot be merged; .*--model FILE"):
        pack_bundle(bundle, tmp_path / "out", ["token_centre", "tiny"], model=model)
    packed = pack_bundle(bundle, tmp_path / "out", ["tiny"], model=model)
    assert "patch_loss.token_centre_momentum" in packed.other_settings


def test_nothing_personal_is_inside(packed: Path, tmp_path: Path) -> None:
    for bundle in BUNDLES:
        folder = unpack(packed / f"{bundle}_phantom_tiny_v{__version__}.zip", tmp_path)
        check_paths(folder)
        content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        for own in (str(ROOT), str(Path.home()), str(tmp_path.parent)):
            assert len(own) < 6 or own.encode() not in content


def test_a_personal_path_in_the_weights_record_is_refused(tmp_path: Path) -> None:
    model = random_weights("ixi_sex", tmp_path / "weights", dataset_dir="/home/somebody/study")
    with pytest.raises(InputError, match=r"models/model\.json:\d+ +\"/home/somebody/study(?s:.)*beside the weights"):
        pack_bundle(ROOT / "bundles" / "ixi_sex", tmp_path / "out", ["tiny"], model=model)
    assert not list((tmp_path / "out").iterdir())


def test_a_personal_path_in_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("fine: data/ixi\nscans in /home/jane/scans\n")
    (tmp_path / "a.json").write_text('{"x": [1, "C:\\\\Users\\\\jane"],\n"dataset_dir": "/gpfs"}')
    (tmp_path / "ok.txt").write_text("https://example.org/home/x and bundles/pretrain and 1/2\n")
    with pytest.raises(InputError) as error:
        check_paths(tmp_path)
    for place in ("docs/README.md:2 ", "a.json:1 ", "a.json:2 "):
        assert place in str(error.value)
    assert "ok.txt" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "/gpfs/project/ixi",
        "/Volumes/My",
        "/nfs",
        "see /lustre/x/y.nii for it",
        "(/mnt/scans/)",
        "file:///home/jane/x",
        "sqlite:////gpfs/runs/mlruns.db",
        "D:\\scans\\a.nii",
        "D:/scans/a.nii",
        "\\\\server\\share\\x",
        "$'/gpfs/x/' + @name",
        "$os.path.join('/data/y', @name)",
        "~/scans and /opt/a/b",
        "~/adni/x",
        "see ~/.cache/x for it",
        "$'~jane/adni/' + @name",
        "$@x + '/home/jane/y'",
        "$@x+'/mnt/adni'",
    ],
)
def test_absolute_paths_are_found(text: str) -> None:
    assert absolute_path(json.dumps({"id": text}))
    if " " in text:
        assert absolute_path(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://project-monai.github.io/schema/x.json",
        "http://127.0.0.1:5000/a/b",
        "sqlite:///bundles/x/mlruns.db",
        "sex and/or age, 1/7.6 of it, 5 / 3, mm/s",
        "$@bundle_root + '/models'",
        "$@ckpt_dir + '/model' + ('' if @init == 'volta' else '_' + @init) + @suffix + '.pt'",
        "$@output_dir + '/attention' if @save_attention else None",
        "bundles/pretrain/models and ../data/x",
        "/dev/shm/x",
        "https://people.example.org/~jane/x",
        "about ~5/6 of it, ~ 1/2",
        "$@bundle_root + '/data/x'",
        "volta3d prepare --source /path/to/bids",
        "--config_file \"['.../train.json','.../evaluate.json']\"",
        "/",
        "a: b",
    ],
)
def test_what_is_no_path_is_left(text: str) -> None:
    assert absolute_path(json.dumps({"id": text})) is None and absolute_path(text) is None


def test_large_files_are_hosted_beside_the_zip(weights: dict[str, Path], tmp_path: Path) -> None:
    result = pack_bundle(
        ROOT / "bundles" / "pretrain",
        tmp_path,
        ["tiny"],
        model=weights["pretrain"],
        large_files="https://host.example/weights/",
    )
    (hosted,) = result.hosted
    assert not [name for name in names_of(result.path) if name.endswith(".pt")]
    folder = unpack(result.path, tmp_path / "unpacked")
    assert yaml.safe_load((folder / "large_files.yml").read_text()) == {
        "large_files": [
            {
                "path": "models/model.pt",
                "url": f"https://host.example/weights/{hosted.name}",
                "hash_val": hashlib.sha256(hosted.read_bytes()).hexdigest(),
                "hash_type": "sha256",
            }
        ]
    }
    assert (folder / "models" / "model.json").is_file()
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)


def test_hashes_of_files_that_are_gone_go_too(weights: dict[str, Path], tmp_path: Path) -> None:
    model, bundle = weights["pretrain"], ROOT / "bundles" / "pretrain"
    first = pack_bundle(bundle, tmp_path, ["tiny"], "first_phantom", model=model).path
    other = pack_bundle(bundle, tmp_path, ["tiny"], "other_phantom", model=model).path
    first.unlink()
    last = pack_bundle(bundle, tmp_path, ["tiny"], "last_phantom", model=model).path
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True, capture_output=True)
    names = [line.split("  ")[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()]
    assert names == [last.name, other.name]


def test_zip_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a.txt").write_text("x" * 1000)
    write_zip(folder, tmp_path / "b.zip")
    before = (tmp_path / "b.zip").read_bytes()
    (folder / "a.txt").write_text("y")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    (folder / "unreadable").mkdir()

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("volta_components.sharing.pack.shutil.copyfileobj", broken)
    with pytest.raises(OSError, match="disk full"):
        write_zip(folder, tmp_path / "b.zip")
    assert (tmp_path / "b.zip").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.zip", "bundle"]


class TestRefused:
    def copy(self, tmp_path: Path, bundle: str = "ixi_sex") -> Path:
        target = tmp_path / bundle
        shutil.copytree(ROOT / "bundles" / bundle, target, ignore=shutil.ignore_patterns("models", "runs", "eval"))
        return target

    def change(self, path: Path, **changes: Any) -> None:
        path.write_text(json.dumps(read_json(path) | changes))

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"models/model_phantom_tiny.pt: no such weights; train them first"):
            pack_bundle(self.copy(tmp_path), tmp_path / "out", ["tiny"])
        assert not list((tmp_path / "out").iterdir())

    def test_not_a_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no configs/metadata\.json"):
            pack_bundle(tmp_path, tmp_path / "out")

    def test_version_without_a_changelog(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        bundle = self.copy(tmp_path)
        self.change(bundle / "configs" / "metadata.json", version="99.0.0")
        with pytest.raises(InputError, match=r"changelog says nothing of version 99\.0\.0"):
            pack_bundle(bundle, tmp_path / "out", ["tiny"], model=weights["ixi_sex"])

    def test_changed_weights(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        for suffix in (".pt", ".json"):
            shutil.copy(weights["ixi_sex"].with_suffix(suffix), tmp_path / f"model{suffix}")
        content = bytearray((tmp_path / "model.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.pt: its SHA-256 is not that of model\.json"):
            pack_bundle(self.copy(tmp_path), tmp_path / "out", ["tiny"], model=tmp_path / "model.pt")

    def test_weights_without_provenance(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        shutil.copy(weights["ixi_sex"], tmp_path / "model.pt")
        with pytest.raises(InputError, match=r"model\.json: missing; weights without provenance"):
            pack_bundle(self.copy(tmp_path), tmp_path / "out", ["tiny"], model=tmp_path / "model.pt")

    def test_unknown_overlay(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        with pytest.raises(InputError, match=r"tinny\.json: no such overlay; this bundle has .*tiny"):
            pack_bundle(self.copy(tmp_path), tmp_path / "out", ["tinny"], model=weights["ixi_sex"])

    def test_name_that_is_no_folder(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        with pytest.raises(InputError, match="letters, digits and _ only"):
            pack_bundle(self.copy(tmp_path), tmp_path / "out", ["tiny"], name="../x y", model=weights["ixi_sex"])

    def test_a_personal_path_in_the_card(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        bundle = self.copy(tmp_path)
        (bundle / "docs" / "notes.md").write_text("see /Users/jane/notes\n")
        with pytest.raises(InputError, match=r"docs/notes\.md:1"):
            pack_bundle(bundle, tmp_path / "out", ["tiny"], model=weights["ixi_sex"])
        assert not list((tmp_path / "out").iterdir())

    def test_a_path_in_an_overlay_that_is_merged(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        bundle = self.copy(tmp_path)
        (bundle / "configs" / "ours.json").write_text('{"dataset_dir": "/gpfs/clinic"}')
        with pytest.raises(InputError, match=r"configs/train\.json:\d+ +\"/gpfs/clinic"):
            pack_bundle(bundle, tmp_path / "out", ["tiny", "ours"], model=weights["ixi_sex"])

    def test_text_in_another_encoding(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        bundle = self.copy(tmp_path)
        (bundle / "docs" / "notes.txt").write_bytes("Prüfung".encode("latin-1"))
        with pytest.raises(InputError, match=r"docs/notes\.txt: not text in UTF-8 .* at byte 2\); save it as UTF-8"):
            pack_bundle(bundle, tmp_path / "out", ["tiny"], model=weights["ixi_sex"])

    @pytest.mark.parametrize("bundle", BUNDLES)
    def test_configs_of_another_network(self, tmp_path: Path, weights: dict[str, Path], bundle: str) -> None:
        with pytest.raises(InputError, match=r"does not fit the configs with no overlays; name those .*--overlays"):
            pack_bundle(ROOT / "bundles" / bundle, tmp_path / "out", model=weights[bundle])
        assert not list((tmp_path / "out").iterdir())

    def test_configs_of_another_spacing(self, tmp_path: Path) -> None:
        """The network's weights have the same shapes at any spacing."""
        model = random_weights("ixi_sex", tmp_path / "weights", spacing=2.0, image_size=[48, 64, 64])
        with pytest.raises(InputError, match=r"does not fit[^$]*spacing +2\.0 +3\.0") as error:
            pack_bundle(ROOT / "bundles" / "ixi_sex", tmp_path / "out", ["tiny"], model=model)
        assert "image_size" not in str(error.value)

    def test_phantoms_under_a_name_that_hides_them(self, tmp_path: Path, weights: dict[str, Path]) -> None:
        with pytest.raises(InputError, match=r"trained on phantoms, but the name sex_of_patients does not say so"):
            pack_bundle(
                self.copy(tmp_path), tmp_path / "out", ["tiny"], name="sex_of_patients", model=weights["ixi_sex"]
            )

    def test_neither_bundle_nor_all(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main(["pack", "--output", str(tmp_path)]) == 2
        assert "give one bundle (--bundle bundles/NAME) or --all" in capsys.readouterr().err


def test_all_packs_what_there_is_and_says_what_is_left_out(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for bundle in ("pretrain", "ixi_sex"):
        target = tmp_path / "bundles" / bundle
        shutil.copytree(ROOT / "bundles" / bundle, target, ignore=shutil.ignore_patterns("models", "runs", "eval"))
    (tmp_path / "bundles" / "pretrain" / "models").mkdir()
    for suffix in (".safetensors", ".json"):
        shutil.copy(weights["pretrain"].with_suffix(suffix), tmp_path / "bundles" / "pretrain" / "models")
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "--all", "--overlays", "tiny", "--output", "dist"]) == 1
    assert sorted(path.name for path in Path("dist").iterdir()) == [
        "SHA256SUMS",
        "model_info.json",
        f"pretrain_phantom_tiny_v{__version__}.zip",
    ]
    assert "left out: ixi_sex: bundles/ixi_sex/models/model_phantom_tiny.pt: no such weights" in capsys.readouterr().out


def test_hashes_of_people_are_sealed_with_a_secret_that_stays_in_the_lab(
    weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "lab" / "secret"
    monkeypatch.setenv("VOLTA3D_SECRET", str(secret))
    plain = read_json(weights["pretrain"].with_suffix(".json"))["provenance"]
    bundle = ROOT / "bundles" / "pretrain"
    folder = unpack(pack_bundle(bundle, tmp_path / "out", ["tiny"], model=weights["pretrain"]).path, tmp_path)
    everything = b"".join(path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".pt")
    assert len(plain["patient_ids"]) == 6
    assert not [key for key in plain["patient_ids"] + plain["look_alike_ids"] if key.encode() in everything]
    assert secret.read_bytes().strip() not in everything
    card = " ".join((folder / "docs" / "README.md").read_text().split())
    assert "6 subjects" in card and "elsewhere, nothing warns if a training subject is scored" in card
    # The lab's own guard still works, in any spelling.
    encoder = folder / "models" / "model.pt"
    with pytest.raises(InputError, match="1 of the 1 scored"):
        check_origin("volta", encoder, [{"patient_id": "sub-003"}])
    with pytest.raises(InputError, match="ids that look like"):
        check_origin("volta", encoder, [{"patient_id": "SUB_3"}])
    assert check_origin("volta", encoder, [{"patient_id": "sub-777"}]).leak == "none"
    # Packed again, also by another lab, it stays sealed; that lab's guard does not know.
    secret.write_text("another lab" * 5)
    with pytest.raises(InputError, match="6 subjects that another lab has sealed"):
        check_origin("volta", encoder, [{"patient_id": "sub-777"}])
    again = pack_bundle(folder, tmp_path / "again", name="pretrain_phantom_again")
    record = read_json(unpack(again.path, tmp_path / "b") / "models" / "model.json")
    assert record["provenance"] == read_json(folder / "models" / "model.json")["provenance"]


def test_hashes_of_people_stay_where_that_is_asked_for(weights: dict[str, Path], tmp_path: Path) -> None:
    words = [
        "--bundle",
        str(ROOT / "bundles" / "harp_hippocampus"),
        "--overlays",
        "tiny",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["pack", *words, "--model", str(weights["harp_hippocampus"]), "--plain-hashes"]) == 0
    folder = unpack(next((tmp_path / "o").glob("*.zip")), tmp_path)
    before, after = (
        read_json(path) for path in (weights["harp_hippocampus"].with_suffix(".json"), folder / "models" / "model.json")
    )
    assert after["provenance"] == before["provenance"] and after["pretraining"] == before["pretraining"]
    assert "Anyone who knows an id, or has a scan" in " ".join((folder / "docs" / "README.md").read_text().split())
