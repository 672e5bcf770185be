# SPDX-License-Identifier: Apache-2.0
"""Masks of other tools, on grids of their own."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from fake_runs import brain
from nibabel.processing import conform

from volta_components.downstream.metrics import score_mask
from volta_components.errors import InputError
from volta_components.report.masks import read_mask


def score(mask, truth):
    return score_mask(np.asanyarray(mask.dataobj), np.asanyarray(truth.dataobj), (2.0, 2.0, 2.0))


def test_freesurfer_labels_on_freesurfers_grid(tmp_path):
    _, truth = brain(0)
    array = np.asanyarray(truth.dataobj)
    aseg = np.where(array == 1, 17, np.where(array == 2, 53, 0)).astype(np.uint8)
    aseg[0, 0, 0] = 41  # some other structure
    # As FreeSurfer: 1 mm cubes, axes left, inferior, anterior.
    fine = conform(nib.Nifti1Image(aseg, truth.affine), (128, 128, 128), (1.0, 1.0, 1.0), order=0, orientation="LIA")
    path = tmp_path / "aseg.mgz"
    nib.save(nib.MGHImage(np.asanyarray(fine.dataobj).astype(np.uint8), fine.affine), path)
    mask = read_mask(path, truth)
    assert mask.shape == truth.shape
    found = score(mask, truth)
    assert found["dice_left"] > 0.9 and found["dice_right"] > 0.9 and found["failures"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: np.where(a == 1, 2, np.where(a == 2, 1, 0)), "left and right are swapped"),
        (lambda a: a > 0, "has both sides under one label; give the right one 2"),
        (lambda a: a * 3, r"labels \[0, 3, 6\]"),
        (lambda a: np.stack([a, a], -1), "4 axes instead of 3"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path, change, message):
    _, truth = brain(0)
    nib.save(nib.Nifti1Image(change(np.asanyarray(truth.dataobj)).astype(np.uint8), truth.affine), tmp_path / "m.nii")
    with pytest.raises(InputError, match=message):
        read_mask(tmp_path / "m.nii", truth)


def test_a_tool_may_find_one_side_only(tmp_path):
    _, truth = brain(0)
    left = (np.asanyarray(truth.dataobj) == 1).astype(np.uint8)
    nib.save(nib.Nifti1Image(left, truth.affine), tmp_path / "m.nii")
    found = score(read_mask(tmp_path / "m.nii", truth), truth)
    assert found["dice_left"] == 1 and found["failures"] == 1


def test_a_mask_elsewhere_in_the_world_is_not_a_failed_one(tmp_path):
    _, truth = brain(0)
    affine = truth.affine.copy()
    affine[2, 3] += 500
    nib.save(nib.Nifti1Image(np.asanyarray(truth.dataobj), affine), tmp_path / "m.nii")
    with pytest.raises(InputError, match="lies outside the scan"):
        read_mask(tmp_path / "m.nii", truth)


def test_a_truncated_file_is_named(tmp_path):
    (tmp_path / "m.nii.gz").write_bytes(b"\x1f\x8b not a volume")
    with pytest.raises(InputError, match=r"m.nii.gz: not a readable volume"):
        read_mask(tmp_path / "m.nii.gz", brain(0)[1])
