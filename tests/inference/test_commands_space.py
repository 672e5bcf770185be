# SPDX-License-Identifier: Apache-2.0
"""``volta3d segment`` and ``embed``: results lie in the scan's own space."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from csv_rows import read_rows
from inference_bundles import CUBE, SHAPE, embed, image_of, segment
from labelled_scans import SIDE
from scipy import ndimage

from volta_components.data.load import LoadScand
from volta_components.data.preprocess import Settings, prepare_volume
from volta_components.data.volumes import read_volume
from volta_components.method.weights import load_encoder


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
            volume = torch.from_numpy(prepared.image)[None, None]
            expected = network.attention_on_voxels(network.encode(volume), volume)[0, 0].numpy()
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
