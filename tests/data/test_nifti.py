# SPDX-License-Identifier: Apache-2.0
"""NIfTI files, read back by NiBabel."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from volta_components.data.nifti import write_label_map, write_nifti, write_picture_volume
from volta_components.data.volumes import Volume

TURNED = np.array([[0.0, -2.0, 0.0, 30.0], [1.0, 0.0, 0.0, -20.0], [0.0, 0.0, 1.5, 5.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_voxels_and_grid_come_back_and_the_same_volume_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    voxels = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    write_nifti(tmp_path / name, voxels, TURNED)
    image = nib.load(tmp_path / name)
    assert np.array_equal(np.asanyarray(image.dataobj), voxels)
    assert image.get_data_dtype() == np.float32
    for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert np.allclose(affine, TURNED, atol=1e-6) and code == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    write_nifti(tmp_path / "again" / name, voxels, TURNED)
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_label_map_is_stored_as_it_is(tmp_path: Path) -> None:
    mask = np.arange(60).reshape(3, 4, 5) % 3
    write_label_map(tmp_path / "a.nii.gz", mask, TURNED)
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == np.uint8 and np.array_equal(np.asanyarray(image.dataobj), mask)


def test_a_picture_volume_has_256_steps_of_the_intensity(tmp_path: Path) -> None:
    stored = np.linspace(-500, 2500, 60).reshape(3, 4, 5).astype(np.int16)
    write_picture_volume(tmp_path / "a.nii.gz", Volume(stored, TURNED, slope=1 / 2000, intercept=0.0, code=1))
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == np.uint8
    assert np.abs(image.get_fdata() - np.clip(stored / 2000, 0, 1)).max() <= 0.5 / 255 + 1e-6
