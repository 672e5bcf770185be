# SPDX-License-Identifier: Apache-2.0
"""Splits by patient, classes and shares in every part."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from fine_tuning import cohort

from volta_components.downstream.splits import (
    Parts,
    check_classes,
    check_disjoint,
    check_shares,
    class_weights,
    patients_of,
    split_items,
)
from volta_components.errors import InputError


@pytest.mark.parametrize("fold", [0, 3])
def test_parts_share_nobody_and_the_scored_part_is_the_whole_fold(fold):
    items = cohort(sessions=3)
    for fraction in (0.2, 0.6, 1.0):
        parts = split_items(items, fold, fraction, 0.2, seed=1, stratify="label")
        groups = [parts.training, parts.validation, parts.scored, parts.unused]
        assert sum(map(len, groups)) == len(items)
        assert sum(len(patients_of(group)) for group in groups) == 60
        assert {item["fold"] for item in parts.scored} == {fold}
        assert len(parts.scored) == 36
        assert all(item["fold"] != fold for group in (parts.training, parts.validation, parts.unused) for item in group)


def test_fractions_are_nested_stratified_and_rounded():
    items = cohort(count=200)
    smaller: tuple[set[str], set[str]] = (set(), set())
    for fraction in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts = split_items(items, 2, fraction, 0.2, seed=7, stratify="label")
        for label, available in ((0, 112), (1, 48)):
            training = [item for item in parts.training if item["label"] == label]
            validation = [item for item in parts.validation if item["label"] == label]
            taken = int(np.floor(fraction * available + 0.5))
            assert len(training) + len(validation) == taken
            assert len(validation) == int(np.floor(0.2 * taken + 0.5))
        now = (patients_of(parts.training), patients_of(parts.validation))
        assert smaller[0] < now[0] and smaller[1] < now[1]
        smaller = now
    assert parts.unused == []


def test_a_split_depends_on_seed_fold_and_ids_alone():
    items = cohort()
    first = split_items(items, 0, 0.5, 0.2, seed=0, stratify="label")
    again = split_items(list(reversed(items)), 0, 0.5, 0.2, seed=0, stratify="label")
    assert patients_of(first.training) == patients_of(again.training)
    assert patients_of(first.validation) == patients_of(again.validation)
    assert patients_of(first.training) != patients_of(split_items(items, 0, 0.5, 0.2, seed=1).training)
    # The order is that of a hash that can be computed anywhere.
    alike = [item for item in items if item["fold"] != 0]
    order = sorted(patients_of(alike), key=lambda patient: hashlib.sha256(f"5:0:{patient}".encode()).hexdigest())
    parts = split_items(items, 0, 0.25, 0.0, seed=5)
    assert patients_of(parts.training) == set(order[:12])


def test_a_patient_with_two_labels_counts_by_the_larger():
    items = cohort(20, folds=2, positive=0.0, sessions=2)
    converts = items[2]["patient_id"]
    items[3]["label"] = 1
    assert items[3]["patient_id"] == converts
    parts = split_items(items, 0, 1.0, 0.5, stratify="label")
    assert converts in patients_of(parts.training) | patients_of(parts.validation)
    assert not patients_of(parts.training) & patients_of(parts.validation)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fraction": 0.0}, r"in \(0, 1\]"),
        ({"fraction": 1.5}, r"in \(0, 1\]"),
        ({"validation_fraction": 1.0}, r"in \[0, 1\)"),
        ({"fold": 9}, "folds 0, 1, 2, 3, 4"),
    ],
)
def test_bad_shares_and_folds_are_named(changes, words):
    with pytest.raises(InputError, match=words):
        split_items(cohort(), **{"fold": 0, **changes})
    assert split_items([], 9) == Parts([], [], [])  # a config that is read without its data


def test_a_patient_in_two_folds_is_an_error_with_the_id_in_any_form():
    items = cohort(10)
    items[0] |= {"patient_id": "002_S_0295"}
    items[1] |= {"patient_id": "sub-ADNI002S0295"}
    with pytest.raises(InputError, match="002_S_0295  scored fold and other folds"):
        split_items(items, 0)
    with pytest.raises(InputError, match="sub-001"):
        check_disjoint({"a": cohort(3), "b": cohort(2)})


def test_a_missing_class_is_named_with_the_subjects_that_are_there():
    items = cohort()
    names = ["CN", "AD"]

    def parts(**changes: Any) -> Parts:
        both = [item for item in items if item["fold"] == 1]
        return Parts(**{"training": both, "validation": both, "scored": both, **changes})

    healthy = [item for item in items if item["label"] == 0][:2]
    check_classes(parts(), names)
    with pytest.raises(InputError, match=r"scored fold has no scan labelled AD; it has 2 CN, 0 AD") as caught:
        check_classes(parts(scored=healthy), names)
    assert healthy[1]["subject_id"] in str(caught.value)
    with pytest.raises(InputError, match="training part has no scan labelled AD"):
        check_classes(parts(training=healthy, validation=healthy), names)
    with pytest.raises(InputError, match=r"fraction 0.1 is too small.*no scan labelled AD for training"):
        check_classes(parts(training=healthy), names, fraction=0.1)
    with pytest.raises(InputError, match="no scan labelled AD for inner validation"):
        check_classes(parts(validation=healthy), names)
    check_classes(parts(validation=[]), names, validation=False)


def test_a_part_that_is_smaller_than_the_number_of_processes_is_named():
    items = cohort(12)
    parts = Parts(training=items[:6], validation=items[6:8], scored=items[8:11], unused=items[11:])
    check_shares(parts.in_use, 2)
    with pytest.raises(
        InputError, match=r"4 processes(?s:.)*validation +2 scans\n +scored +3 scans\nStart no more than 2"
    ):
        check_shares(parts.in_use, 4)
    check_shares(Parts(items, [], items).in_use, 12)  # nobody waits in a part that is not gone through
    with pytest.raises(InputError, match="nobody to train on"):
        check_shares(Parts([], [], items).in_use, 1)


def test_class_weights_balance_the_classes():
    items = [{"label": 0}] * 9 + [{"label": 1}] * 3
    weights = class_weights(items, 2)
    np.testing.assert_allclose(weights, [12 / 18, 12 / 6], rtol=1e-6)
    # Each class then has the same share of the loss.
    assert 9 * weights[0] == pytest.approx(3 * weights[1].item())
    with pytest.raises(InputError, match="class 1"):
        class_weights(items[:9], 2)


def test_ids_that_look_alike_and_the_same_voxels_may_not_be_in_two_folds():
    items = cohort(10)
    items[1] |= {"patient_id": "SUB_0", "fold": 1}
    with pytest.raises(
        InputError, match=r"1 pairs of ids look alike(?s:.)*SUB_0 +sub-000\n(?s:.)*--accept_look_alikes"
    ):
        split_items(items, fold=0)
    assert split_items(items, fold=0, accept_look_alikes=True).scored
    items = cohort(10)
    items[0]["source_sha256"] = items[1]["source_sha256"] = "1" * 64
    with pytest.raises(InputError, match=r"1 pairs of ids have the same voxels(?s:.)*sub-000 +sub-001"):
        split_items(items, fold=0, accept_look_alikes=True)


def test_near_copies_in_two_folds_are_a_warning_with_both_names():
    items = cohort(10)
    items[0]["fingerprint"], items[1]["fingerprint"] = "0" * 128, "1" + "0" * 127
    with pytest.warns(UserWarning, match="1 pairs of volumes.*sub-000_ses-M000 and sub-001_ses-M000"):
        split_items(items, fold=0)
