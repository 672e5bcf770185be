# SPDX-License-Identifier: Apache-2.0
"""Metrics against scikit-learn, counting by hand, and MONAI's own AUROC."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_roc_auc
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from volta_components.downstream.metrics import (
    auroc,
    auroc_interval,
    bootstrap_aurocs,
    sensitivity_specificity,
    youden_threshold,
)
from volta_components.errors import InputError


def draw(rng: np.random.Generator, n: int = 80, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, 2, n)
    labels[:2] = [0, 1]
    scores = rng.normal(size=n) + labels
    return labels, np.round(scores, 1) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_share_of_ordered_pairs_and_scikit_learns_and_monais(rng, ties):
    labels, scores = draw(rng, ties=ties)
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert auroc(labels, scores) == pytest.approx(expected, abs=1e-12)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    monai = compute_roc_auc(torch.tensor(scores)[:, None], torch.tensor(labels)[:, None])
    assert monai == pytest.approx(expected, abs=1e-6)


def test_sensitivity_and_specificity_agree_with_a_confusion_matrix(rng):
    labels, scores = draw(rng, ties=True)
    for threshold in (-1.0, 0.3, float(scores[5]), 2.0):
        (tn, fp), (fn, tp) = confusion_matrix(labels, scores >= threshold)
        expected = (tp / (tp + fn), tn / (tn + fp))
        assert sensitivity_specificity(labels, scores, threshold) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_youden_threshold_reaches_the_best_j_of_the_roc_curve(rng, ties):
    for _ in range(20):
        labels, scores = draw(rng, 25, ties)
        false_positive, true_positive, _ = roc_curve(labels, scores)
        sensitivity, specificity = sensitivity_specificity(labels, scores, youden_threshold(labels, scores))
        if (true_positive - false_positive).max() > 0:
            assert sensitivity + specificity - 1 == pytest.approx((true_positive - false_positive).max(), abs=1e-12)


def test_youden_threshold_lies_midway_between_the_called_and_the_others():
    assert youden_threshold([0, 0, 1, 1], [0.1, 0.3, 0.7, 0.9]) == pytest.approx(0.5)
    assert youden_threshold([1, 0], [0.2, 0.8]) == pytest.approx(0.2)  # nothing better than calling everybody 1


def test_a_bootstrap_sample_is_a_weighted_auroc(rng):
    labels, scores = draw(rng, 30, ties=True)
    patients = [f"p{index // 2}" for index in range(30)]
    samples = bootstrap_aurocs(labels, scores, patients, repeats=5, seed=3)
    drawn = np.random.default_rng(3).multinomial(15, np.full(15, 1 / 15), size=5)
    owner = np.unique(patients, return_inverse=True)[1]
    expected = [roc_auc_score(labels, scores, sample_weight=counts[owner]) for counts in drawn]
    np.testing.assert_allclose(samples, expected, atol=1e-12)


def test_interval_covers_the_true_auroc_about_as_often_as_it_says(rng):
    # Two normal distributions one deviation apart: AUROC = Phi(1 / sqrt 2) = 0.7602.
    covered = 0
    for _ in range(100):
        labels = np.repeat([0, 1], 40)
        _, low, high = auroc_interval(labels, rng.normal(size=80) + labels, repeats=200, seed=1)
        covered += low <= 0.7602 <= high
    assert 0.88 <= covered / 100 <= 0.99


def test_samples_of_one_class_are_drawn_again():
    samples = bootstrap_aurocs([0, 1, 1], [0.1, 0.5, 0.2], repeats=300, seed=0)
    assert len(samples) == 300
    assert set(samples) == {1.0}


@pytest.mark.parametrize(
    ("labels", "scores", "words"),
    [
        ([1, 1], [0.1, 0.2], "both classes"),
        ([0, 2], [0.1, 0.2], "both classes"),
        ([0, 1], [0.1, float("nan")], "1 of 2 scores are not finite"),
        ([0, 1], [0.1], "one length"),
    ],
)
def test_bad_input_is_named(labels, scores, words):
    for function in (auroc, youden_threshold, bootstrap_aurocs):
        with pytest.raises(InputError, match=words):
            function(labels, scores)
