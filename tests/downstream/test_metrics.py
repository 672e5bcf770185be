# SPDX-License-Identifier: Apache-2.0
"""Metrics against scikit-learn, SciPy, counting by hand, and MONAI's own AUROC."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_roc_auc
from scipy import ndimage, stats
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from volta_components.downstream.metrics import (
    Resampling,
    auroc,
    auroc_interval,
    auroc_within,
    interval,
    patients_for_auroc,
    score_intervals,
    score_mask,
    sensitivity_specificity,
    share,
    summarise_scores,
    weighted_mean,
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


def test_auroc_and_shares_of_many_weightings_are_scikit_learns_one_by_one(rng):
    labels, scores = draw(rng, 60, ties=True)
    weights = rng.integers(0, 4, (25, 60))
    aurocs, shares = auroc(labels, scores, weights), share(scores > 0.5, labels == 1, weights)
    for value, found, row in zip(aurocs, shares, weights, strict=True):
        assert value == pytest.approx(roc_auc_score(labels, scores, sample_weight=row), abs=1e-12)
        assert found == pytest.approx(np.average((scores > 0.5)[labels == 1], weights=row[labels == 1]), abs=1e-12)


def test_auroc_of_one_class_is_not_a_number():
    assert math.isnan(auroc(np.ones(3), np.arange(3)))
    weighted = auroc(np.array([0, 1]), np.array([0.1, 0.2]), np.array([[1, 0], [1, 1]]))
    assert np.isnan(weighted).tolist() == [True, False]


def test_a_weighted_mean_leaves_out_what_is_missing():
    weights = np.array([[1.0, 1, 1], [2, 5, 0], [0, 3, 0]])
    means = weighted_mean(np.array([4.0, np.nan, 1.0]), weights)
    assert means[:2].tolist() == [2.5, 4.0] and np.isnan(means[2])


def test_resampling_keeps_classes_draws_patients_whole_and_is_the_same_for_everybody(rng):
    label = (np.arange(60) % 3 == 0).astype(int)
    patients = [f"p{i:02d}" for i in range(60)]
    visits, labels = [*patients, *patients[:20]], [*label, *label[:20]]  # second scans of twenty patients
    sampling = Resampling([*patients, *visits], [*label, *labels], samples=400, seed=[1, 2])
    weights = sampling.weights(visits)
    assert (weights[:, :20] == weights[:, 60:]).all()
    assert (weights[:, :60] @ label == label.sum()).all()
    assert (weights[:, :60].sum(axis=1) == 60).all()
    again = Resampling(visits, labels, samples=400, seed=[1, 2])
    assert (again.weights(patients) == sampling.weights(patients)).all()
    other = Resampling(visits, labels, samples=400, seed=[1, 1])
    assert (other.weights(patients) != sampling.weights(patients)).any()
    # Drawn with replacement: a patient is left out of a sample with probability (1 - 1/n)^n.
    assert (weights[:, :60][:, label == 1] == 0).mean() == pytest.approx((1 - 1 / 20) ** 20, abs=0.02)


def test_without_strata_a_sample_is_a_multinomial_draw_of_the_patients():
    patients = [f"p{index // 2:02d}" for index in range(30)]
    weights = Resampling(patients, samples=5, seed=3).weights(patients)
    drawn = np.random.default_rng(3).multinomial(15, np.full(15, 1 / 15), size=5)
    assert (weights == np.repeat(drawn, 2, axis=1)).all()


def test_bootstrap_spread_agrees_with_delongs_standard_error(rng):
    label = np.arange(300) % 3 == 0
    score = np.round(rng.normal(size=300) + label, 1)
    weights = Resampling(range(300), label).weights(range(300))
    low, high = interval(auroc(label, score, weights))
    positive, negative = score[label], score[~label]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    error = math.sqrt(wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative))
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.12)


def test_intervals_of_dice_and_hd95_are_scipys_over_patients(rng):
    patients = [f"p{index // 2:02d}" for index in range(60)]
    rows = [{"dice": value, "hd95": 10 * value} for value in rng.beta(8, 2, size=60)]
    for row in rows[::7]:
        row["hd95"] = math.nan
    found = score_intervals(rows, patients)
    for name, key in (("mean_dice", "dice"), ("hd95", "hd95")):
        pairs = np.array([row[key] for row in rows]).reshape(30, 2)
        expected = stats.bootstrap((np.nanmean(pairs, axis=1),), np.mean, method="percentile", n_resamples=9999, rng=1)
        ends = (expected.confidence_interval.low, expected.confidence_interval.high)
        assert found[name] == pytest.approx(ends, abs=0.08 * (ends[1] - ends[0]))
    assert score_intervals(rows[:38], patients[:38]) == {}  # 19 patients
    assert {*score_intervals(rows[:40], patients[:40])} == {"mean_dice", "hd95"}
    assert score_intervals([{"dice": 0.9, "hd95": 1.0}] * 60, patients) == {}  # no spread


def test_an_interval_is_of_the_mean_beside_it_also_where_patients_have_different_numbers_of_scans():
    """27 patients of one good scan, three of ten bad ones: the mean over scans is (27 * 0.9 + 30 * 0.5) / 57."""
    rows = [{"dice": 0.9, "hd95": 1.0}] * 27 + [{"dice": 0.5, "hd95": 1.0}] * 30
    patients = [f"one{place}" for place in range(27)] + [f"ten{place // 10}" for place in range(30)]
    low, high = score_intervals(rows, patients)["mean_dice"]
    mean = (27 * 0.9 + 30 * 0.5) / 57
    assert 0.55 < low < mean < high < 0.9


def test_pairs_are_compared_within_their_group_only(rng):
    """Against all pairs, one by one; and groups whose scores differ by their shares of a class alone say nothing."""
    label, score, group = rng.integers(0, 2, 40), rng.normal(size=40), rng.integers(0, 4, 40)
    weights = rng.integers(0, 3, (5, 40))
    expected = []
    for weight in weights:
        wins, pairs = 0.0, 0.0
        for one, zero in itertools.product(np.flatnonzero(label == 1), np.flatnonzero(label == 0)):
            if group[one] == group[zero]:
                times = weight[one] * weight[zero]
                wins += times * ((score[one] > score[zero]) + 0.5 * (score[one] == score[zero]))
                pairs += times
        expected.append(wins / pairs)
    assert auroc_within(label, score, group, weights) == pytest.approx(expected)
    label = np.concatenate([np.arange(20) < ones for ones in (6, 9, 11, 14)]).astype(int)
    group = np.repeat(range(4), 20)
    told = np.array([label[group != each].mean() for each in group])  # a model that knows the other folds' shares
    assert float(auroc_within(label, told, group)) == 0.5
    assert float(auroc(label, told)) < 0.4
    assert math.isnan(auroc_within([0, 0, 1], [1, 2, 3], [0, 0, 1]))


@pytest.mark.parametrize("ones", [40, 10])
def test_interval_covers_the_true_auroc_about_as_often_as_it_says(rng, ones):
    # Two normal distributions one deviation apart: AUROC = Phi(1 / sqrt 2) = 0.7602.
    covered = 0
    for _ in range(200):
        labels = np.repeat([0, 1], [40, ones])
        _, low, high = auroc_interval(labels, rng.normal(size=len(labels)) + labels, samples=200, seed=1)
        covered += low <= 0.7602 <= high
    assert 0.87 <= covered / 200 <= 0.99


def test_an_interval_of_few_patients_of_a_class_is_none(rng):
    """Three of a class among 43: two scans each do not make six of them."""
    labels, patients = np.repeat([0, 1], [40, 3]), [f"p{number}" for number in range(43)]
    scores = rng.normal(size=43)
    assert patients_for_auroc(labels, patients) == 6
    assert patients_for_auroc(np.tile(labels, 2), patients * 2) == 6
    assert patients_for_auroc(np.repeat([0, 1], [30, 20]), range(50)) == 40
    assert patients_for_auroc(np.repeat([0, 1], [3, 3]), list("aabaab")) == 2  # both have scans of both labels
    assert patients_for_auroc(np.repeat([0, 1], [25, 25]), range(50)) == 50
    for chosen in (np.repeat([0, 1], [40, 9]), np.repeat([0, 1], [9, 10])):
        value, low, high = auroc_interval(chosen, rng.normal(size=len(chosen)))
        assert 0 < value < 1 and math.isnan(low) and math.isnan(high)
    assert math.isnan(auroc_interval(labels, scores)[1])
    # Everybody is told right: the bootstrap has no spread, and says nothing of the next patient.
    assert math.isnan(auroc_interval(np.repeat([0, 1], [20, 20]), np.arange(40))[1])


def test_samples_of_one_class_are_left_out():
    labels, scores = [0, 1, 1], [0.1, 0.5, 0.2]
    samples = auroc(labels, scores, Resampling(range(3), samples=3000).weights(range(3)))
    # Nobody of class 0 (2/3)^3, or nobody but that one (1/3)^3.
    assert np.isnan(samples).mean() == pytest.approx(9 / 27, abs=0.03)
    assert auroc_interval(labels, scores)[0] == 1.0


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
    for function in (auroc_interval, youden_threshold, lambda *pair: sensitivity_specificity(*pair, 0.5)):
        with pytest.raises(InputError, match=words):
            function(labels, scores)


# --- label maps: Dice and HD95 against SciPy ---


def surface_distances(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of each surface voxel of ``first`` to the surface of ``second``, mm."""
    surfaces = [mask & ~ndimage.binary_erosion(np.pad(mask, 1))[1:-1, 1:-1, 1:-1] for mask in (first, second)]
    return ndimage.distance_transform_edt(~surfaces[1], sampling=spacing)[surfaces[0]]


def independent_hd95(mask: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> float:
    return max(float(np.percentile(surface_distances(a, b, spacing), 95)) for a, b in ((mask, truth), (truth, mask)))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.25), (3.0, 3.0, 3.0)])
def test_dice_and_hd95_agree_with_scipy(spacing: tuple[float, float, float]) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        smooth = [ndimage.gaussian_filter(rng.normal(size=(2, 22, 18, 20)), (0, 2, 2, 2)) for _ in range(2)]
        # Blobs of any form, some touching the border, and a far speck.
        mask, truth = (np.where(s[0] > 0.06, 1, np.where(s[1] > 0.06, 2, 0)).astype(np.uint8) for s in smooth)
        mask[0, 0, 0] = 1
        scores = score_mask(mask, truth, spacing)
        for side, value in (("left", 1), ("right", 2)):
            a, b = mask == value, truth == value
            dice = 2 * np.logical_and(a, b).sum() / (a.sum() + b.sum())
            assert scores[f"dice_{side}"] == pytest.approx(dice, rel=1e-6)
            assert scores[f"hd95_{side}"] == pytest.approx(independent_hd95(a, b, spacing), rel=1e-6)
            assert scores[f"volume_{side}_mm3"] == pytest.approx(a.sum() * math.prod(spacing))
            assert scores[f"true_volume_{side}_mm3"] == pytest.approx(b.sum() * math.prod(spacing))
        assert scores["dice"] == pytest.approx((scores["dice_left"] + scores["dice_right"]) / 2)
        assert scores["hd95"] == pytest.approx((scores["hd95_left"] + scores["hd95_right"]) / 2)
        assert scores["failures"] == 0


def test_an_empty_mask_is_a_failure_that_is_counted() -> None:
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[2:4, 3:6, 3:6], truth[8:10, 3:6, 3:6] = 1, 2
    half = truth.copy()
    half[half == 2] = 0
    rows = [score_mask(mask, truth, (1, 1, 1)) for mask in (truth, half, np.zeros_like(truth))]
    assert [row["failures"] for row in rows] == [0, 1, 2]
    assert rows[1]["dice"] == pytest.approx(0.5) and rows[1]["hd95_left"] == 0
    assert math.isnan(rows[1]["hd95_right"]) and math.isnan(rows[1]["hd95"])
    summary = summarise_scores(rows, penalty=30.0)
    assert summary["mean_dice"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary["dice_left"] == pytest.approx(2 / 3) and summary["dice_right"] == pytest.approx(1 / 3)
    assert summary["hd95"] == summary["hd95_left"] == summary["hd95_right"] == 0
    assert summary["hd95_failures"] == 3
    assert summary["hd95_with_penalty"] == pytest.approx(3 * 30 / 6)
    nobody = summarise_scores([rows[2]], penalty=30.0)
    assert not {"hd95", "hd95_left", "hd95_right"} & nobody.keys()
    assert nobody["hd95_with_penalty"] == 30
