# SPDX-License-Identifier: Apache-2.0
"""A packed bundle, downloaded from a real HTTP server on loopback: verified, loaded, run, and refused if changed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_process import BundleProcess
from doc_blocks import blocks_run_by
from labelled_scans import centred_affine, head, write_scan
from packed import BUNDLES, ROOT, random_weights
from unpickled import Call
from web import free_port, serving

from volta_components import __version__
from volta_components.files import read_json, sha256_file
from volta_components.sharing.pack import pack_bundle

pytestmark = pytest.mark.slow

NAME = "harp_hippocampus_phantom_tiny"
HOSTED = "phantoms_hosted_beside"
SCHEMA = ROOT / "tests" / "resources" / "bundle_metadata_schema.json"


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
        name=HOSTED,
        model=weights["harp_hippocampus"],
        large_files=address,
    )
    with serving(folder, port):
        yield folder, address


@pytest.fixture(scope="module")
def downloaded(site: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which all bundles were downloaded; nobody may change it."""
    target = tmp_path_factory.mktemp("downloaded")
    for name in (*(f"{bundle}_phantom_tiny" for bundle in BUNDLES), HOSTED):
        words = [
            "download",
            "--name",
            name,
            "--url",
            f"{site[1]}/{name}_v{__version__}.zip",
            "--bundle_dir",
            str(target),
        ]
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
    bundle = tmp_path / HOSTED
    shutil.copytree(downloaded / HOSTED, bundle)
    assert not (bundle / "models" / "model.pt").exists()
    monai_bundle(["download_large_files", "--bundle_path", str(bundle)], tmp_path, tmp_path / "log.txt")
    assert sha256_file(bundle / "models" / "model.pt") == read_json(bundle / "models" / "model.json")["sha256"]


def test_a_large_file_that_was_changed_on_the_server_is_refused(downloaded: Path, tmp_path: Path) -> None:
    bundle = tmp_path / HOSTED
    shutil.copytree(downloaded / HOSTED, bundle)
    text = (bundle / "large_files.yml").read_text()
    digest = read_json(bundle / "models" / "model.json")["sha256"]
    (bundle / "large_files.yml").write_text(text.replace(digest, "0" * 64))
    process = BundleProcess(["download_large_files", "--bundle_path", str(bundle)], tmp_path, tmp_path / "log.txt")
    assert process.wait() != 0
    assert "check_hash failed" in process.output


@pytest.fixture(scope="module")
def expected(weights: dict[str, Path], scan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each of the repository's bundles gives for the scan, run from its root with the overlay."""
    outputs = {}
    for bundle in BUNDLES:
        output = outputs[bundle] = tmp_path_factory.mktemp("expected") / bundle
        given = "--encoder_path" if bundle == "pretrain" else "--model_path"
        configs = [f"bundles/{bundle}/configs/{stem}.json" for stem in ("inference", "tiny")]
        words = ["run", "--config_file", repr(configs), "--source", str(scan), "--output_dir", str(output)]
        monai_bundle([*words, given, str(weights[bundle])], ROOT, output.with_suffix(".log"))
    return outputs


def assert_same_files(made: Path, expected: Path) -> None:
    """The same names, and bit for bit the same content; of images, the same voxels and affine."""
    names = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert names and names == sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    for name in names:
        if name.name.endswith((".nii.gz", ".nii")):
            a, b = (nib.load(folder / name) for folder in (made, expected))
            assert np.array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj)) and np.array_equal(a.affine, b.affine)
        elif name.suffix != ".jsonl":  # a journal has the paths of what was made
            assert (made / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("bundle", BUNDLES)
def test_run_from_its_folder_gives_the_repositorys_output(
    downloaded: Path, expected: dict[str, Path], scan: Path, tmp_path: Path, bundle: str
) -> None:
    """Bit for bit, on a raw scan."""
    words = ["run", "--config_file", "configs/inference.json", "--source", str(scan)]
    folder = downloaded / f"{bundle}_phantom_tiny"
    monai_bundle([*words, "--output_dir", str(tmp_path / "out")], folder, tmp_path / "log.txt")
    assert_same_files(tmp_path / "out", expected[bundle])


LOADED = """
import sys

import monai.bundle
import torch
from monai.bundle import ConfigWorkflow

from volta_components.files import read_json

name, folder, scan, output = sys.argv[1:]
network = monai.bundle.load(name=name, bundle_dir=folder, workflow_type="inference", device="cpu")
state = torch.load(f"{folder}/{name}/models/model.pt", weights_only=True)
assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items()), "other weights"
config = f"{folder}/{name}/configs/inference.json"
settings = {"bundle_root": f"{folder}/{name}", "source": scan, "output_dir": output}
made = ConfigWorkflow(config_file=config, logging_file=False, workflow_type="infer", **settings)
made.parser["network"] = network  # it comes with its weights,
made.parser["model"] = read_json(f"{folder}/{name}/models/model.json")  # so that nothing loads any
made.initialize()
made.run()
made.finalize()
"""


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_network_that_monai_bundle_load_gives(
    downloaded: Path, expected: dict[str, Path], scan: Path, tmp_path: Path, bundle: str
) -> None:
    """From an empty folder; used on the scan, it gives what the repository gives."""
    (tmp_path / "empty").mkdir()
    words = [sys.executable, "-c", LOADED, f"{bundle}_phantom_tiny", str(downloaded), str(scan), str(tmp_path / "out")]
    made = subprocess.run(words, cwd=tmp_path / "empty", capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    assert_same_files(tmp_path / "out", expected[bundle])


def test_what_the_page_on_sharing_says_of_a_downloaded_bundle(
    downloaded: Path, expected: dict[str, Path], scan: Path, tmp_path: Path
) -> None:
    """Its own blocks, where it says that they are run by this test."""
    shutil.copytree(downloaded / NAME, tmp_path / "downloaded" / NAME)
    (tmp_path / "scans").mkdir()
    shutil.copy(scan, tmp_path / "scans")
    in_shell, in_python = blocks_run_by("docs/sharing.md", "tests/integration/test_download.py")
    assert (in_shell.language, in_python.language) == ("bash", "python")
    shown = "\nprint(sum(value.numel() for value in network.state_dict().values()))\n"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    printed = []
    for words in (["bash", "-euc", in_shell.text], [sys.executable, "-c", in_python.text + shown]):
        made = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert made.returncode == 0, made.stderr[-3000:]
        printed.append(made.stdout)
    assert int(printed[1].split()[-1]) == read_json(downloaded / NAME / "models" / "model.json")["parameters"]
    (mask,) = (tmp_path / "out_again").glob("*_hippocampus.nii.gz")
    original = expected["harp_hippocampus"] / mask.name
    assert np.array_equal(np.asarray(nib.load(mask).dataobj), np.asarray(nib.load(original).dataobj))


def test_mask_lies_on_the_scans_own_grid(downloaded: Path, scan: Path, tmp_path: Path) -> None:
    words = ["run", "--config_file", "configs/inference.json", "--source", str(scan), "--output_dir", str(tmp_path)]
    monai_bundle(words, downloaded / NAME, tmp_path / "log.txt")
    (mask,) = tmp_path.glob("*_hippocampus.nii.gz")
    made, original = nib.load(mask), nib.load(scan)
    assert made.shape == original.shape and np.allclose(made.affine, original.affine, atol=1e-4)
    with (tmp_path / "volumes.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 1


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

    def test_weights_without_their_hash(self, bundle: Path, scan: Path, tmp_path: Path) -> None:
        """Whoever changes them could take the JSON away."""
        (bundle / "models" / "model.json").unlink()
        error = self.refused(bundle, scan, tmp_path)
        assert "no model.json with their hash is beside them" in error and "fetch the whole bundle again" in error

    def test_a_pickle_that_would_run_code(self, bundle: Path, scan: Path, tmp_path: Path) -> None:
        """Even where somebody has put its hash into the JSON."""
        trace, path = tmp_path / "executed", bundle / "models" / "model.pt"
        torch.save({"weight": Call(Path.touch, trace)}, path)
        record = read_json(path.with_suffix(".json")) | {"sha256": sha256_file(path)}
        path.with_suffix(".json").write_text(json.dumps(record))
        error = self.refused(bundle, scan, tmp_path)
        assert "not a file of plain weights" in error and not trace.exists()

    def test_a_zip_that_was_cut(self, site: tuple[Path, str], tmp_path: Path) -> None:
        cut = site[0] / f"cut_v{__version__}.zip"
        content = (site[0] / f"{NAME}_v{__version__}.zip").read_bytes()
        cut.write_bytes(content[: len(content) // 2])
        words = ["download", "--name", "cut", "--url", f"{site[1]}/{cut.name}", "--bundle_dir", str(tmp_path)]
        process = BundleProcess(words, tmp_path, tmp_path / "log.txt")
        assert process.wait() != 0
        assert zipfile.BadZipFile.__name__ in process.output
