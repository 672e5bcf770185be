# SPDX-License-Identifier: Apache-2.0
"""A real MONAI Label server, as ``make label`` starts it, in its own environment with another release of MONAI."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from doc_blocks import Block, blocks_run_by
from label_server import FORM, HARP, LABEL, ROOT, Server, command, environment, running
from labelled_scans import SIDE, head, make_labelled
from monai.bundle import ConfigParser, ConfigWorkflow
from packed import random_weights
from web import free_port

from volta_components.data.labels import SIDES
from volta_components.downstream.start import load_model
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file, write_json
from volta_components.sharing.pack import assemble
from volta_components.training.people import patient_key

CLASSES = {"ixi_sex_phantom_tiny": ["male", "female"], "aibl_ad_phantom_tiny": ["healthy", "ad"]}
# Sizes at which a training takes seconds; packed as an overlay, as the quick start's sizes are.
SMALL: dict[str, Any] = {
    "suffix": "_phantom_tiny",
    "spacing": 1.0,
    "volume_size": [SIDE] * 3,
    "image_size": [32, 16, 16],
    "feature_size": 8,
    "hidden_size": 24,
    "mlp_dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "unfrozen_blocks": 2,
    "learning_rate": 0.005,
    "foreground_share": 0.9,
    "crops_per_volume": 1,
    "num_workers": 0,
}

pytestmark = [pytest.mark.label_server, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def _environment() -> None:
    if not (LABEL / ".ready").is_file():
        message = "there is no MONAI Label environment (.venv-label): make test-label makes it"
        if os.environ.get("LABEL_TESTS") == "required":
            pytest.fail(message)
        pytest.skip(message)


# --- what is served ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> dict[str, Path]:
    """Three packed bundles: a hippocampus model that has learnt its phantoms, two classifiers with random weights."""
    folder = tmp_path_factory.mktemp("bundles")
    source = ROOT / "bundles" / "harp_hippocampus"
    overlay = folder / "tiny.json"
    write_json(overlay, SMALL)
    made = ConfigWorkflow(
        config_file=[str(source / "configs" / name) for name in ("train.json", "unetr_scratch.json")] + [str(overlay)],
        meta_file=str(source / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(source),
        dataset_dir=str(make_labelled(folder / "data", cohort="phantom")),
        output_dir=f"${str(folder / 'run')!r}",
        epochs=60,
        val_interval=60,
        learning_rate=0.01,
    )
    made.parser["train"]["handlers"] = [h for h in made.parser["train"]["handlers"] if "ProgressBar" not in str(h)]
    made.initialize()
    made.run()
    made.finalize()
    (model,) = (folder / "run" / "models").glob("*.pt")
    found = {HARP: assemble(source, folder / HARP, [str(overlay)], model=model)}
    for name in CLASSES:
        bundle = name.removesuffix("_phantom_tiny")
        weights = random_weights(bundle, folder / bundle)
        found[name] = assemble(ROOT / "bundles" / bundle, folder / name, ["tiny"], model=weights)
    return found


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw scans: LPS, three spacings, intensities of a scanner; their truth in ``../truth``."""
    folder = tmp_path_factory.mktemp("label") / "studies"
    (folder.parent / "truth").mkdir(parents=True)
    folder.mkdir()
    shape, spacing = (40, 36, 30), np.array([0.9, 1.0, 1.2])
    affine = np.diag([*(spacing * [-1, -1, 1]), 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * np.diag(affine)[:3]
    for number in range(4):
        volume, label = head(shape, affine, seed=40 + number)
        for array, where in ((np.round(volume * 900).astype(np.int16), folder), (label, folder.parent / "truth")):
            image = nib.Nifti1Image(array, affine)
            image.set_sform(affine, code=1)
            image.set_qform(affine, code=1)
            nib.save(image, where / f"sub-IXI{number:03d}_T1w.nii.gz")
    return folder


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path], studies: Path) -> Iterator[Server]:
    """Started by the page's own command, with settings of its table."""
    port, app = free_port(), studies.parent / "app"
    start = shlex.split(page_blocks()[0].text)
    assert start[:2] == ["make", "label"]
    words = [word.replace("=DIR", f"={studies}") for word in start]
    words += [f"PORT={port}", f"BUNDLE={','.join(map(str, bundles.values()))}", f"APP={app}"]
    with running(words, f"http://127.0.0.1:{port}", app) as made:
        yield made


def page_blocks() -> list[Block]:
    """Blocks of docs/monai_label.md that say that this test runs them."""
    return blocks_run_by("docs/monai_label.md", "make test-label")


def run_block(block: Block, server: Server, folder: Path, **names: str) -> list[str]:
    """Run a block of the page, line by line, at this server's address; what each line prints.

    Args:
        block: the block.
        server: takes the place of the one at the default address.
        folder: where it is run.
        names: what takes the place of words such as ``SCAN``.
    """
    text = block.text.replace("http://127.0.0.1:8000", server.address)
    for name, value in names.items():
        text = text.replace(name, value)
    printed = []
    for line in text.splitlines():
        made = subprocess.run(
            ["bash", "-euc", line.replace("curl ", "curl --fail --silent --show-error ", 1)],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert made.returncode == 0, f"{line}\n{made.stderr}\n{server.log.read_text(errors='replace')[-3000:]}"
        printed.append(made.stdout)
    return printed


def bundle_mask(bundle: Path, scan: Path, output: Path) -> nib.Nifti1Image:
    """The mask that ``python -m monai.bundle run`` gives in this environment, from inside the bundle's folder."""
    words = ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    done = subprocess.run(
        [sys.executable, *words, "--source", str(scan), "--output_dir", str(output)],
        cwd=bundle,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob("*.nii.gz")
    return nib.load(path)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def assert_same_mask(served: nib.Nifti1Image, expected: nib.Nifti1Image, scan: nib.Nifti1Image) -> None:
    assert served.shape == scan.shape and expected.shape == scan.shape
    np.testing.assert_allclose(served.affine, scan.affine, atol=1e-4)
    masks = [np.asarray(image.dataobj).astype(int) for image in (served, expected)]
    assert set(np.unique(masks[0])) == {0, 1, 2}
    for side, value in SIDES.items():
        one, other = (mask == value for mask in masks)
        assert other.sum() > 50, f"{side}: a mask of {other.sum()} voxels proves nothing"
        assert dice(one, other) >= 0.99, side


# --- tests; those that train come last ---------------------------------------------------------------------------


def test_it_says_what_it_serves_and_how_to_connect(server: Server) -> None:
    info = server.json("GET", "/info/")
    assert set(info["models"]) == {HARP, *CLASSES}
    assert info["models"][HARP]["type"] == "segmentation"
    assert info["models"][HARP]["labels"] == {"left hippocampus": 1, "right hippocampus": 2}
    for name, labels in CLASSES.items():
        assert info["models"][name]["type"] == "classification"
        assert list(info["models"][name]["labels"]) == labels
    assert set(info["trainers"]) == {HARP}
    assert info["datastore"]["total"] == 4
    text = server.output.read_text()
    assert all(word in text for word in (server.address, "3D Slicer", "OHIF", HARP))
    assert b"<html" in server.request("GET", "/ohif/").lower()


def test_a_mask_is_that_of_the_bundle(server: Server, bundles: dict[str, Path], studies: Path, tmp_path: Path) -> None:
    name = "sub-IXI000_T1w"
    scan, truth = (nib.load(folder / f"{name}.nii.gz") for folder in (studies, studies.parent / "truth"))
    expected = bundle_mask(bundles[HARP], studies / f"{name}.nii.gz", tmp_path / "out")
    assert_same_mask(server.mask(name, tmp_path), expected, scan)
    # On the right sides: it has learnt the phantoms.
    for value in SIDES.values():
        assert dice(np.asarray(expected.dataobj) == value, np.asarray(truth.dataobj) == value) > 0.6


def test_the_pages_requests(server: Server, studies: Path, tmp_path: Path) -> None:
    name = "sub-IXI002_T1w"
    by_hand = page_blocks()[1]
    info, nothing, classes = run_block(by_hand, server, tmp_path, SCAN=name)
    assert set(json.loads(info)["models"]) == {HARP, *CLASSES} and nothing == ""
    mask, again = nib.load(tmp_path / "mask.nii.gz"), server.mask(name, tmp_path)
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(again.dataobj))
    assert [row["label"] for row in json.loads(classes)["prediction"]] == ["male", "female"]


def test_a_second_server_at_the_same_port_changes_nothing(server: Server, studies: Path, tmp_path: Path) -> None:
    app = studies.parent / "app"
    before = {path.name: path.readlink() for path in (app / "model").iterdir()}
    port = server.address.rsplit(":", 1)[1]
    done = subprocess.run(
        command("--studies", str(studies), "--bundle", str(tmp_path), "--app", str(app), "--port", port),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 2 and f"something answers at {server.address} already" in done.stderr
    assert {path.name: path.readlink() for path in (app / "model").iterdir()} == before
    assert server.mask("sub-IXI000_T1w", tmp_path).shape == (40, 36, 30)


def test_it_is_found_at_another_address_of_this_machine(
    bundles: dict[str, Path], studies: Path, tmp_path: Path
) -> None:
    port = free_port()
    words = ["--studies", str(studies), "--bundle", str(bundles["ixi_sex_phantom_tiny"]), "--host", "127.0.0.2"]
    words = command(*words, "--port", str(port), "--app", str(tmp_path / "app"))
    with running(words, f"http://127.0.0.2:{port}", tmp_path / "app") as made:
        assert set(made.json("GET", "/info/")["models"]) == {"ixi_sex_phantom_tiny"}


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_classifier_answers_with_labels_and_scores(
    server: Server, bundles: dict[str, Path], studies: Path, name: str
) -> None:
    answer = server.json("POST", f"/infer/{name}?image=sub-IXI001_T1w&output=json")
    assert [row["label"] for row in answer["prediction"]] == CLASSES[name]
    scores = [row["score"] for row in answer["prediction"]]
    # The bundle's own steps, here.
    parser = ConfigParser()
    parser.read_config(str(bundles[name] / "configs" / "inference.json"))
    parser["bundle_root"], parser["device"] = str(bundles[name]), "$torch.device('cpu')"
    network = parser.get_parsed_content("network_def").eval()
    load_model(network, bundles[name] / "models" / "model.pt")
    image = parser.get_parsed_content("preprocessing")({"image": str(studies / "sub-IXI001_T1w.nii.gz")})["image"]
    with torch.no_grad():
        expected = network(image[None]).softmax(dim=1)[0].tolist()
    assert scores == pytest.approx(expected, abs=1e-4)
    assert sum(scores) == pytest.approx(1, abs=1e-5)


def test_changed_weights_are_refused_until_they_are_mended(
    server: Server, bundles: dict[str, Path], tmp_path: Path
) -> None:
    path = bundles["ixi_sex_phantom_tiny"] / "models" / "model.pt"
    kept = shutil.copy(path, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    request = "/infer/ixi_sex_phantom_tiny?image=sub-IXI001_T1w&output=json"
    try:
        with pytest.raises(AssertionError, match=r"422 .*changed or cut"):
            server.request("POST", request)
    finally:
        shutil.copy(kept, path)
    assert len(server.json("POST", request)["prediction"]) == 2


def test_what_is_wrong_with_a_request_is_said(server: Server, studies: Path) -> None:
    """A model's name from elsewhere, and a scan without a head."""
    for name, message in (("absent.pt", "no such model"), ("../../x.pt", "give a name, not a path")):
        body = "params=" + json.dumps({"model_filename": name})
        with pytest.raises(AssertionError, match=f"422 .*{message}"):
            server.request("POST", f"/infer/{HARP}?image=sub-IXI001_T1w", body.encode(), FORM)
    empty = studies.parent / "empty.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((32, 32, 32), np.int16), np.eye(4)), empty)
    with pytest.raises(AssertionError, match=r"422 .*empty\.nii\.gz"):
        server.request("POST", f"/infer/{HARP}?image={empty}")


def test_without_corrections_there_is_nothing_to_train_on(server: Server, bundles: dict[str, Path]) -> None:
    before = sha256_file(bundles[HARP] / "models" / "model.pt")
    ended = server.train(max_epochs=1)
    assert ended["status"] == "ERROR" and "no scan has a final label map" in str(ended["details"])
    assert sha256_file(bundles[HARP] / "models" / "model.pt") == before


def test_corrections_train_the_model_and_its_weights_come_back(
    server: Server, bundles: dict[str, Path], studies: Path, tmp_path: Path
) -> None:
    model = bundles[HARP] / "models" / "model.pt"
    before, record_before = sha256_file(model), read_json(model.with_suffix(".json"))
    names = [f"sub-IXI{number:03d}_T1w" for number in range(3)]
    for name in names:
        shutil.copy(studies.parent / "truth" / f"{name}.nii.gz", tmp_path / "corrected.nii.gz")
        run_block(page_blocks()[2], server, tmp_path, SCAN=name)
        saved = nib.load(studies / "labels" / "final" / f"{name}.nii.gz")
        truth = nib.load(studies.parent / "truth" / f"{name}.nii.gz")
        assert np.array_equal(np.asarray(saved.dataobj), np.asarray(truth.dataobj))
    assert server.json("GET", "/info/")["datastore"]["completed"] == 3
    ended = server.train(max_epochs=1, val_split=0.34)
    assert ended["status"] == "DONE", server.log.read_text()[-5000:]
    assert sha256_file(model) != before
    # The model before is still there, whole.
    kept = model.with_name(f"model_{before[:8]}.pt")
    assert sha256_file(kept) == before and read_json(kept.with_suffix(".json")) == record_before
    # The record is honest: what it started from, whom it has ever seen, no numbers of the model before.
    record = read_json(model.with_suffix(".json"))
    assert record["sha256"] == sha256_file(model) and record["started_from"]["sha256"] == before
    assert (
        record["provenance"]["volumes"] == 3 and record["subjects"]["training"] + record["subjects"]["validation"] == 3
    )
    keys = {patient_key(f"IXI{number:03d}") for number in range(3)}
    assert set(record["provenance"]["patient_ids"]) == keys | set(record_before["provenance"]["patient_ids"])
    assert record_before["metrics"] and "metrics" not in record
    assert record["provenance"]["monai_version"] != record_before["provenance"]["monai_version"]
    assert record["tags"]["phantom"] == record_before["tags"]["phantom"] == "true"
    # In this environment: MONAI's releases write other keys, and the weights load all the same.
    parser = ConfigParser()
    parser.read_config(str(bundles[HARP] / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def")
    assert load_model(network, model)["sha256"] == record["sha256"]
    states = [torch.load(path, weights_only=True) for path in (model, kept)]
    differing = states[0].keys() ^ states[1].keys()
    assert differing and all("cross_attn" in name for name in differing)
    # One mini-batch of one epoch has trained every part that is trained, at the bundle's own learning rate.
    same = {name for name in states[0].keys() & states[1].keys() if torch.equal(states[0][name], states[1][name])}
    assert all("cross_attn" in name for name in same), same
    settings = record["provenance"]["settings"]
    assert settings["final_learning_rate"] == settings["learning_rate"] == SMALL["learning_rate"]
    # And the server serves them, as this environment does.
    name = "sub-IXI003_T1w"
    expected = bundle_mask(bundles[HARP], studies / f"{name}.nii.gz", tmp_path / "out")
    assert_same_mask(server.mask(name, tmp_path), expected, nib.load(studies / f"{name}.nii.gz"))


def test_a_second_training_goes_on_from_the_first(server: Server, bundles: dict[str, Path]) -> None:
    """Its start is a file of the other release."""
    model = bundles[HARP] / "models" / "model.pt"
    first = read_json(model.with_suffix(".json"))
    ended = server.train(max_epochs=1, val_split=0)
    assert ended["status"] == "DONE", server.log.read_text()[-5000:]
    record = read_json(model.with_suffix(".json"))
    assert record["started_from"]["sha256"] == first["sha256"] != record["sha256"]
    assert record["started_from"]["started_from"]["sha256"] == first["started_from"]["sha256"]


def test_the_pages_training(server: Server, bundles: dict[str, Path], tmp_path: Path) -> None:
    model = bundles[HARP] / "models" / "model.pt"
    before = sha256_file(model)
    started, listed = run_block(page_blocks()[3], server, tmp_path)
    task = json.loads(started)["id"]
    assert task in [row["id"] for row in json.loads(listed)]
    assert server.ended(task)["status"] == "DONE", server.log.read_text()[-5000:]
    assert sha256_file(model) != before


def test_what_cannot_be_served_is_said(bundles: dict[str, Path], studies: Path, tmp_path: Path) -> None:
    def error(*words: str) -> str:
        done = subprocess.run(
            command(*words, "--app", str(tmp_path / "app"), "--port", str(free_port())),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
        )
        assert done.returncode == 2
        return done.stderr

    source = str(ROOT / "bundles" / "pretrain")
    message = error("--studies", str(studies), "--bundle", f"{source},{tmp_path}")
    assert "configs/inference.json: not a bundle" in message and "train or download" in message
    assert "no such folder" in error("--studies", str(tmp_path / "nothing"))


def test_a_model_that_runs_code_stops_the_server(bundles: dict[str, Path], studies: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    bundle = tmp_path / "ixi_sex_phantom_tiny"
    shutil.copytree(bundles[bundle.name], bundle)
    torch.save({"x": Bomb()}, bundle / "models" / "model.pt")
    (bundle / "models" / "model.json").unlink()
    words = ["--studies", str(studies), "--bundle", str(bundle), "--port", str(free_port())]
    done = subprocess.run(
        command(*words, "--app", str(tmp_path / "app")), capture_output=True, text=True, env=environment(), timeout=180
    )
    assert done.returncode == 1 and "could run code" in done.stderr
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="could run code"):
        load_model(torch.nn.Linear(1, 1), bundle / "models" / "model.pt")
