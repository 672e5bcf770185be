# SPDX-License-Identifier: Apache-2.0
"""Label maps are checked before a training, and everybody has one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from labelled_scans import ORIENTATIONS, SIDE, make_labelled, reoriented, write_head

from volta_components.data.datalist import load_datalist, make_content
from volta_components.downstream.label_maps import check_label_maps, labelled_parts
from volta_components.errors import InputError
from volta_components.files import read_json, write_json


@pytest.fixture
def scan(tmp_path: Path) -> dict[str, str]:
    return write_head(tmp_path / "raw")


def rewrite(path: str, change: Any, affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    voxels = change(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(voxels, image.affine if affine is None else affine), path)


def test_good_label_maps_pass_in_every_orientation(scan: dict[str, str], tmp_path: Path) -> None:
    items = []
    for codes in ORIENTATIONS[::5]:
        item = {key: str(tmp_path / f"{codes}_{key}.nii") for key in ("image", "label")}
        for key, path in item.items():
            nib.save(reoriented(nib.load(scan[key]), codes), path)
        items.append(item)
    check_label_maps(items)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda label: label[:-1], "scan of 36x40x34"),
        (lambda label: label * 2, "label values [0, 2, 4]"),
        (lambda label: label * 0, "empty label"),
        (lambda label: np.where(label == 2, 0, label), "label without voxels of right (2)"),
        (lambda label: np.where(label == 1, 0, label), "label without voxels of left (1)"),
        (lambda label: np.array([0, 2, 1], np.uint8)[label], "label 1 (left) lies right of label 2 (right)"),
        (lambda label: (label * 0.4).astype(np.float32), "no integers"),
    ],
    ids=["shape", "values", "empty", "no right", "no left", "swapped", "fractions"],
)
def test_bad_label_maps_are_named(scan: dict[str, str], change: Any, words: str, tmp_path: Path) -> None:
    good = {key: shutil.copy(scan[key], tmp_path / f"good_{key}.nii.gz") for key in ("image", "label")}
    rewrite(scan["label"], change)
    with pytest.raises(InputError) as caught:
        check_label_maps([scan, {**good, "subject_id": "sub-02"}])
    message = str(caught.value)
    assert "1 of 2 label maps" in message and "sub-01" in message and "sub-02" not in message
    assert words in message and "Mend" in message


def test_a_label_map_that_is_shifted_or_missing_is_named(scan: dict[str, str]) -> None:
    shifted = nib.load(scan["label"]).affine.copy()
    shifted[0, 3] += 5
    rewrite(scan["label"], lambda label: label, shifted)
    others = [{"image": scan["image"], "subject_id": "sub-02"}]
    others.append({"image": scan["image"], "label": "/nowhere/label.nii.gz", "subject_id": "sub-03"})
    with pytest.raises(InputError) as caught:
        check_label_maps([scan, *others])
    message = str(caught.value)
    assert "do not share one grid" in message and "5.0 mm" in message
    assert "sub-02" in message and "has no label map" in message
    assert "sub-03" in message and "no such file" in message


def test_swapped_sides_are_found_in_a_flipped_file(scan: dict[str, str], tmp_path: Path) -> None:
    """Left is where world x is smaller, however the file is stored."""
    item = {key: str(tmp_path / f"lps_{key}.nii") for key in ("image", "label")}
    for key, path in item.items():
        nib.save(reoriented(nib.load(scan[key]), "LPS"), path)
    check_label_maps([item])
    rewrite(item["label"], lambda label: np.array([0, 2, 1], np.uint8)[label])
    with pytest.raises(InputError, match="swapped"):
        check_label_maps([item])


def test_parts_want_a_label_map_for_everybody(tmp_path: Path) -> None:
    datalist = load_datalist(make_labelled(tmp_path / "data"))
    parts = labelled_parts(datalist, fold=0)
    assert [item["subject_id"] for item in parts.scored] == ["sub-0000", "sub-0005"]
    assert len(parts.training) == 6 and len(parts.validation) == 2

    content = read_json(datalist.path)
    for item in content["training"][3:5]:
        del item["label"]
    changed = make_content("fake", [1.0] * 3, [SIDE] * 3, 0, 5, content["training"], [])
    write_json(datalist.path, changed)
    with pytest.raises(InputError, match="2 of 10 items have no label map") as caught:
        labelled_parts(load_datalist(datalist.path), fold=0)
    assert "sub-0003_ses-M000" in str(caught.value) and "--labels require" in str(caught.value)
