# SPDX-License-Identifier: Apache-2.0
"""A packed bundle, downloaded from a real HTTP server on loopback: verified, loaded, run, and refused if changed."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_process import BundleProcess
from labelled_scans import centred_affine, head, write_scan
from packed import BUNDLES, ROOT, random_weights

from volta_components.files import read_json, sha256_file
from volta_components.pack import pack_bundle

pytestmark = pytest.mark.slow

NAME = "harp_hippocampus_phantom_tiny"
SCHEMA = ROOT / "tests" / "resources" / "bundle_metadata_schema.json"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def monai_bundle(arguments: list[str], folder: Path, log: Path) -> str:
    """``python -m monai.bundle ARGUMENTS`` to its end; what it printed.

    Raises:
        AssertionError: if it fails.
    """
    process = BundleProcess(arguments, folder, log)
    status = process.wait(300)
    assert status == 0, process.output[-3000:]
    return process.output


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of each bundle; nobody may change them."""
    folder = tmp_path_factory.mktemp("weights")
    return {bundle: random_weights(bundle, folder / bundle) for bundle in BUNDLES}


@pytest.fixture(scope="module")
def site(weights: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with all bundles packed, one of them without its weights, and the address that serves it."""
    folder = tmp_path_factory.mktemp("site")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    for bundle in BUNDLES:
        pack_bundle(ROOT / "bundles" / bundle, folder, ["tiny"], model=weights[bundle])
    pack_bundle(
        ROOT / "bundles" / "harp_hippocampus",
        folder,
        ["tiny"],
        name="hosted_beside",
        model=weights["harp_hippocampus"],
        large_files=address,
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            raise TimeoutError("the server did not start")
        yield folder, address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def downloaded(site: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which all bundles were downloaded; nobody may change it."""
    target = tmp_path_factory.mktemp("downloaded")
    for name in (*(f"{bundle}_phantom_tiny" for bundle in BUNDLES), "hosted_beside"):
        words = ["download", "--name", name, "--url", f"{site[1]}/{name}_v0.1.0.zip", "--bundle_dir", str(target)]
        monai_bundle(words, target, target / f"{name}.log")
    return target


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw scan of another orientation and anisotropic voxels."""
    shape = (40, 36, 30)
    affine = centred_affine(shape, (1.0, 1.1, 1.3))
    volume, _ = head(shape, affine, seed=4)
    turned = nib.as_closest_canonical(nib.Nifti1Image(volume, affine)).as_reoriented(
        np.array([[1, -1], [2, 1], [0, -1]])
    )
    folder = tmp_path_factory.mktemp("scan")
    write_scan(folder, "sub-x", np.asarray(turned.dataobj), np.zeros(turned.shape, np.uint8), turned.affine)
    (folder / "sub-x_label.nii.gz").unlink()
    return folder / "sub-x_T1w.nii.gz"


def test_large_files_are_fetched_and_verified(downloaded: Path, site: tuple[Path, str], tmp_path: Path) -> None:
    bundle = tmp_path / "hosted_beside"
    shutil.copytree(downloaded / "hosted_beside", bundle)
    assert not (bundle / "models" / "model.pt").exists()
    monai_bundle(["download_large_files", "--bundle_path", str(bundle)], tmp_path, tmp_path / "log.txt")
    assert sha256_file(bundle / "models" / "model.pt") == read_json(bundle / "models" / "model.json")["sha256"]


def test_a_large_file_that_was_changed_on_the_server_is_refused(downloaded: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "hosted_beside"
    shutil.copytree(downloaded / "hosted_beside", bundle)
    text = (bundle / "large_files.yml").read_text()
    digest = read_json(bundle / "models" / "model.json")["sha256"]
    (bundle / "large_files.yml").write_text(text.replace(digest, "0" * 64))
    process = BundleProcess(["download_large_files", "--bundle_path", str(bundle)], tmp_path, tmp_path / "log.txt")
    assert process.wait() != 0
    assert "check_hash failed" in process.output


@pytest.mark.parametrize("bundle", ["harp_hippocampus", "ixi_sex", "pretrain"])
def test_run_from_its_folder_gives_the_repositorys_output(
    downloaded: Path, weights: dict[str, Path], scan: Path, tmp_path: Path, bundle: str
) -> None:
    """Bit for bit, on a raw scan."""
    places = {"downloaded": downloaded / f"{bundle}_phantom_tiny", "repository": ROOT}
    for name, folder in places.items():
        words = ["run", "--source", str(scan), "--output_dir", str(tmp_path / name)]
        if name == "downloaded":
            words += ["--config_file", "configs/inference.json"]
        else:
            configs = [f"bundles/{bundle}/configs/{stem}.json" for stem in ("inference", "tiny")]
            given = "--encoder_path" if bundle == "pretrain" else "--model_path"
            words += ["--config_file", repr(configs), given, str(weights[bundle])]
        monai_bundle(words, folder, tmp_path / f"{name}.log")
    ours, theirs = (
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in places
    )
    assert ours == theirs and ours
    compared = 0
    for path in ours:
        first, second = ((tmp_path / name / path) for name in places)
        if path.name.endswith((".nii.gz", ".nii")):
            a, b = nib.load(first), nib.load(second)
            assert np.array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj)) and np.array_equal(a.affine, b.affine)
        else:
            assert first.read_bytes() == second.read_bytes(), path
        compared += 1
    assert compared == len(ours)


def test_mask_lies_on_the_scans_own_grid(downloaded: Path, scan: Path, tmp_path: Path) -> None:
    words = ["run", "--config_file", "configs/inference.json", "--source", str(scan), "--output_dir", str(tmp_path)]
    monai_bundle(words, downloaded / NAME, tmp_path / "log.txt")
    (mask,) = tmp_path.glob("*_hippocampus.nii.gz")
    made, original = nib.load(mask), nib.load(scan)
    assert made.shape == original.shape and np.allclose(made.affine, original.affine, atol=1e-4)
    with (tmp_path / "volumes.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 1


def test_monai_bundle_load_from_anywhere(downloaded: Path, tmp_path: Path) -> None:
    """``monai.bundle.load`` with the inference workflow gives the network with its weights, for each bundle."""
    code = (
        "import sys, torch, monai.bundle\n"
        "net = monai.bundle.load(name=sys.argv[1], bundle_dir=sys.argv[2], workflow_type='inference', device='cpu')\n"
        "state = torch.load(f'{sys.argv[2]}/{sys.argv[1]}/models/model.pt', weights_only=True)\n"
        "own = net.state_dict()\n"
        "assert all(torch.equal(own[key], state[key]) for key in own), 'other weights'\n"
        "print('same', len(own))\n"
    )
    for bundle in ("harp_hippocampus", "ixi_sex", "pretrain"):
        words = [sys.executable, "-c", code, f"{bundle}_phantom_tiny", str(downloaded)]
        made = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert made.returncode == 0, made.stderr[-3000:]
        assert int(made.stdout.split("same")[1]) > 10


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_zoos_checks_pass(downloaded: Path, tmp_path: Path, bundle: str) -> None:
    """Form of the metadata, version and changelog, network in and out: as the model zoo's own checks call them."""
    from monai.bundle import verify_metadata, verify_net_in_out

    folder = downloaded / f"{bundle}_phantom_tiny"
    shutil.copy(SCHEMA, tmp_path / "schema.json")
    metadata = folder / "configs" / "metadata.json"
    verify_metadata(meta_file=str(metadata), filepath=str(tmp_path / "schema.json"))
    content = read_json(metadata)
    assert content["version"] in content["changelog"]
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(metadata),
        config_file=str(folder / "configs" / "inference.json"),
        bundle_root=str(folder),
        device="cpu",
    )


class TestChangedWeights:
    @pytest.fixture
    def bundle(self, downloaded: Path, tmp_path: Path) -> Path:
        shutil.copytree(downloaded / NAME, tmp_path / NAME)
        return tmp_path / NAME

    def refused(self, bundle: Path, scan: Path, tmp_path: Path) -> str:
        words = ["run", "--config_file", "configs/inference.json", "--source", str(scan)]
        process = BundleProcess([*words, "--output_dir", str(tmp_path / "out")], bundle, tmp_path / "log.txt")
        assert process.wait() != 0
        assert not list((tmp_path / "out").glob("*.nii.gz"))
        return process.error

    def test_one_changed_byte(self, bundle: Path, scan: Path, tmp_path: Path) -> None:
        path = bundle / "models" / "model.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        error = self.refused(bundle, scan, tmp_path)
        assert "model.pt: its SHA-256 is not that of model.json" in error and "fetch it again" in error

    def test_a_pickle_that_would_run_code(self, bundle: Path, scan: Path, tmp_path: Path) -> None:
        """Even where somebody has put its hash into the JSON."""
        trace = tmp_path / "executed"

        class Payload:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (exec, (f"open({str(trace)!r}, 'w').close()",))

        path = bundle / "models" / "model.pt"
        torch.save({"weight": Payload()}, path)
        pickle.loads(pickle.dumps(Payload()))
        assert trace.exists(), "the payload does run where it is unpickled"
        trace.unlink()
        record = read_json(path.with_suffix(".json")) | {"sha256": sha256_file(path)}
        path.with_suffix(".json").write_text(json.dumps(record))
        error = self.refused(bundle, scan, tmp_path)
        assert "not a file of plain weights" in error and not trace.exists()

    def test_a_zip_that_was_cut(self, site: tuple[Path, str], tmp_path: Path) -> None:
        cut = site[0] / "cut_v0.1.0.zip"
        content = (site[0] / f"{NAME}_v0.1.0.zip").read_bytes()
        cut.write_bytes(content[: len(content) // 2])
        words = ["download", "--name", "cut", "--url", f"{site[1]}/{cut.name}", "--bundle_dir", str(tmp_path)]
        process = BundleProcess(words, tmp_path, tmp_path / "log.txt")
        assert process.wait() != 0
        assert zipfile.BadZipFile.__name__ in process.output
