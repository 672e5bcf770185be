# SPDX-License-Identifier: Apache-2.0
"""Statistics against scikit-learn, SciPy and arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import recall_score, roc_auc_score

from volta_components.downstream.metrics import Resampling
from volta_components.report import statistics


def people(rng, n=60, effect=0.8):
    label = (np.arange(n) % 3 == 0).astype(int)
    score = np.round(1 / (1 + np.exp(-(effect * (2 * label - 1) + rng.normal(size=n)))), 1)  # with ties
    return pd.DataFrame(
        {"patient_id": [f"p{i:02d}" for i in range(n)], "label": label, "score": score, "prediction": score >= 0.45}
    )


def test_sensitivity_and_specificity_are_scikit_learns_recalls(rng):
    table = people(rng)
    weights = rng.integers(0, 4, len(table))
    ours = statistics.classification_metrics(table, weights)
    for name, label in (("sensitivity", 1), ("specificity", 0)):
        expected = recall_score(table.label, table.prediction, pos_label=label, sample_weight=weights)
        assert float(ours[name]) == pytest.approx(expected, abs=1e-12)


def test_mean_over_folds_and_its_interval(rng):
    tables = {fold: people(rng, effect=0.4 + 0.3 * fold) for fold in range(3)}
    sampling = {
        fold: Resampling(table.patient_id, table.label, samples=300, seed=fold) for fold, table in tables.items()
    }
    estimates, means = statistics.summarise(tables, {fold: fold for fold in tables}, sampling)
    values = [roc_auc_score(table.label, table.score) for table in tables.values()]
    assert estimates["auroc"].mean == pytest.approx(np.mean(values))
    assert estimates["auroc"].sd == pytest.approx(np.std(values, ddof=1))
    replicate = np.mean(
        [roc_auc_score(t.label, t.score, sample_weight=sampling[k].weights(t.patient_id)[7]) for k, t in tables.items()]
    )
    assert means["auroc"][7] == pytest.approx(replicate)
    assert estimates["auroc"].low == pytest.approx(np.quantile(means["auroc"], 0.025))


def test_estimate_leaves_out_what_is_missing():
    value = statistics.estimate([1.0, math.nan, 4.0])
    assert (value.mean, value.count) == (2.5, 2)
    assert value.sd == pytest.approx(math.sqrt(4.5))
    assert math.isnan(statistics.estimate([2.0]).sd) and math.isnan(statistics.estimate([]).mean)


def test_p_of_a_bootstrap_by_hand():
    assert statistics.bootstrap_p(np.array([-1.0, 1, 2, 3, 4, 5, 6, 7, 8])) == pytest.approx(2 * 2 / 10)
    assert statistics.bootstrap_p(np.ones(999)) == pytest.approx(2 / 1000)
    assert statistics.bootstrap_p(np.zeros(99)) == 1.0
    assert statistics.bootstrap_p(np.array([0.1 + 0.2 - 0.3, -1.0, 1, 2])) == statistics.bootstrap_p([0.0, -1, 1, 2])
    assert math.isnan(statistics.bootstrap_p(np.array([math.nan])))


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.04: times 3, 2, 1, then never falling.
    assert statistics.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert statistics.holm([0.03, 0.03]) == pytest.approx([0.06, 0.06])
    assert statistics.holm([0.5, math.nan, 0.9])[0] == 1.0
    assert math.isnan(statistics.holm([0.5, math.nan])[1])


def test_wilcoxon_by_hand():
    # Differences 1, 2, 3, 4, 5, all positive: p = 2 / 2^5.
    assert statistics.wilcoxon(np.arange(5) * 2.0 + 1, np.arange(5) * 1.0) == pytest.approx(2 / 32)
    assert statistics.wilcoxon(np.ones(4), np.ones(4)) == 1.0
    assert math.isnan(statistics.wilcoxon(np.array([math.nan]), np.array([1.0])))


def test_two_inits_that_separate_all_have_no_delong_p():
    """Their variance is zero; these labels made MLstatkit's single bootstrap sample fail."""
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 0])
    scores = np.array([0.71, 0.43, 0.57, 0.14, 0.29, 1.0, 0.86, 0.0])
    assert math.isnan(statistics.delong([(labels, scores, scores / 2)]))


def test_delong_is_the_test_of_the_paper_and_adds_folds(rng):
    pytest.importorskip("MLstatkit")
    pairs = []
    difference = variance = 0.0
    for _ in range(3):
        label = (np.arange(50) % 3 == 0).astype(int)
        scores = [label * effect + rng.normal(size=50) for effect in (0.9, 0.4)]
        pairs.append((label, *scores))
        parts = []
        for score in scores:
            wins = (score[label == 1][:, None] > score[label == 0]).astype(float)
            parts.append((wins.mean(), wins.mean(1), wins.mean(0)))
        difference += parts[0][0] - parts[1][0]
        ones, zeros = parts[0][1] - parts[1][1], parts[0][2] - parts[1][2]
        variance += ones.var(ddof=1) / len(ones) + zeros.var(ddof=1) / len(zeros)
    expected = 2 * stats.norm.sf(abs(difference) / math.sqrt(variance))
    assert statistics.delong(pairs) == pytest.approx(expected, rel=1e-9)
    same = (pairs[0][0], pairs[0][1], pairs[0][1])
    assert math.isnan(statistics.delong([same]))  # no variance, so no test; and no bootstrap under its name


def test_pairs_are_compared_within_their_fold_only(rng):
    first = pd.DataFrame({"label": [1, 0, 0], "score": [0.3, 0.2, 0.4]})
    second = pd.DataFrame({"label": [1, 1, 0], "score": [0.9, 0.7, 0.8]})
    alone = pd.DataFrame({"label": [1, 1], "score": [0.0, 0.0]})
    assert float(statistics.pair_auroc([first, second, alone])) == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert math.isnan(statistics.pair_auroc([alone]))
    table = people(rng)
    assert float(statistics.pair_auroc([table])) == pytest.approx(roc_auc_score(table.label, table.score))
    weights = rng.integers(0, 3, (5, 60)).astype(float)
    assert statistics.pair_auroc([table], [weights]) == pytest.approx(
        [roc_auc_score(table.label, table.score, sample_weight=row) for row in weights]
    )


def test_calibration_error_is_the_mean_gap_of_ten_bins(rng):
    score = rng.uniform(size=200)
    label = (rng.uniform(size=200) < score**2).astype(int)
    gaps = 0.0
    for low in np.arange(10) / 10:
        inside = (score > low) & (score <= low + 0.1) if low else score <= 0.1
        if inside.any():
            gaps += inside.sum() * abs(label[inside].mean() - score[inside].mean())
    assert statistics.calibration_error(label, score, np.ones(200)) == pytest.approx(gaps / 200)
    assert statistics.calibration_error(np.array([0, 1, 1]), np.array([0.0, 1.0, 1.0]), np.ones(3)) == 0


def test_a_scan_of_three_seeds_counts_once_in_the_calibration_error():
    label, score = np.array([1, 0, 0, 0]), np.array([0.75, 0.25, 0.25, 0.25])
    assert statistics.calibration_error(label, score, np.array([1, 1 / 3, 1 / 3, 1 / 3])) == pytest.approx(0.25)
    repeated = statistics.calibration_error(np.array([1, 1, 0]), np.array([0.6, 0.6, 0.6]), np.array([0.5, 0.5, 1]))
    assert repeated == pytest.approx(0.1)


def test_intraclass_correlation_is_that_of_shrout_and_fleiss():
    """Their table 2: six subjects, four judges; ICC(2,1) is 0.29 in their table 4."""
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    assert statistics.intraclass_correlation(np.array(ratings)) == pytest.approx(0.29, abs=0.005)
    assert statistics.intraclass_correlation(np.array([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])) == pytest.approx(1)
    assert math.isnan(statistics.intraclass_correlation(np.array([[1.0, 1.0]])))


def test_limits_of_agreement_by_hand():
    # Differences 1, 3, 2: mean 2, SD 1.
    found = statistics.limits_of_agreement(np.array([11.0, 23.0, 32.0]), np.array([10.0, 20.0, 30.0]))
    assert found == pytest.approx((2, 2 - 1.96, 2 + 1.96))


def test_intervals_of_few_or_equal_patients_are_not_shown_as_if_they_were_good():
    wide = statistics.Estimate(0.8, low=0.6, high=0.9)
    assert wide.checked(20) == wide
    assert wide.checked(19).interval == "too few" and math.isnan(wide.checked(19).low)
    flat = statistics.Estimate(1.0, low=1.0, high=1.0)
    assert flat.checked(50).interval == "no spread" and math.isnan(flat.checked(50).high)
    # Clopper and Pearson by the quantiles of the beta distribution.
    exact = wide.checked(10, (8, 10))
    assert exact.interval == "exact"
    assert (exact.low, exact.high) == pytest.approx((stats.beta.ppf(0.025, 8, 3), stats.beta.ppf(0.975, 9, 2)))
    everybody = flat.checked(30, (30, 30))
    assert (everybody.low, everybody.high) == pytest.approx((0.025 ** (1 / 30), 1))


def test_only_what_beats_every_other_init_is_best():
    def pair(first, second, difference, p, **more):
        return statistics.Comparison(first, second, difference, difference - 0.01, difference + 0.01, p, 50, 50, **more)

    clear = [pair("a", "b", -0.2, 0.001), pair("a", "c", -0.1, 0.9), pair("b", "c", 0.1, 0.002)]
    assert statistics.clear_best(clear) == "b"
    # 0.03 is 0.06 after Holm's correction for the two that are left.
    assert statistics.clear_best([clear[0], clear[1], pair("b", "c", 0.1, 0.03)]) is None
    assert statistics.clear_best([]) is None
    # The test is of ranks, and points the other way than the mean.
    assert statistics.clear_best([pair("a", "b", 0.1, 0.001, rank=3.0)]) == "a"
    assert statistics.clear_best([pair("a", "b", 0.1, 0.001, rank=-3.0)]) is None


def test_one_failure_makes_no_winner_of_the_worse(rng):
    """Of 22 patients, the first is a little worse on 21; on one, the second fails."""
    first = rng.uniform(0.80, 0.85, 22)
    second = first + rng.uniform(0.005, 0.015, 22)
    second[0] = 0.2
    p, rank = statistics.wilcoxon(first, second), statistics.rank_difference(first, second)
    signed = stats.rankdata(abs(first - second)) * np.sign(first - second)
    assert p < 0.05 and (first - second).mean() > 0 and rank == pytest.approx(signed.sum()) and rank < 0
    means = rng.choice(first - second, (2000, 22)).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    found = statistics.Comparison("a", "b", (first - second).mean(), low, high, p, 22, 22, rank=rank)
    assert found.better is None and statistics.clear_best([found]) is None
