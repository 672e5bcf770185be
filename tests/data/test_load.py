# SPDX-License-Identifier: Apache-2.0
"""Scans reach the network as they were prepared for training."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tiny_datasets as tiny
import torch
from labelled_scans import SIDE, make_labelled, write_head

from volta_components.data.datalist import load_datalist
from volta_components.data.load import LoadScand
from volta_components.data.preprocess import Settings, prepare_volume
from volta_components.data.volumes import read_volume
from volta_components.errors import InputError


@pytest.fixture
def scan(tmp_path: Path) -> dict[str, str]:
    return write_head(tmp_path / "raw")


def test_a_prepared_volume_is_taken_as_it_is(tmp_path: Path) -> None:
    item = load_datalist(make_labelled(tmp_path / "data", count=2, folds=2)).items[1]
    loaded = LoadScand("image", 1.0, [SIDE] * 3, label_key="label")(item)
    for key in ("image", "label"):
        stored = nib.load(item[key])
        assert np.array_equal(loaded[key][0].numpy(), np.asarray(stored.dataobj))
        assert np.array_equal(loaded[key].affine.numpy(), stored.affine)
    assert loaded["label"].dtype == torch.uint8


def test_a_raw_scan_is_prepared_as_volta3d_prepare_does(scan: dict[str, str]) -> None:
    image, label = (nib.load(scan[key]) for key in ("image", "label"))
    settings = Settings((1.0,) * 3, (SIDE,) * 3)
    expected = prepare_volume(read_volume(scan["image"]), settings, np.asarray(label.dataobj), label.affine)
    loaded = LoadScand("image", 1.0, [SIDE] * 3, label_key="label")(scan)
    assert np.array_equal(loaded["image"][0].numpy(), expected.image)
    assert np.array_equal(loaded["label"][0].numpy(), expected.label)
    assert np.array_equal(loaded["image"].meta["original_affine"], image.affine)
    assert tuple(loaded["image"].meta["spatial_shape"]) == image.shape
    for nothing in ({}, {"label": None}):
        alone = LoadScand("image", 1.0, [SIDE] * 3, label_key="label")({"image": scan["image"], **nothing})
        assert set(alone) == {"image"}
    without = LoadScand("image", 1.0, [SIDE] * 3)({**scan, "label": 1, "session": None})
    assert (without["label"], without["session"]) == (1, "")  # a class is no label map; None cannot be collated


def test_a_broken_scan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "flat.nii.gz"
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), 7, np.int16), np.eye(4)), path)
    with pytest.raises(InputError, match=r"flat\.nii\.gz.*constant"):
        LoadScand("image", 1.0, [SIDE] * 3)({"image": str(path)})


def test_marks_of_a_datalist_go_with_its_prepared_volumes(tmp_path):
    """A prepared volume looks sound; what its scan was marked for is known of the datalist alone."""
    item = {**load_datalist(make_labelled(tmp_path / "data", count=2, folds=2)).items[0], "marks": "qform flipped"}
    datalist = load_datalist(tmp_path / "data")
    loaded = LoadScand("image", datalist.spacing, datalist.shape)(item)
    assert loaded["image"].meta["marks"] == "qform flipped" and "marks" not in loaded


def test_a_mark_of_a_datalist_is_not_told_twice(tmp_path):
    """On another grid than the network's, a prepared volume is looked at again."""
    shape, affine = tiny.grid("RAS", (3.0, 3.0, 3.0), (64, 76, 64), centre=(0, 0, 0))
    radius = np.linalg.norm(tiny.world(shape, affine) / [70, 88, 80], axis=-1)
    head = 300 * (radius < 1) + np.random.default_rng(0).rayleigh(6, shape)
    nib.save(nib.Nifti1Image(head[:39].astype(np.float32), affine), tmp_path / "cut.nii")
    load = LoadScand("image", 3.0, (48, 64, 64))
    found = load({"image": str(tmp_path / "cut.nii")})["image"].meta["marks"]
    said = "the field of view ends within the head at the right (99 % of its largest cross-section lie there)"
    assert found.startswith("the field of view ends within the head at the right (")
    again = load({"image": str(tmp_path / "cut.nii"), "marks": f"qform flipped; {said}"})["image"].meta["marks"]
    assert again == "; ".join([f"qform flipped; {said}", *found.split("; ")[1:]])
