# SPDX-License-Identifier: Apache-2.0
"""What a training in MONAI Label does with labelled scans; test_monai_label.py trains in a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packed import ROOT

from volta_components.downstream.splits import Item
from volta_components.files import read_json
from volta_components.sharing.annotation import annotation_record, split_scans
from volta_components.sharing.card import is_phantom


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


def test_weights_of_annotated_scans_count_as_peoples_and_count_every_volume_once(tmp_path: Path) -> None:
    """The model that ships is trained on phantoms; so says the config's datalist, which the training does not read."""

    def scan(name: str) -> Item:
        paths = {kind: tmp_path / f"{name}_{kind}.nii.gz" for kind in ("image", "label")}
        for kind, path in paths.items():
            path.write_text(f"{kind} of {name}")
        return {kind: str(path) for kind, path in paths.items()}

    starter = read_json(ROOT / "bundles" / "harp_hippocampus" / "models" / "model_starter.json")
    assert is_phantom(starter) and starter["provenance"]["volumes"] == 15
    config: dict[str, Any] = {
        "tags": {"phantom": "true"},
        "pretraining": {"encoder_sha256": "", "patient_ids": []},
        "provenance": {"cohort": "phantom", "phantom": True, "volumes": 0},
    }
    first, second, third = (scan(f"patient_{number}") for number in (7, 8, 9))
    start = {"file": "model.pt", "sha256": "a" * 64, "record": starter}
    record = annotation_record(config, start, [first], [second])
    assert not is_phantom(record) and record["tags"]["phantom"] == "false"
    assert record["provenance"]["volumes"] == 15 + 2
    assert set(starter["provenance"]["patient_ids"]) < set(record["provenance"]["patient_ids"])
    again = annotation_record(config, {**start, "record": record}, [first, second, third], [])
    assert not is_phantom(again) and again["provenance"]["volumes"] == 15 + 3
    assert not is_phantom(annotation_record(config, {}, [first], []))
