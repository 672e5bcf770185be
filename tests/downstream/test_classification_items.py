# SPDX-License-Identifier: Apache-2.0
"""Which of a patient's scans a classifier is trained and scored on."""

from pathlib import Path
from typing import Any

import pytest

from volta_components.data.datalist import Datalist
from volta_components.downstream.classification import labelled_items, score_only
from volta_components.downstream.splits import counted
from volta_components.errors import InputError


def datalist(*scans: dict[str, Any]) -> Datalist:
    items = [
        {"image": "x.nii", "subject_id": scan["patient_id"], "fold": 0, "sex": "F" if i % 2 else "M", **scan}
        for i, scan in enumerate(scans)
    ]
    content = {"name": "x", "spacing": [1] * 3, "shape": [8] * 3, "n_folds": 2, "training": items}
    return Datalist(Path("datalist.json"), content, "")


def scan(patient: str, session: str, **more: Any) -> dict[str, Any]:
    return {"patient_id": patient, "session": session, "sex": "F" if patient == "a" else "M", **more}


@pytest.mark.parametrize(
    ("scans", "first"),
    [
        ([scan("a", "ses-M108"), scan("a", "ses-M48")], "ses-M48"),
        ([scan("a", "ses-10"), scan("a", "ses-9")], "ses-9"),
        ([scan("a", "ses-A", visit=1), scan("a", "ses-B", visit=0)], "ses-B"),
        ([scan("a", "ses-A", age=62.0), scan("a", "ses-B", age=61.0)], "ses-B"),
    ],
)
def test_the_first_scan_is_the_first_in_time(scans, first):
    labelled = labelled_items(datalist(*scans, scan("b", "ses-1")), "sex", ["M", "F"], "first")
    assert [item["session"] for item in labelled.items if item["patient_id"] == "a"] == [first]


def test_a_session_is_found_in_any_spelling():
    scans = [scan("a", "ses-M006"), scan("a", "ses-M012"), scan("b", "ses-M06")]
    labelled = labelled_items(datalist(*scans), "sex", ["M", "F"], "M6")
    assert [item["session"] for item in labelled.items] == ["ses-M006", "ses-M06"]
    assert len(labelled_items(datalist(scan("a", "ses-01"), scan("b", "ses-1")), "sex", ["M", "F"], 1).items) == 2
    with pytest.raises(InputError, match="no scan has the session M60, but ses-M006, ses-M012, ses-M06; set sessions"):
        labelled_items(datalist(*scans), "sex", ["M", "F"], "M60")


@pytest.mark.parametrize(
    ("values", "classes"),
    [((0, 1), [0, 1]), ((False, True), [False, True]), (("0", "1"), [0, 1]), ((0, 1), ["0", "1"])],
)
def test_classes_may_be_numbers_or_booleans(values, classes):
    facts = zip("abcdef", [*values, *values, None, 2], strict=True)
    labelled = labelled_items(datalist(*(scan(who, "1", apoe=value) for who, value in facts)), "apoe", classes)
    assert [item["label"] for item in labelled.items] == [0, 1, 0, 1]
    assert [reason for _, reason in labelled.left_out] == ["apoe is not known", "apoe is 2"]
    with pytest.raises(InputError, match=r"no scan with apoe 7 or 8(?s:.)*needs apoe 7 and 8"):
        labelled_items(datalist(scan("a", "1", apoe=values[0])), "apoe", [7, 8])


def test_everybody_is_scored_by_name_or_by_none_and_a_fold_alone():
    items = [{"patient_id": f"p{i // 2}", "fold": i // 2 % 3} for i in range(12)]
    assert len(score_only(items, "all").scored) == len(score_only(items, None).scored) == 12
    assert [item["patient_id"] for item in score_only(items, 1).scored] == ["p1", "p1", "p4", "p4"]
    assert counted(score_only(items, 1).scored) == "4 scans of 2 people"
    parts = score_only(items, 1)
    assert len(parts.unused) == len(items) - 4 and all(item["fold"] != 1 for item in parts.unused)
    with pytest.raises(InputError, match="--fold all for everybody"):
        score_only(items, 7)


@pytest.mark.parametrize("words", [["--fold", "None"], ["--fold=None"]])
def test_a_fold_of_none_on_the_command_line_does_not_score_the_fold_of_the_config(monkeypatch, words):
    """MONAI drops the option, so that the config's own fold arrives."""
    monkeypatch.setattr("sys.argv", ["monai.bundle", "run", *words, "--init", "volta"])
    with pytest.raises(InputError, match="say --fold all for everybody"):
        score_only([{"patient_id": "p", "fold": 0}], 0)
