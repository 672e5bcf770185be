# SPDX-License-Identifier: Apache-2.0
"""The pictures that MLflow gets with a run."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from PIL import Image, ImageColor

from volta_components.data.labels import SIDE_COLOURS
from volta_components.downstream.pictures import coronal_slice, write_classification_picture, write_overlay


def test_the_picture_of_a_classifier_has_curve_and_matrix(tmp_path):
    write_classification_picture(tmp_path / "scored.png", [0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], 0.5, ["male", "female"])
    with Image.open(tmp_path / "scored.png") as picture:
        for half in np.array_split(np.asarray(picture.convert("L")), 2, axis=1):
            assert len(np.unique(half)) > 10


def test_the_overlay_has_both_sides_in_their_colours(tmp_path):
    truth = np.zeros((40, 30, 20), np.uint8)
    truth[4:14, 10:20, 5:12], truth[26:36, 10:20, 5:12] = 1, 2
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    files = []
    for name, array in {"image": np.full(truth.shape, 0.4, np.float32), "truth": truth, "mask": truth}.items():
        files.append(tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(array, affine), files[-1])
    background, planes, aspect = coronal_slice({"image": nib.load(files[0]), "truth": nib.load(files[1])})
    assert aspect == 1.5 and set(np.unique(planes["truth"])) == {0, 1, 2} and background.shape == planes["truth"].shape
    write_overlay(tmp_path / "overlay.png", {"sub-1": tuple(files)})
    with Image.open(tmp_path / "overlay.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for panel in np.array_split(pixels, 2, axis=1):
        places = []
        for colour in SIDE_COLOURS.values():
            near = np.abs(panel - ImageColor.getrgb(colour)).sum(axis=-1) < 60
            assert near.sum() > 50
            places.append(np.nonzero(near)[1].mean())
        assert places[0] < places[1]  # the subject's left at the left
