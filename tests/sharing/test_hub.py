# SPDX-License-Identifier: Apache-2.0
"""Pushing to the Hugging Face Hub: its own client, against a hub on loopback."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from fake_hub import TOKEN, FakeHub, Repo, fake_hub
from monai.bundle import download
from packed import ROOT, random_weights

from volta_components._version import __version__
from volta_components.errors import InputError
from volta_components.files import read_json, write_json
from volta_components.sharing.hub import Destination, destination, push
from volta_components.sharing.pack import pack, pack_bundle

REPO = "lab/hippocampus"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
        yield hub


@pytest.fixture
def zipped(packed: Path) -> Path:
    return packed / f"harp_hippocampus_phantom_tiny_v{__version__}.zip"


@pytest.fixture(scope="module")
def clinical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed bundle whose record names a cohort of people."""
    folder = tmp_path_factory.mktemp("clinical")
    weights = random_weights("ixi_sex", folder / "weights")
    record = read_json(weights.with_suffix(".json"))
    record["provenance"] |= {"cohort": "hospital", "phantom": False}
    write_json(weights.with_suffix(".json"), record)
    return pack_bundle(ROOT / "bundles" / "ixi_sex", folder, ["tiny"], model=weights).path


def test_a_bundle_becomes_a_repository_that_monai_downloads(
    hub: FakeHub, zipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(zipped, Destination(REPO, False, False)) == f"{hub.address}/{REPO}/tree/{__version__}"
    repo = hub.repos[REPO]
    assert (repo.private, repo.tags) == (False, [__version__])
    with zipfile.ZipFile(zipped) as archive:
        packed = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    assert {name: content for name, content in repo.files.items() if name != "README.md"} == packed
    said = capsys.readouterr().out
    assert "visible to: EVERYBODY (public)" in said and "trained on phantoms" in said and "sealed with this lab" in said

    words = {"name": "harp_hippocampus_phantom_tiny", "bundle_dir": str(tmp_path), "version": __version__}
    download(source="huggingface_hub", repo=REPO, **words)
    made = tmp_path / words["name"]
    assert all((made / name).read_bytes() == content for name, content in packed.items())


def test_the_front_page_has_what_the_hub_reads(hub: FakeHub, zipped: Path, clinical: Path) -> None:
    def fields(name: str) -> tuple[dict[str, Any], str]:
        _, front, card = hub.repos[name].files["README.md"].decode().split("---\n", 2)
        return yaml.safe_load(front), card

    push(zipped, Destination("lab/phantom", False, False))
    front, card = fields("lab/phantom")
    assert (front["license"], front["library_name"]) == ("apache-2.0", "monai")
    assert (front["pipeline_tag"], front["datasets"]) == ("image-segmentation", ["phantom"])
    assert {"monai", "mri", "synthetic-data"} <= set(front["tags"])
    assert front["metrics"] == ["auroc"]
    (model,) = front["model-index"]
    (result,) = model["results"]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("auroc", 0.75)]
    assert "](docs/starter.png)" in card and card.lstrip().startswith("# VolTA-3D")

    push(clinical, Destination("lab/people", True, True))
    front, _ = fields("lab/people")
    assert (front["license"], front["license_link"]) == ("other", "docs/data_license.txt")
    assert front["datasets"] == ["hospital"] and "synthetic-data" not in front["tags"]
    assert front["license_link"] in hub.repos["lab/people"].files


def test_weights_of_people_need_a_yes(hub: FakeHub, clinical: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for private in (False, True):
        with pytest.raises(InputError, match=r"people's scans.*nothing was uploaded.*--yes"):
            push(clinical, Destination(REPO, private, False))
        assert not [request for request in hub.seen if not request.startswith("GET")]
    said = capsys.readouterr().out
    assert "EVERYBODY (public)" in said and "(private)" in said and "scans of PEOPLE" in said and "hospital" in said
    push(clinical, Destination(REPO, True, True))
    assert hub.repos[REPO].private and "models/model.pt" in hub.repos[REPO].files


def test_the_whole_command_writes_the_zoos_row(
    hub: FakeHub, weights: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = ROOT / "bundles" / "pretrain"
    assert (
        pack(tmp_path, bundle, overlays=["tiny"], model=weights["pretrain"], push="hf://ann/encoder", private=True) == 0
    )
    stem = f"pretrain_phantom_tiny_v{__version__}"
    row = {"checksum": "", "source": f"{hub.address}/ann/encoder/tree/{__version__}"}
    text = (tmp_path / "model_info.json").read_text()
    assert json.loads(text) == {stem: row}
    assert f'    "{stem}": {{\n        "checksum": ""' in text
    assert json.dumps({stem: row}) in capsys.readouterr().out
    assert hub.repos["ann/encoder"].private
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "model_info.json", f"{stem}.zip"]


class TestExistingRepositories:
    def test_a_new_version_takes_the_place_of_the_old_and_leaves_what_others_added(
        self, hub: FakeHub, zipped: Path
    ) -> None:
        old = {
            "configs/metadata.json": b"{}",
            "configs/gone.json": b"{}",
            "pictures/own.png": b"x",
            ".gitattributes": b"",
        }
        hub.repos[REPO] = Repo(False, dict(old), ["0.1.0"])
        push(zipped, Destination(REPO, False, False))
        files = hub.repos[REPO].files
        assert "configs/gone.json" not in files and files["pictures/own.png"] == b"x"
        assert hub.repos[REPO].tags == ["0.1.0", __version__]

    @pytest.mark.parametrize(
        ("repo", "message"),
        [
            (Repo(False, {"configs/metadata.json": b"{}"}, [__version__]), f"has version {__version__} already"),
            (Repo(False, {"model.safetensors": b"x"}), "holds something else than a bundle; choose another name"),
            (Repo(True, {"configs/metadata.json": b"{}"}), "is there and is private; add --private"),
        ],
    )
    def test_refused(self, hub: FakeHub, zipped: Path, repo: Repo, message: str) -> None:
        hub.repos[REPO] = repo
        before = dict(repo.files)
        with pytest.raises(InputError, match=message):
            push(zipped, Destination(REPO, False, False))
        assert repo.files == before
        assert not [request for request in hub.seen if not request.startswith("GET")]


class TestFaults:
    def test_no_token(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Said before anything is packed."""
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(InputError, match=r"no token.*hf auth login.*HF_TOKEN"):
            pack(tmp_path / "dist", ROOT / "bundles" / "pretrain", push=f"hf://{REPO}")
        assert not (tmp_path / "dist").exists() and hub.seen == []

    @pytest.mark.parametrize(
        "address", ["lab/x", "hf://lab", "hf://lab/x/y", "https://huggingface.co/lab/x", "hf:///x", ""]
    )
    def test_no_address(self, hub: FakeHub, address: str) -> None:
        with pytest.raises(InputError, match="give hf://ORG/NAME"):
            destination(address)

    def test_a_token_that_is_not_valid(self, hub: FakeHub, zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_old")
        with pytest.raises(InputError, match=r"token is not valid; log in again.*401.*Nothing was uploaded"):
            push(zipped, Destination(REPO, False, False))

    def test_somebody_elses_organisation(self, hub: FakeHub, zipped: Path) -> None:
        with pytest.raises(InputError, match="the token is of ann, who may write to ann, lab, not to clinic"):
            push(zipped, Destination("clinic/x", False, False))

    @pytest.mark.parametrize(
        ("status", "remedy"), [(403, "give it write access"), (409, "wait for them"), (503, "try again later")]
    )
    def test_refused_by_the_hub(self, hub: FakeHub, zipped: Path, status: int, remedy: str) -> None:
        hub.faults["POST /api/repos/create"] = status
        with pytest.raises(InputError, match=rf"{remedy}.*{status}.*Nothing was uploaded"):
            push(zipped, Destination(REPO, False, False))

    def test_network_down(self, hub: FakeHub, zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(
            InputError, match=r"127\.0\.0\.1:1: cannot be reached.*check the network.*Nothing was uploaded"
        ):
            push(zipped, Destination(REPO, False, False))

    @pytest.mark.parametrize("request_", ["POST /api/models/.*/commit/", "POST .*/tag/"])
    def test_a_push_that_breaks_is_finished_by_the_same_command(
        self, hub: FakeHub, zipped: Path, request_: str
    ) -> None:
        hub.faults[request_] = None
        with pytest.raises(InputError, match=r"connection broke.*start the same command again"):
            push(zipped, Destination(REPO, False, False))
        assert hub.repos[REPO].tags == []
        assert ("models/model.pt" in hub.repos[REPO].files) == ("tag" in request_)
        hub.faults.clear()
        push(zipped, Destination(REPO, False, False))
        assert hub.repos[REPO].tags == [__version__] and "models/model.pt" in hub.repos[REPO].files

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"push": f"hf://{REPO}", "large_files": "https://x.example"}, "leave out --large_files"),
            ({"private": True}, "belong to --push"),
            ({"yes": True}, "belong to --push"),
        ],
    )
    def test_options_that_do_not_go_together(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            pack(tmp_path, ROOT / "bundles" / "pretrain", **options)

    def test_all_bundles_have_no_one_repository(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--push belong to one bundle"):
            pack(tmp_path, all=True, push=f"hf://{REPO}")
