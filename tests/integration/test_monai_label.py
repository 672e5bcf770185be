# SPDX-License-Identifier: Apache-2.0
"""A real MONAI Label server, as ``make label`` starts it, in its own environment with another release of MONAI."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from csv_rows import read_rows
from doc_blocks import Block
from label_server import CLASSES, HARP, ROOT, SMALL, STARTER, Server, command, environment, page_blocks, running
from labelled_scans import centred_affine, head
from monai.bundle import ConfigParser
from scipy import ndimage
from unpickled import Call
from web import free_port

from volta_components.data.labels import SIDES
from volta_components.data.nifti import write_nifti
from volta_components.downstream.start import load_model
from volta_components.errors import InputError
from volta_components.files import read_json, sha256_file
from volta_components.sharing.card import is_phantom
from volta_components.training.people import patient_key

pytestmark = [pytest.mark.label_server, pytest.mark.slow]


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
    # 3D Slicer makes a segment of each: classes are none.
    assert info["labels"] == ["left hippocampus", "right hippocampus"]
    assert info["datastore"]["total"] == 4
    text = server.output.read_text()
    assert all(word in text for word in (server.address, "3D Slicer", "OHIF", HARP))
    assert "404" in (said := server.refused("GET", "/ohif/")) and "DICOMweb" in said


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
    info, nothing, classes = run_block(by_hand, server, tmp_path, SCAN=name, **{STARTER: HARP})
    assert set(json.loads(info)["models"]) == {HARP, *CLASSES} and nothing == ""
    mask, again = nib.load(tmp_path / "mask.nii.gz"), server.mask(name, tmp_path)
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(again.dataobj))
    assert [row["label"] for row in json.loads(classes)["prediction"]] == ["male", "female"]


def test_marks_of_scan_and_mask_are_in_the_answer(
    server: Server, bundles: dict[str, Path], studies: Path, tmp_path: Path
) -> None:
    """In the words of the bundle's own table; a mask has both transforms of its scan, which disagree here."""
    plain = nib.load(studies / "sub-IXI000_T1w.nii.gz")
    flipped = nib.Nifti1Image(np.asarray(plain.dataobj), plain.affine)
    flipped.set_sform(plain.affine, code=1)
    flipped.set_qform(plain.affine @ np.diag([-1, 1, 1, 1]), code=2)
    nib.save(flipped, scan := tmp_path / "flipped_T1w.nii.gz")
    bundle_mask(bundles[HARP], scan, tmp_path / "out")
    (expected,) = (row["marks"] for row in read_rows(tmp_path / "out" / "volumes.csv"))
    assert "LEFT/RIGHT FLIP" in expected and "hippocampus of" in expected  # these heads are small
    answer = server.upload(f"/infer/{HARP}?output=json", scan, method="POST")
    assert answer["marks"] == expected
    said = server.log.read_text()
    assert "is marked; look at it" in said and expected in said
    answer = server.upload("/infer/ixi_sex_phantom_tiny?output=json", scan, method="POST")
    assert "LEFT/RIGHT FLIP" in answer["marks"] and "hippocampus of" not in answer["marks"]
    # Of a head as large as people's, nothing is odd.
    small = centred_affine(shape := (72, 80, 72), (0.6, 0.6, 0.6))
    write_nifti(tmp_path / "large_T1w.nii.gz", head(shape, small)[0], np.diag([5, 5, 5, 1]) @ small)
    answer = server.upload("/infer/ixi_sex_phantom_tiny?output=json", tmp_path / "large_T1w.nii.gz", method="POST")
    assert answer["marks"] == ""
    words = ["curl", "--fail", "--silent", "-X", "POST", "-F", f"file=@{scan}", "-o", str(tmp_path / "mask.nii.gz")]
    subprocess.run([*words, f"{server.address}/infer/{HARP}?output=image"], check=True, env=environment())
    mask = nib.load(tmp_path / "mask.nii.gz")
    for name in ("get_sform", "get_qform"):
        (affine, code), (own, own_code) = (getattr(image, name)(coded=True) for image in (mask, flipped))
        assert code == own_code
        np.testing.assert_allclose(affine, own, atol=1e-4)


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
        # An annotator who draws wider than the model has learnt: there is something to learn.
        truth = nib.load(studies.parent / "truth" / f"{name}.nii.gz")
        wide = ndimage.grey_dilation(np.asarray(truth.dataobj), size=3)
        nib.save(nib.Nifti1Image(wide, truth.affine, truth.header), tmp_path / "corrected.nii.gz")
        run_block(page_blocks()[2], server, tmp_path, SCAN=name)
        saved = nib.load(studies / "labels" / "final" / f"{name}.nii.gz")
        assert np.array_equal(np.asarray(saved.dataobj), wide)
    assert server.json("GET", "/info/")["datastore"]["completed"] == 3
    ended = server.train(max_epochs=10, val_split=0.34, learning_rate=0.005)
    assert ended["status"] == "DONE", server.log.read_text()[-5000:]
    stats = server.json("GET", "/info/")["train_stats"][HARP]
    assert sha256_file(model) != before, stats
    assert stats["replaced"] and stats["dice_after"] >= stats["dice_before"] > 0.3
    assert (stats["epoch"], stats["total_epochs"], stats["learning_rate"]) == (10, 10, 0.005)
    assert stats["scored_on"] == "1 validation scans" and stats["best_metric"] == stats["dice_after"]
    # The model before is still there, whole.
    kept = model.with_name(f"model_{before[:8]}.pt")
    assert sha256_file(kept) == before and read_json(kept.with_suffix(".json")) == record_before
    # The record is honest: what it started from, whom it has ever seen, no numbers of the model before.
    record = read_json(model.with_suffix(".json"))
    assert record["sha256"] == sha256_file(model) and record["started_from"]["sha256"] == before
    assert record["provenance"]["volumes"] == record_before["provenance"]["volumes"] + 3
    assert record["subjects"]["training"] + record["subjects"]["validation"] == 3
    keys = {patient_key(f"IXI{number:03d}") for number in range(3)}
    assert set(record["provenance"]["patient_ids"]) == keys | set(record_before["provenance"]["patient_ids"])
    assert record_before["metrics"] and "metrics" not in record
    assert record["provenance"]["monai_version"] != record_before["provenance"]["monai_version"]
    assert record["tags"]["phantom"] == "false" and not is_phantom(record) and is_phantom(record_before)
    # In this environment: MONAI's releases write other keys, and the weights load all the same.
    parser = ConfigParser()
    parser.read_config(str(bundles[HARP] / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def")
    assert load_model(network, model)["sha256"] == record["sha256"]
    states = [torch.load(path, weights_only=True) for path in (model, kept)]
    differing = states[0].keys() ^ states[1].keys()
    assert differing and all("cross_attn" in name for name in differing)
    # Ten mini-batches have trained every part that is trained, at the rate of the request.
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
    ended = server.train(max_epochs=40, val_split=0, learning_rate=0.005)
    assert ended["status"] == "DONE", server.log.read_text()[-5000:]
    stats = server.json("GET", "/info/")["train_stats"][HARP]
    assert stats["scored_on"] == "the training scans" and stats["replaced"], stats["message"]
    record = read_json(model.with_suffix(".json"))
    assert record["started_from"]["sha256"] == first["sha256"] != record["sha256"]
    assert record["started_from"]["started_from"]["sha256"] == first["started_from"]["sha256"]


def test_the_pages_training(server: Server, bundles: dict[str, Path], tmp_path: Path) -> None:
    model = bundles[HARP] / "models" / "model.pt"
    before = sha256_file(model)
    started, listed = run_block(page_blocks()[3], server, tmp_path, **{STARTER: HARP})
    task = json.loads(started)["id"]
    assert task in [row["id"] for row in json.loads(listed)]
    assert server.ended(task)["status"] == "DONE", server.log.read_text()[-5000:]
    info = server.json("GET", "/info/")
    stats = info["train_stats"][HARP]
    assert (sha256_file(model) != before) == stats["replaced"] == (stats["dice_after"] >= stats["dice_before"])
    # A tenth of the bundle's rate.
    assert stats["learning_rate"] == info["trainers"][HARP]["config"]["learning_rate"]
    assert stats["learning_rate"] == pytest.approx(SMALL["learning_rate"] / 10)


def test_a_model_is_never_replaced_by_a_worse_one(server: Server, bundles: dict[str, Path], tmp_path: Path) -> None:
    """A rate that destroys the weights."""
    folder = bundles[HARP] / "models"
    before = {path.name: sha256_file(path) for path in folder.glob("model*")}
    mask = np.asarray(server.mask("sub-IXI003_T1w", tmp_path).dataobj)
    ended = server.train(max_epochs=1, learning_rate=1.0)
    assert ended["status"] == "DONE" and "the training made the model worse" in str(ended["details"])
    stats = server.json("GET", "/info/")["train_stats"][HARP]
    assert not stats["replaced"] and stats["dice_after"] < stats["dice_before"]
    assert {path.name: sha256_file(path) for path in folder.glob("model*")} == before
    assert np.array_equal(np.asarray(server.mask("sub-IXI003_T1w", tmp_path).dataobj), mask)


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
    bundle = tmp_path / "ixi_sex_phantom_tiny"
    shutil.copytree(bundles[bundle.name], bundle)
    torch.save({"x": Call(Path.touch, tmp_path / "ran")}, bundle / "models" / "model.pt")
    (bundle / "models" / "model.json").unlink()
    words = ["--studies", str(studies), "--bundle", str(bundle), "--port", str(free_port())]
    done = subprocess.run(
        command(*words, "--app", str(tmp_path / "app")), capture_output=True, text=True, env=environment(), timeout=180
    )
    assert done.returncode == 1 and "could run code" in done.stderr
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="could run code"):
        load_model(torch.nn.Linear(1, 1), bundle / "models" / "model.pt")
