# SPDX-License-Identifier: Apache-2.0
"""How labelled scans are parted for a training in MONAI Label; test_monai_label.py trains in a real server."""

from __future__ import annotations

import pytest

from volta_components.sharing.annotation import split_scans


@pytest.mark.parametrize(
    ("names", "share", "validation"),
    [
        (("p1", "p2", "p3", "p4", "p5"), 0.2, ("p5",)),
        (("p1", "p2", "p3", "p4", "p5"), 0.4, ("p4", "p5")),
        # All visits of the last patient, wherever they are; two scans of five are enough.
        (("p1_visit1", "p2", "p3_visit1", "p1_visit2", "p3_visit2"), 0.4, ("p3_visit1", "p3_visit2")),
        (("p1_visit1", "p2", "p3", "p1_visit2"), 0.25, ("p3",)),
        (("sub-1_ses-M00", "sub-2_ses-M00", "sub-2_ses-M12"), 0.3, ("sub-2_ses-M00", "sub-2_ses-M12")),
        # Never all; one patient alone validates itself, and so do all without a share.
        (("p1", "p2"), 1.0, ("p2",)),
        (("p1_visit1", "p1_visit2"), 0.5, ("p1_visit1", "p1_visit2")),
        (("p1",), 0.2, ("p1",)),
        (("p1", "p2"), 0.0, ("p1", "p2")),
    ],
)
def test_no_patient_is_trained_on_and_validates(
    names: tuple[str, ...], share: float, validation: tuple[str, ...]
) -> None:
    items = [{"image": f"/studies/{name}.nii.gz", "label": f"/studies/labels/final/{name}.nii.gz"} for name in names]
    training, validating = split_scans(items, share)
    assert [item["image"] for item in validating] == [f"/studies/{name}.nii.gz" for name in validation]
    rest = [item for item in items if item not in validating]
    assert training == (rest or items)
