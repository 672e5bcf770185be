# SPDX-License-Identifier: Apache-2.0
"""Masks come back to the scan's own space; volumes in its millimetres."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from labelled_scans import ORIENTATIONS, SIDE, centred_affine, head, reoriented, write_scan
from scipy import ndimage

from volta_components.data.load import LoadScand
from volta_components.inference.masks import RestoreMaskd, VolumeTable, restore_mask


def through(item: dict[str, str], spacing: float = 1.0) -> nib.Nifti1Image:
    """A label map prepared, taken as the network's certain answer, and brought back."""
    loaded = LoadScand("image", spacing, [SIDE] * 3, label_key="label")(item)
    logits = torch.stack([(loaded["label"][0] == value) * 40.0 for value in range(3)])
    restored = RestoreMaskd("pred")({**loaded, "pred": logits})["pred"]
    assert restored.dtype == torch.uint8 and restored.shape[0] == 1
    return nib.Nifti1Image(restored[0].numpy(), restored.affine.numpy())


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_masks_come_back_in_all_48_orientations(codes: str, tmp_path: Path) -> None:
    affine = centred_affine((36, 40, 34))
    volume, label = head((36, 40, 34), affine)
    images = [reoriented(nib.Nifti1Image(array, affine), codes) for array in (volume, label)]
    item = write_scan(tmp_path, "sub-01", *(np.asarray(image.dataobj) for image in images), images[0].affine)
    restored = through(item)
    assert restored.shape == images[1].shape and np.allclose(restored.affine, images[1].affine)
    assert np.array_equal(np.asarray(restored.dataobj), np.asarray(images[1].dataobj))
    for value, sign in ((1, -1), (2, 1)):
        places = nib.affines.apply_affine(restored.affine, np.argwhere(np.asarray(restored.dataobj) == value))
        assert np.sign(places[:, 0].mean()) == sign


@pytest.mark.parametrize(
    ("shape", "spacing", "turn"),
    [((48, 40, 20), (0.8, 1.0, 1.8), 0.0), ((36, 40, 34), (1.0, 1.0, 1.0), 0.3), ((30, 28, 34), (1.3, 1.4, 1.0), -0.2)],
    ids=["anisotropic", "oblique", "oblique and anisotropic"],
)
def test_masks_come_back_to_any_grid(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], turn: float, tmp_path: Path
) -> None:
    rotation = np.eye(4)
    rotation[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    affine = rotation @ centred_affine(shape, spacing)
    volume, label = head(shape, affine)
    restored = through(write_scan(tmp_path, "sub-01", volume, label, affine))
    assert restored.shape == shape and np.allclose(restored.affine, affine, atol=1e-5)
    found = np.asarray(restored.dataobj)
    for value in (1, 2):
        a, b = found == value, label == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.85
        centres = [nib.affines.apply_affine(affine, np.argwhere(mask)).mean(axis=0) for mask in (a, b)]
        assert np.abs(centres[0] - centres[1]).max() < 0.25


def test_only_what_may_be_foreground_is_resampled_and_nothing_is_lost(rng: np.random.Generator) -> None:
    """The same as resampling everything."""
    field = np.stack([ndimage.gaussian_filter(rng.normal(size=(14, 15, 16)), 1.5) for _ in range(3)])
    field[0] += 0.02
    probabilities = np.exp(8 * field) / np.exp(8 * field).sum(axis=0)
    affine = centred_affine((14, 15, 16), (2.0, 2.0, 2.0))
    target = centred_affine((40, 37, 29), (0.9, 0.8, 1.3))
    target[0, 3] += 3.3
    restored = restore_mask(probabilities, affine, target, (40, 37, 29))
    grid = np.linalg.inv(affine) @ target
    places = np.moveaxis(nib.affines.apply_affine(grid, np.moveaxis(np.indices((40, 37, 29)), 0, -1)), -1, 0)
    everything = np.stack(
        [
            ndimage.map_coordinates(channel, places, order=1, cval=float(i == 0))
            for i, channel in enumerate(probabilities)
        ]
    ).argmax(axis=0)
    assert {1, 2} <= set(np.unique(restored))
    assert (restored != everything).mean() < 1e-4  # ties and rounding
    nothing = np.stack([np.ones((4, 4, 4)), np.zeros((4, 4, 4)), np.zeros((4, 4, 4))])
    assert not restore_mask(nothing, np.eye(4), np.eye(4), (4, 4, 4)).any()


def test_volumes_are_in_cubic_millimetres_of_the_scan(tmp_path: Path) -> None:
    shape, spacing = (48, 40, 20), (0.8, 1.0, 1.8)
    affine = centred_affine(shape, spacing)
    volume, label = head(shape, affine)
    item: dict[str, Any] = write_scan(tmp_path, "sub-01", volume, label, affine)
    mask = RestoreMaskd("pred")(
        {**LoadScand("image", 1.0, [SIDE] * 3)({"image": item["image"]}), "pred": torch.zeros(3, SIDE, SIDE, SIDE)}
    )["pred"]
    mask[0] = torch.from_numpy(label)
    table = VolumeTable(tmp_path / "volumes.csv")
    table._iteration_completed(SimpleNamespace(state=SimpleNamespace(batch=[item], output=[{"pred": mask}])))
    table.write()
    with (tmp_path / "volumes.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    left, right = ((label == value).sum() * 0.8 * 1.0 * 1.8 for value in (1, 2))
    assert float(row["left_mm3"]) == pytest.approx(left, abs=0.05)
    assert float(row["right_mm3"]) == pytest.approx(right, abs=0.05)
    assert float(row["both_mm3"]) == pytest.approx(left + right, abs=0.1)
    assert row["subject_id"] == "sub-01" and row["file"] == item["image"]
