# SPDX-License-Identifier: Apache-2.0
"""A real MONAI Label server against web pages, names and settings that mean harm, and with 3D Slicer's own client."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from label_server import FORM, HARP, Server, command, environment, running
from web import free_port

pytestmark = [pytest.mark.label_server, pytest.mark.slow]


def test_web_pages_of_others_are_refused(server: Server) -> None:
    own = f"http://localhost:{server.address.rsplit(':', 1)[1]}"
    assert "403" in server.refused("GET", "/info/", Origin="http://evil.example")
    assert "403" in server.refused("POST", f"/infer/{HARP}?image=sub-IXI000_T1w", b"params={}", Origin="null")
    assert "403" in server.refused("DELETE", "/datastore/image?id=sub-IXI000_T1w", Origin=own)
    # A name that somebody lets point to this machine.
    assert "403" in server.refused("GET", "/info/", Host="evil.example:8000")
    request = urllib.request.Request(server.address + "/info/", headers={"Origin": server.address})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
        assert response.headers.get("Access-Control-Allow-Origin") in (None, server.address)


def test_nothing_is_written_outside_of_the_studies(server: Server, studies: Path, tmp_path: Path) -> None:
    before = {path for path in studies.parent.rglob("*") if "app" not in path.parts}
    scan = studies / "sub-IXI000_T1w.nii.gz"
    for name in ("../evil", "..%2Fevil", "%2e%2e/evil", "a/b", "a%5Cb", "/tmp/evil", ".lock", "$x"):
        assert "detail" in server.upload(f"/datastore/image?image={name}", scan), name
        assert "detail" in server.upload(f"/datastore/label?image={name}", scan, "label"), name
    assert "detail" in server.upload("/datastore/label?image=sub-IXI000_T1w&tag=../../evil", scan, "label")
    # What is no volume, such as the list of the studies itself.
    assert "NIfTI" in server.upload("/datastore/image?image=datastore_v2", scan, name="x.json")["detail"]
    assert "NIfTI" in server.upload("/datastore/image", scan, name="...py")["detail"]
    (outside := tmp_path / "outside.nii.gz").write_bytes(b"as it was")
    link = studies / "link.nii.gz"
    link.symlink_to(outside)
    try:
        assert "leaves the studies" in server.upload("/datastore/image?image=link", scan)["detail"]
    finally:
        link.unlink()
    assert outside.read_bytes() == b"as it was"
    assert {path for path in studies.parent.rglob("*") if "app" not in path.parts} == before
    assert "403" in server.refused("DELETE", f"/model/{HARP}")
    assert "archives" in server.refused("PUT", "/session/?uncompress=true", b"x")


def test_a_password_lets_other_machines_in(bundles: dict[str, Path], studies: Path, tmp_path: Path) -> None:
    port, app = free_port(), tmp_path / "app"
    words = ["--studies", str(studies), "--bundle", str(bundles[HARP]), "--host", "0.0.0.0", "--port", str(port)]
    words = command(*words, "--app", str(app), "--names", "labels.lab", "--origins", "http://viewer.lab")
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 2 and "LABEL_PASSWORD" in done.stderr
    with running(words, f"http://127.0.0.1:{port}", app, LABEL_PASSWORD="pass word") as made:
        assert "401" in made.refused("GET", "/info/")
        viewer = made.client(tmp_path)
        assert viewer.auth_enabled()
        with pytest.raises(Exception, match="wrong password"):
            viewer.auth_token("anybody", "guess")
        viewer.update_auth(viewer.auth_token("anybody", "pass word"))
        assert viewer.auth_valid_token() and set(viewer.info()["models"]) == {HARP}
        key = {"Authorization": "Bearer pass word"}
        for host in (f"labels.lab:{port}", f"192.0.2.7:{port}", f"localhost:{port}"):
            made.request("GET", "/info/", Host=host, **key)
        assert "403" in made.refused("GET", "/info/", Host="evil.example", **key)
        request = urllib.request.Request(made.address + "/info/", headers={"Origin": "http://viewer.lab", **key})
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "http://viewer.lab"


def test_what_is_wrong_with_a_request_is_said(server: Server, studies: Path) -> None:
    """A model's name from elsewhere, and a scan without a head."""
    for name, message in (("absent.pt", "no such model"), ("../../x.pt", "give a name, not a path")):
        body = "params=" + json.dumps({"model_filename": name})
        with pytest.raises(AssertionError, match=f"422 .*{message}"):
            server.request("POST", f"/infer/{HARP}?image=sub-IXI001_T1w", body.encode(), FORM)
    empty = studies.parent / "empty.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((32, 32, 32), np.int16), np.eye(4)), empty)
    assert server.upload("/datastore/image?image=empty", empty) == {"image": "empty"}
    try:
        with pytest.raises(AssertionError, match=r"422 .*empty\.nii\.gz"):
            server.request("POST", f"/infer/{HARP}?image=empty")
    finally:
        server.request("DELETE", "/datastore/image?id=empty")
    for path in (f"/infer/{HARP}?image=absent", "/infer/absent?image=sub-IXI001_T1w", "/batch/infer/absent"):
        assert "404" in (said := server.refused("POST", path)) and "no such" in said, path
    assert "404" in server.refused("POST", "/train/absent", b"{}", "application/json")
    said = server.refused("POST", "/train/ixi_sex_phantom_tiny", b"{}", "application/json")
    assert "422" in said and "is not trained here" in said and HARP in said
    # Texts that MONAI would run.
    ran = studies.parent / "ran"
    code = f"$__import__('os').mkdir({str(ran)!r})"
    body = "params=" + urllib.parse.quote(json.dumps({"device": code}))
    assert "422" in server.refused("POST", f"/infer/{HARP}?image=sub-IXI001_T1w", body.encode())
    body = "params=" + json.dumps({"image": str(empty)})
    assert "params may not have image" in server.refused("POST", f"/infer/{HARP}?image=x", body.encode())
    for given, answer in (("[1]", "params is no JSON object"), ('{"device": 1}', "give cpu or cuda:0")):
        said = server.refused("POST", f"/infer/{HARP}?image=sub-IXI001_T1w", f"params={given}".encode())
        assert "422" in said and answer in said, given
    assert server.train(max_epochs=1, device=code)["status"] == "ERROR" and not ran.exists()
    body = "params=" + json.dumps({"save_label": True, "label_tag": "../../evil"})
    assert "label_tag" in server.refused("POST", f"/infer/{HARP}?image=sub-IXI001_T1w", body.encode())
    # Scans by their paths, and a folder from which Python would take modules.
    for path in (f"/train/{HARP}", "/train/", "/batch/infer/ixi_sex_phantom_tiny", "/scoring/x"):
        for given in ({"bundle_path": "/evil"}, {HARP: {"bundle_path": "/evil"}}, {"images": [str(empty)]}):
            said = server.refused("POST", path, json.dumps(given).encode(), "application/json")
            assert "422" in said and "params may not have" in said, (path, given)


def test_a_training_takes_only_the_settings_that_it_offers(server: Server, studies: Path) -> None:
    """Clients choose neither where runs are tracked nor what else a config has."""
    offered = server.json("GET", "/info/")["trainers"][HARP]["config"]
    names = {"device", "pretrained", "max_epochs", "val_split", "model_filename", "learning_rate"}
    assert set(offered) == names
    scan, evil = "sub-IXI000_T1w", studies.parent / "evil"
    truth = studies.parent / "truth" / f"{scan}.nii.gz"
    server.upload(f"/datastore/label?image={scan}&tag=final", truth, "label")
    asked = {
        "tracking": "mlflow",
        "tracking_uri": evil.as_uri(),
        "tracking_experiment_name": "x",
        "output_dir": str(evil),
    }
    try:
        ended = server.train(max_epochs=1, **asked)
    finally:
        server.request("DELETE", f"/datastore/label?id={scan}&tag=final")
    log = server.log.read_text()
    assert ended["status"] == "DONE" and not evil.exists(), log[-5000:]
    assert all(name in log.split("not taken from clients: ")[-1].splitlines()[0] for name in asked)


def test_slicers_client_reads_a_class_and_a_mask(server: Server, tmp_path: Path) -> None:
    viewer = server.client(tmp_path)
    file, answer = viewer.infer("ixi_sex_phantom_tiny", "sub-IXI001_T1w", {})
    assert [row["label"] for row in answer["prediction"]] == ["male", "female"]
    assert not np.asarray(nib.load(file).dataobj).any()
    file, answer = viewer.infer(HARP, "sub-IXI001_T1w", {})
    assert answer["label_names"] == {"left hippocampus": 1, "right hippocampus": 2}
    expected = np.asarray(server.mask("sub-IXI001_T1w", tmp_path).dataobj)
    assert np.array_equal(np.asarray(nib.load(file).dataobj), expected) and expected.any()


def test_masks_of_all_scans_are_made_without_a_gpu(server: Server, studies: Path, tmp_path: Path) -> None:
    task = server.json("POST", f"/batch/infer/{HARP}")
    assert server.ended(task["id"], "batch/infer")["status"] == "DONE", server.log.read_text()[-5000:]
    made = sorted((studies / "labels" / "original").glob("*.nii.gz"))
    assert [path.name for path in made] == sorted(path.name for path in studies.glob("*.nii.gz"))
    expected = np.asarray(server.mask("sub-IXI000_T1w", tmp_path).dataobj)
    assert np.array_equal(np.asarray(nib.load(made[0]).dataobj), expected)


def test_slicers_numbers_become_the_models(server: Server, studies: Path, tmp_path: Path) -> None:
    """Its export numbers segments from 1 on, whatever they are."""
    viewer, name = server.client(tmp_path), "sub-IXI000_T1w"
    truth = nib.load(studies.parent / "truth" / f"{name}.nii.gz")
    labels = np.asarray(truth.dataobj)
    exported = tmp_path / "exported.nii.gz"
    nib.save(
        nib.Nifti1Image(np.where(labels == 1, 3, np.where(labels == 2, 4, 0)).astype(np.int16), truth.affine), exported
    )
    segments = ["healthy", "ad", "left hippocampus", "Right_Hippocampus"]
    info = [{"name": segment, "idx": place} for place, segment in enumerate(segments, start=1)]
    viewer.save_label(name, str(exported), "final", {"label_info": info})
    saved = nib.load(studies / "labels" / "final" / f"{name}.nii.gz")
    assert np.array_equal(np.asarray(saved.dataobj), labels)
    np.testing.assert_allclose(saved.affine, truth.affine, atol=1e-5)
    for wrong, said in (([], "without a name: 3, 4"), ([*info[:2], {"name": "tumour", "idx": 3}, info[3]], "tumour")):
        with pytest.raises(Exception) as caught:
            viewer.save_label(name, str(exported), "final", {"label_info": wrong})
        assert said in caught.value.msg and name in caught.value.msg
    assert np.array_equal(np.asarray(nib.load(saved.get_filename()).dataobj), labels)
    server.request("DELETE", f"/datastore/label?id={name}&tag=final")
