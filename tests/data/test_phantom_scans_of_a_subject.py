# SPDX-License-Identifier: Apache-2.0
"""Several scans of one phantom: the same head, lying otherwise, by other scanners."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from volta_components.data.datalist import load_datalist
from volta_components.data.phantom.command import phantom
from volta_components.data.prepare import prepare


def test_each_scan_shows_the_same_head_by_another_scanner(tmp_path: Path) -> None:
    source = tmp_path / "phantoms"
    phantom(source, 2, spacing=3, scans=2, workers=1)
    for number in (1, 2):
        name = f"sub-PH{number:04d}"
        images, labels, truths = [], [], []
        for session in ("ses-M000", "ses-M001"):
            stem = source / name / session / "anat" / f"{name}_{session}"
            images.append(np.asarray(nib.load(f"{stem}_T1w.nii.gz").dataobj, float))
            truths.append(json.loads(Path(f"{stem}_T1w.json").read_text())["Phantom"])
            masks = source / "derivatives" / "hippocampus" / name / session / "anat"
            labels.append(np.asarray(nib.load(next(masks.glob("*.nii.gz"))).dataobj))
        assert (labels[0] != labels[1]).any() and truths[0]["rotation"] != truths[1]["rotation"]
        same = ("sex", "age", "diagnosis", "scale")
        assert [truths[0][key] for key in same] == [truths[1][key] for key in same]
        for key in ("volume_hippocampus_left", "volume_hippocampus_right", "volume_brain"):
            assert truths[0][key] == pytest.approx(truths[1][key], rel=0.03)
        assert truths[0]["gain"] != truths[1]["gain"] and truths[0]["gamma"] != truths[1]["gamma"]
        scaled = [image / np.percentile(image, 99) for image in images]
        assert 0.02 < np.abs(scaled[0] - scaled[1])[scaled[0] > 0.1].mean() < 0.3
    one = tmp_path / "one"
    phantom(one, 1, spacing=3, workers=1)
    first = "sub-PH0001/ses-M000/anat/sub-PH0001_ses-M000_T1w.nii.gz"
    assert (one / first).read_bytes() == (source / first).read_bytes()  # another scan changes nothing of the first


def test_scans_of_a_subject_are_prepared_as_its_sessions(tmp_path: Path) -> None:
    phantom(tmp_path / "phantoms", 2, spacing=3, scans=2, workers=1)
    prepare(
        "bids", tmp_path / "phantoms", tmp_path / "data", spacing=3, shape=(48, 64, 64), sessions=["all"], workers=1
    )
    items = load_datalist(tmp_path / "data" / "datalist.json").items
    assert [(item["subject_id"], item["session"]) for item in items] == [
        (f"sub-PH{number:04d}", session) for number in (1, 2) for session in ("ses-M000", "ses-M001")
    ]
