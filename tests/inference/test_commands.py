# SPDX-License-Identifier: Apache-2.0
"""Scans in any space to results in the same space, by a bundle's own config; bad input named before long work."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from csv_rows import read_rows
from labelled_scans import SIDE, head
from prepared import PRETRAIN, ROOT, make_prepared
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from volta_components.cli import main
from volta_components.data.load import LoadScand
from volta_components.data.preprocess import Settings, prepare_volume
from volta_components.data.volumes import read_volume
from volta_components.downstream.start import save_model
from volta_components.errors import InputError
from volta_components.inference.commands import embed, segment
from volta_components.inference.scans import check_source, prepared_grid
from volta_components.method.networks import VoltaViT
from volta_components.method.weights import load_encoder, save_encoder

CUBE = [SIDE] * 3
# The 48 ways to store a volume: each order of the axes, each in either direction.
ORIENTATIONS = [
    np.array(list(zip(order, signs)))
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
SHAPE = {"isotropic": (36, 40, 34), "anisotropic": (42, 38, 24), "oblique": (40, 38, 30)}
SPACING = {"isotropic": (1.0, 1.0, 1.0), "anisotropic": (0.9, 1.1, 1.7), "oblique": (1.0, 1.1, 1.3)}


class BrightSides(nn.Module):
    """Knows left and right as trained networks do, by the first axis of the prepared volume: what is bright there."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.7))

    def forward(self, image: Tensor) -> Tensor:
        place = torch.arange(image.shape[2], device=image.device) + 0.5
        is_left = (place < image.shape[2] / 2).view(1, 1, -1, 1, 1)
        bright = image > self.threshold
        left, right = bright & is_left, bright & ~is_left
        return 20.0 * torch.cat([~bright, left, right], dim=1).float()


def affine_of(kind: str) -> np.ndarray:
    """RAS or, for ``oblique``, turned by up to 15 degrees about each axis; the world's origin is in the middle."""
    turn = Rotation.from_euler("xyz", (9, -12, 15), degrees=True).as_matrix() if kind == "oblique" else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(SPACING[kind])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE[kind]) - 1) / 2)
    return affine


def image_of(voxels: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return image


@pytest.fixture(scope="session")
def sides_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hippocampus bundle around a network whose output is known."""
    folder = tmp_path_factory.mktemp("bundle") / "sides"
    shutil.copytree(ROOT / "bundles" / "harp_hippocampus" / "configs", folder / "configs")
    config = folder / "configs" / "inference.json"
    content = json.loads(config.read_text())
    content |= {"network_def": {"_target_": f"{__name__}.BrightSides"}, "volume_size": CUBE, "image_size": CUBE}
    config.write_text(json.dumps(content))
    save_model(folder / "models" / "model.pt", BrightSides(), {})
    return folder


@pytest.fixture(scope="session")
def encoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretraining bundle as it is packed: weights in ``model.pt``, sizes of its volumes in the config."""
    folder = tmp_path_factory.mktemp("bundle") / "encoder"
    shutil.copytree(PRETRAIN, folder / "configs")
    config = folder / "configs" / "inference.json"
    sizes = {"hidden_size": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "summary_heads": 4}
    places = {"volume_size": CUBE, "global_size": CUBE, "bundle_root": ".", "num_workers": 0}
    config.write_text(json.dumps(json.loads(config.read_text()) | places | sizes))
    torch.manual_seed(4)
    network = VoltaViT(img_size=CUBE, decoder=False, **sizes)
    with torch.no_grad():
        network.summariser.cls_token.normal_()
        network.patch_embedding.position_embeddings.normal_()
    save_encoder(folder / "models" / "encoder.safetensors", network, {"patient_ids": []})
    record = json.loads((folder / "models" / "encoder.json").read_text())
    for name in ("encoder.safetensors", "encoder.json"):
        (folder / "models" / name).unlink()
    save_model(folder / "models" / "model.pt", network, {})
    made = json.loads((folder / "models" / "model.json").read_text())
    (folder / "models" / "model.json").write_text(json.dumps({**record, "sha256": made["sha256"]}))
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head in every orientation of three kinds of grid, and beside it in ``truth`` its label map."""
    folder = tmp_path_factory.mktemp("raw")
    for kind in SHAPE:
        affine = affine_of(kind)
        voxels, label = head(SHAPE[kind], affine, seed=7)
        for number, orientation in enumerate(ORIENTATIONS):
            for name, array in (("scans", (voxels * 1000).astype(np.int16)), ("truth", label)):
                (folder / name).mkdir(exist_ok=True)
                turned = image_of(array, affine).as_reoriented(orientation)
                nib.save(turned, folder / name / f"sub-{kind}{number:02d}_T1w.nii")
    return folder


# --- the scan's own space --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def segmented(sides_bundle: Path, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("segmented") / "out"
    assert segment([raw / "scans"], output, bundle=sides_bundle) == 0
    return output


@pytest.mark.parametrize("kind", SHAPE)
def test_left_and_right_agree_with_the_world_in_all_orientations(kind: str, raw: Path, segmented: Path) -> None:
    volumes = {row["subject_id"]: row for row in read_rows(segmented / "volumes.csv")}
    codes = set()
    for number in range(48):
        name = f"sub-{kind}{number:02d}"
        scan, truth = (nib.load(raw / part / f"{name}_T1w.nii") for part in ("scans", "truth"))
        mask = nib.load(segmented / f"{name}_T1w_hippocampus.nii.gz")
        codes.add("".join(nib.aff2axcodes(scan.affine)))
        assert mask.shape == scan.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)
        found, wanted = np.asarray(mask.dataobj), np.asarray(truth.dataobj)
        voxel = abs(np.linalg.det(scan.affine[:3, :3]))
        for value, side, sign in ((1, "left", -1), (2, "right", 1)):
            centre, expected = (
                nib.affines.apply_affine(scan.affine, np.argwhere(array == value)).mean(axis=0)
                for array in (found, wanted)
            )
            assert sign * centre[0] > 4  # NIfTI's x points to the patient's right
            np.testing.assert_allclose(centre, expected, atol=0.5)
            both = ((found == value) & (wanted == value)).sum()
            dice = 2 * both / ((found == value).sum() + (wanted == value).sum())
            assert dice > (0.999 if kind == "isotropic" else 0.75)
            assert float(volumes[name][f"{side}_mm3"]) == pytest.approx((found == value).sum() * voxel, abs=0.06)
    assert len(codes) == 48


def test_attention_lies_on_the_scans_grid(encoder_bundle: Path, raw: Path, tmp_path: Path) -> None:
    """Against the map on the prepared grid, looked up at the world coordinates of the scan's voxels."""
    chosen = [raw / "scans" / f"sub-{kind}{number:02d}_T1w.nii" for kind in SHAPE for number in (0, 13, 46)]
    status = embed(chosen, tmp_path, bundle=encoder_bundle, attention=True)
    assert status == 0
    network = load_encoder(encoder_bundle)
    rng = np.random.default_rng(1)
    for path in chosen:
        name = path.name.removesuffix(".nii")
        scan, saved = nib.load(path), nib.load(tmp_path / "attention" / f"{name}_attention.nii.gz")
        assert saved.shape == scan.shape
        np.testing.assert_allclose(saved.affine, scan.affine, atol=1e-4)
        prepared = prepare_volume(read_volume(path), Settings(shape=(SIDE,) * 3))
        with torch.no_grad():
            expected = network.attention_map(torch.from_numpy(prepared.image)[None, None])[0, 0].numpy()
        assert expected.std() > 0.01
        voxels = rng.integers(0, scan.shape, size=(500, 3))
        places = nib.affines.apply_affine(np.linalg.inv(prepared.affine) @ scan.affine, voxels)
        wanted = ndimage.map_coordinates(expected, places.T, order=1, mode="nearest")
        inside = ((places >= 0) & (places <= SIDE - 1)).all(axis=1)
        outside = ((places < -0.01) | (places > SIDE - 0.99)).any(axis=1)
        values = saved.get_fdata()[tuple(voxels.T)]
        assert inside.sum() > 100 and outside.sum() > 20
        np.testing.assert_allclose(values[inside], wanted[inside], rtol=1e-3)
        assert (values[outside] == 0).all()


def test_one_head_has_one_embedding_however_it_is_stored(encoder_bundle: Path, raw: Path, tmp_path: Path) -> None:
    pattern = str(raw / "scans" / "sub-isotropic*")
    assert embed([pattern], tmp_path, bundle=encoder_bundle) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings.csv", "embeddings.jsonl", "embeddings.npz"]
    rows = read_rows(tmp_path / "embeddings.csv")
    assert [row["subject_id"] for row in rows] == [f"sub-isotropic{number:02d}" for number in range(48)]
    assert [Path(row["file"]).parent for row in rows] == [raw / "scans"] * 48
    with np.load(tmp_path / "embeddings.npz") as arrays:  # without pickle
        assert arrays["path"].tolist() == [row["file"] for row in rows]
        assert arrays["subject_id"].tolist() == [row["subject_id"] for row in rows]
        assert arrays["summary"].shape == arrays["mean"].shape == (48, 32)
        assert np.abs(arrays["summary"] - arrays["summary"][0]).max() < 1e-4
        read = np.array([[float(row[f"summary_{i}"]) for i in range(32)] for row in rows])
        np.testing.assert_allclose(read, arrays["summary"], rtol=1e-5, atol=1e-7)
        prepared = prepare_volume(read_volume(rows[5]["file"]), Settings(shape=(SIDE,) * 3)).image
        with torch.no_grad():
            expected = load_encoder(encoder_bundle)(torch.from_numpy(prepared)[None, None])[0].numpy()
        np.testing.assert_allclose(arrays["summary"][5], expected, atol=1e-5)


def test_an_oblique_scan_that_was_prepared_is_not_prepared_again(raw: Path, tmp_path: Path) -> None:
    prepared = prepare_volume(read_volume(raw / "scans" / "sub-oblique00_T1w.nii"), Settings(shape=(SIDE,) * 3))
    path = tmp_path / "prepared.nii"
    nib.save(image_of(0.5 * prepared.image, prepared.affine), path)  # another range, which preparing would change
    loaded = LoadScand("image", 1.0, CUBE)({"image": str(path)})["image"]
    assert torch.equal(loaded[0].as_tensor(), torch.from_numpy(0.5 * prepared.image))


# --- what can be given -----------------------------------------------------------------------------------------------


def test_a_datalist_keeps_its_own_grid_and_ids(encoder_bundle: Path, tmp_path: Path) -> None:
    data = make_prepared(tmp_path / "data", count=4, shape=(16, 16, 16))
    for source, name in ((data, "folder"), (data / "datalist.json", "file")):
        assert embed([source], tmp_path / name, bundle=encoder_bundle) == 0
    rows = read_rows(tmp_path / "folder" / "embeddings.csv")
    assert [(row["subject_id"], row["session"]) for row in rows] == [(f"sub-{i:04d}", "ses-M000") for i in range(4)]
    with (
        np.load(tmp_path / "folder" / "embeddings.npz") as first,
        np.load(tmp_path / "file" / "embeddings.npz") as second,
    ):
        assert np.array_equal(first["summary"], second["summary"])
        volume = nib.load(rows[2]["file"]).get_fdata(dtype=np.float32)
        with torch.no_grad():
            expected = load_encoder(encoder_bundle)(torch.from_numpy(volume)[None, None])[0].numpy()
        np.testing.assert_allclose(first["summary"][2], expected, atol=1e-5)
    assert prepared_grid(str(data), 2.0, [8, 8, 8]) == ((1.0,) * 3, (16,) * 3)
    assert prepared_grid("scan.nii", 2.0, [8, 9, 10]) == ((2.0,) * 3, (8, 9, 10))
    with pytest.raises(InputError, match=r"sources on different grids[^$]*1x1x1 mm +16x16x16[^$]*2x2x2 mm +8x8x8"):
        prepared_grid([str(data), "scan.nii"], 2.0, [8, 8, 8])


def test_a_damaged_datalist_is_refused(encoder_bundle: Path, tmp_path: Path) -> None:
    data = make_prepared(tmp_path / "data", count=3)
    path = data / "images" / "sub-0001_ses-M000.nii"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for run in (
        lambda: embed([data], tmp_path / "out", bundle=encoder_bundle),
        lambda: check_source(data),
    ):
        with pytest.raises(InputError, match=r"1 files of 3 items cannot be used[^$]*sub-0001_ses-M000\.nii"):
            run()
    check_source([data], deep=False)


def test_scans_of_one_name_get_folders(
    sides_bundle: Path, encoder_bundle: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As FreeSurfer's: ``SUBJECT/mri/T1.mgz``."""
    for number in range(2):
        folder = tmp_path / "subjects" / f"bert{number}" / "mri"
        folder.mkdir(parents=True)
        scan = nib.load(raw / "scans" / f"sub-isotropic{number:02d}_T1w.nii")
        nib.save(nib.MGHImage(np.asarray(scan.dataobj), scan.affine), folder / "T1.mgz")
    pattern = str(tmp_path / "subjects" / "*" / "mri" / "T1.mgz")
    assert segment([pattern], tmp_path / "masks", bundle=sides_bundle) == 0
    assert embed([pattern], tmp_path / "maps", bundle=encoder_bundle, attention=True) == 0
    for number in range(2):
        place = Path(f"bert{number}", "mri")
        mask = nib.load(tmp_path / "masks" / place / "T1_hippocampus.nii.gz")
        truth = nib.load(raw / "truth" / f"sub-isotropic{number:02d}_T1w.nii")
        assert np.array_equal(np.asarray(mask.dataobj), np.asarray(truth.dataobj))
        assert (tmp_path / "maps" / "attention" / place / "T1_attention.nii.gz").is_file()
    assert "file names are not unique" in capsys.readouterr().out

    other = tmp_path / "subjects" / "bert0" / "mri" / "T1.nii"
    shutil.copy(raw / "scans" / "sub-isotropic00_T1w.nii", other)
    with pytest.raises(InputError, match=r"would have the same name[^$]*T1\.mgz[^$]*T1\.nii"):
        segment([other.parent], tmp_path / "clash", bundle=sides_bundle)


def test_dicom_series_are_converted(sides_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = pytest.importorskip("tiny_datasets")
    affine = affine_of("anisotropic")
    voxels, label = head(SHAPE["anisotropic"], affine, seed=7)
    turned, truth = (image_of(a, affine).as_reoriented(ORIENTATIONS[13]) for a in (voxels * 1000, label))
    tiny.write_series(tmp_path / "dicom" / "t1", np.asarray(turned.dataobj), turned.affine)
    tiny.write_series(tmp_path / "dicom" / "t2", np.asarray(turned.dataobj), turned.affine, "Axial PD-T2 TSE", number=4)
    broken = tmp_path / "dicom" / "broken"
    broken.mkdir()
    (broken / "slice.dcm").write_bytes(bytes(128) + b"DICM" + b"\x01" * 40)
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"1 of 2 scans cannot be used[^$]*broken"):
        segment([tmp_path / "dicom"], output, bundle=sides_bundle)
    capsys.readouterr()
    assert segment([tmp_path / "dicom"], output, bundle=sides_bundle, skip_bad=True) == 0
    printed = capsys.readouterr()
    assert "1 T1 series converted" in printed.out and "Axial PD-T2 TSE" in printed.out
    assert "1 of 2 scans are left out" in printed.err and "broken" in printed.err
    (row,) = read_rows(output / "volumes.csv")
    assert (row["subject_id"], row["session"]) == ("sub-ADNI002S0295", "ses-20060418")
    scan, mask = nib.load(row["file"]), nib.load(output / "sub-ADNI002S0295_ses-20060418_hippocampus.nii.gz")
    assert Path(row["file"]).parent == output / "converted"
    assert mask.shape == scan.shape
    for value in (1, 2):
        centres = [
            nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) == value)).mean(axis=0)
            for image in (mask, truth)
        ]
        np.testing.assert_allclose(*centres, atol=0.5)


# --- bad input -------------------------------------------------------------------------------------------------------


# --- what is odd about a scan ----------------------------------------------------------------------------------------


def header_of(path: Path) -> dict[str, Any]:
    header = nib.load(path).header
    names = ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z")
    return {name: np.array(header[name])[:4] if name == "pixdim" else np.array(header[name]) for name in names}


@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 2), (3, 0), (0, 4)])
def test_masks_and_maps_have_the_transforms_of_their_scan(
    sides_bundle: Path, encoder_bundle: Path, tmp_path: Path, qform_code: int, sform_code: int
) -> None:
    affine = affine_of("oblique")
    image = nib.Nifti1Image((head(SHAPE["oblique"], affine, seed=7)[0] * 1000).astype(np.int16), affine)
    shifted = affine.copy()
    shifted[:3, 3] += [0, 60, 0]
    image.set_sform(affine, sform_code)
    image.set_qform(shifted if sform_code and qform_code else affine, qform_code)
    scan = tmp_path / "scan_T1w.nii.gz"
    image.to_filename(scan)
    segment([scan], tmp_path / "masks", bundle=sides_bundle)
    embed([scan], tmp_path / "maps", bundle=encoder_bundle, attention=True)
    made = (tmp_path / "masks" / "scan_T1w_hippocampus.nii.gz", tmp_path / "maps/attention/scan_T1w_attention.nii.gz")
    for path in made:
        for name, value in header_of(path).items():
            assert np.array_equal(value, header_of(scan)[name]), name
    assert np.asarray(nib.load(made[0]).dataobj).dtype == np.uint8
    row, *_ = read_rows(tmp_path / "masks" / "volumes.csv")
    assert ("qform (code 1) and sform (code 2) disagree: up to 60.0 mm" in row["marks"]) is bool(
        sform_code and qform_code
    )


def test_a_scan_without_orientation_needs_one_by_the_user(
    sides_bundle: Path, encoder_bundle: Path, raw: Path, tmp_path: Path
) -> None:
    scan = tmp_path / "scan.img"
    source = nib.load(raw / "scans" / "sub-isotropic00_T1w.nii")
    codes = "".join(nib.aff2axcodes(source.affine))
    image = nib.AnalyzeImage(np.array(source.dataobj), None)
    image.header.set_zooms(source.header.get_zooms())
    image.to_filename(scan)
    for command, bundle in ((segment, sides_bundle), (embed, encoder_bundle)):
        output = tmp_path / command.__name__
        with pytest.raises(InputError, match="no orientation"):
            command([scan], output, bundle=bundle)
        with pytest.raises(InputError, match="three axis codes"):
            command([scan], output, bundle=bundle, assume_orientation="RRS")
        assert command([scan], output, bundle=bundle, assume_orientation=codes.lower()) == 0
    mask = nib.load(tmp_path / "segment" / "scan_hippocampus.nii.gz")
    truth = nib.load(raw / "truth" / "sub-isotropic00_T1w.nii")
    for value in (1, 2):
        ours, true = np.asarray(mask.dataobj) == value, np.asarray(truth.dataobj) == value
        assert 2 * (ours & true).sum() / (ours.sum() + true.sum()) > 0.8


def test_marks_stand_beside_the_results_and_on_the_console(
    sides_bundle: Path, encoder_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    affine = affine_of("isotropic")
    whole = image_of((head(SHAPE["isotropic"], affine, seed=7)[0] * 1000).astype(np.int16), affine)
    folder = tmp_path / "scans"
    folder.mkdir()
    whole.slicer[:18].to_filename(folder / "half.nii")
    for command, bundle, table in ((segment, sides_bundle, "volumes"), (embed, encoder_bundle, "embeddings")):
        command([folder], tmp_path / table, bundle=bundle)
        (row,) = read_rows(tmp_path / table / f"{table}.csv")
        assert "the field of view ends within the head at the right" in row["marks"]
        error = capsys.readouterr().err
        assert "1 of 1 scans are marked" in error and row["marks"] in error


def test_a_bundle_without_a_trained_model_is_used_with_the_one_that_ships(
    sides_bundle: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "sides"
    shutil.copytree(sides_bundle, bundle)
    overlay = {"init": "starter", "network_def": {"_target_": f"{__name__}.BrightSides"}, "largest_part": True}
    (bundle / "configs" / "starter.json").write_text(json.dumps(overlay))
    save_model(bundle / "models" / "model_starter.pt", BrightSides(), {})
    scan = raw / "scans" / "sub-isotropic00_T1w.nii"
    assert segment([scan], tmp_path / "own", bundle=bundle) == 0
    assert "model_starter" not in capsys.readouterr().out
    (bundle / "models" / "model.pt").unlink()
    assert segment([scan], tmp_path / "shipped", bundle=bundle) == 0
    assert "model_starter.pt: the small model that ships" in capsys.readouterr().out
    own, shipped = (np.asarray(nib.load(next((tmp_path / n).rglob("*.nii.gz"))).dataobj) for n in ("own", "shipped"))
    assert (shipped > 0).any()
    for side in (1, 2):  # the overlay's: each side keeps its largest part
        assert ndimage.label(shipped == side, np.ones((3, 3, 3)))[1] == 1
    assert ((shipped > 0) <= (own > 0)).all()


@pytest.fixture
def scans(raw: Path, tmp_path: Path) -> Path:
    """Two good scans, one in a zipped file."""
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(raw / "scans" / "sub-isotropic00_T1w.nii", folder)
    nib.save(nib.load(raw / "scans" / "sub-oblique20_T1w.nii"), folder / "sub-zipped_T1w.nii.gz")
    return folder


def test_scans_that_cannot_be_used_are_named_together(
    sides_bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = scans / "sub-zipped_T1w.nii.gz"
    image = nib.load(good)
    (scans / "a_cut.nii.gz").write_bytes(good.read_bytes()[:5000])
    (scans / "b_empty.nii").touch()
    nib.save(nib.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine), scans / "c_nan.nii")
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 4), np.int16), np.eye(4)), scans / "d_bold.nii")
    output = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        segment([scans], output, bundle=sides_bundle)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 of 6 scans cannot be used:"
    for line, words in zip(
        lines[1:5],
        (("a_cut.nii.gz", "truncated"), ("b_empty.nii", "empty file"), ("c_nan.nii", "NaN"), ("d_bold.nii", "4-D")),
        strict=True,
    ):
        assert all(word in line for word in words)
    assert "--skip-bad" in lines[-1]
    assert list(output.iterdir()) == []  # nothing was done yet

    assert segment([scans], output, bundle=sides_bundle, skip_bad=True) == 0
    assert [row["subject_id"] for row in read_rows(output / "volumes.csv")] == ["sub-isotropic00", "sub-zipped"]
    assert "4 of 6 scans are left out" in capsys.readouterr().err
    with pytest.raises(InputError, match="no scan is left"):
        segment([scans / "b_empty.nii"], output, bundle=sides_bundle, skip_bad=True)


def test_wrong_options_are_told_before_anything_is_done(sides_bundle: Path, scans: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"source": [scans / "none.nii", scans / "nix*.nii"]},
            r"2 of the given sources are not there[^$]*none\.nii[^$]*nix",
        ),
        ({"output": scans / "masks"}, r"masks lies in --source .*scans"),
        ({"bundle": tmp_path / "nobody"}, r"nobody/configs/inference\.json: no such bundle; .*--bundle"),
        (
            {"bundle": ROOT / "bundles" / "ixi_sex"},
            r"ixi_sex: its network gives format .* instead of 'segmentation'",
        ),
        ({"overlays": ["tinny"]}, r"tinny\.json: no such overlay"),
        ({"device": "cuda:99"}, r"--device cuda:99: cannot be used here"),
        ({"device": "gpu"}, r"--device gpu: cannot be used here"),
    ]
    for changes, message in cases:
        given = {"source": [scans], "output": output, "bundle": sides_bundle, **changes}
        with pytest.raises(InputError, match=message):
            segment(**given)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no scans in it"):
        segment([tmp_path / "nothing"], output, bundle=sides_bundle)


def test_weights_that_are_missing_or_changed(
    sides_bundle: Path, encoder_bundle: Path, scans: Path, tmp_path: Path
) -> None:
    for run, bundle in ((segment, sides_bundle), (embed, encoder_bundle)):
        copy = tmp_path / bundle.name
        shutil.copytree(bundle, copy)
        model = copy / "models" / "model.pt"
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.pt: its SHA-256 is not that of model\.json"):
            run([scans], tmp_path / "out", bundle=copy)
        record = model.with_suffix(".json").rename(tmp_path / f"{bundle.name}.json")
        shutil.copy(bundle / "models" / "model.pt", model)
        with pytest.raises(InputError, match=r"model\.pt: weights of a bundle, but no model\.json with their hash"):
            run([scans], tmp_path / "out", bundle=copy)
        record.rename(model.with_suffix(".json"))
        model.unlink()
        with pytest.raises(InputError, match=r"no such weights|no encoder in it"):
            run([scans], tmp_path / "out", bundle=copy)


# --- the command -----------------------------------------------------------------------------------------------------


def test_commands_run_from_within_a_bundle_and_tell_what_they_made(
    encoder_bundle: Path,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(encoder_bundle)
    hook = sys.excepthook
    assert main(["embed", "--source", str(scans), "--output", str(tmp_path / "out")]) == 0
    assert sys.excepthook is hook
    out, err = capsys.readouterr()
    assert out.strip() == f"2 embeddings in {tmp_path / 'out' / 'embeddings.csv'} and .npz"
    assert "reading" in err and "2/2" in err  # progress, and nothing of logging
    assert "WARNING" not in out + err
    assert main(["embed", "--source", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("volta3d embed: 1 of the given sources are not there:\n")


@pytest.mark.slow
def test_ctrl_c_ends_a_real_process_with_one_line(encoder_bundle: Path, raw: Path, tmp_path: Path) -> None:
    words = [
        "embed",
        "--source",
        str(raw / "scans"),
        "--output",
        str(tmp_path / "out"),
        "--bundle",
        str(encoder_bundle),
    ]
    command = [str(Path(sys.executable).with_name("volta3d")), *words, "--attention"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while "Iteration" not in (tmp_path / "log.txt").read_text() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(60) == 130
    output = (tmp_path / "log.txt").read_text()
    assert output.count("volta3d embed: interrupted") == 1
    assert "Traceback" not in output and "exception" not in output
    assert not list((tmp_path / "out").rglob(".partial-*"))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    encoder_bundle: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed([raw / "scans"], tmp_path / "whole", bundle=encoder_bundle, attention=True) == 0
    words = ["embed", "--source", str(raw / "scans"), "--output", str(tmp_path / "broken"), "--attention"]
    command = [str(Path(sys.executable).with_name("volta3d")), *words, "--bundle", str(encoder_bundle)]
    journal = tmp_path / "broken" / "embeddings.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not journal.is_file() or len(journal.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "broken" / "embeddings.csv").is_file()
    done = len(journal.read_text().splitlines())
    first = sorted((tmp_path / "broken" / "attention").glob("*.nii.gz"))[0]
    written = first.stat().st_mtime_ns
    capsys.readouterr()
    assert embed([raw / "scans"], tmp_path / "broken", bundle=encoder_bundle, attention=True) == 0
    assert f"{done} of 144 volumes are done already" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written
    for name in ("embeddings.csv", "embeddings.npz"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "broken" / "attention").glob("*.nii.gz"))) == 144


def test_only_what_is_missing_is_segmented(
    sides_bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"

    def run() -> tuple[str, list[dict[str, str]], dict[str, int]]:
        assert segment([scans], output, bundle=sides_bundle) == 0
        masks = {path.name: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
        return capsys.readouterr().out, read_rows(output / "volumes.csv"), masks

    said, rows, before = run()
    assert "done already" not in said and len(rows) == len(before) == 2
    said, again, after = run()
    assert "2 of 2 volumes are done already" in said and again == rows and after == before
    # A mask that is gone and a scan that is new are made; the table has all, in the scans' order.
    missing = sorted(before)[0]
    (output / missing).unlink()
    new = scans / "sub-a_T1w.nii"
    shutil.copy(sorted(scans.iterdir())[0], new)
    said, rows, after = run()
    assert "1 of 3 volumes are done already" in said
    assert [Path(row["file"]) for row in rows] == sorted(scans.iterdir())
    assert len(after) == 3
    assert [name for name in before if after[name] == before[name]] == sorted(before)[1:]


@pytest.fixture(autouse=True)
def _path_of_modules() -> Iterator[None]:
    """``monai.bundle`` puts each bundle's folder on the path."""
    before = list(sys.path)
    yield
    sys.path[:] = before
