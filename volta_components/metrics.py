# SPDX-License-Identifier: Apache-2.0
"""Metrics of a two-class classifier, from scikit-learn where it has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import recall_score, roc_auc_score, roc_curve

from volta_components.errors import InputError


def _pair(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    truth, values = np.asarray(labels).astype(int), np.asarray(scores, dtype=float)
    if truth.shape != values.shape or truth.ndim != 1:
        raise InputError(f"labels {truth.shape} and scores {values.shape} are not two lists of one length")
    if set(np.unique(truth)) != {0, 1}:
        raise InputError(f"labels {sorted(set(truth.tolist()))}: both classes, 0 and 1, are needed")
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite")
    return truth, values


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve.

    Args:
        labels: ``[n]``, 0 or 1; both must be there.
        scores: ``[n]``, higher for label 1.

    Raises:
        InputError: if a class is missing or a score is not finite.
    """
    return float(roc_auc_score(*_pair(labels, scores)))


def sensitivity_specificity(labels: ArrayLike, scores: ArrayLike, threshold: float) -> tuple[float, float]:
    """Shares of label 1 and of label 0 that are called right, when ``score >= threshold`` is called 1.

    Args:
        labels: ``[n]``, 0 or 1; both must be there.
        scores: ``[n]``, higher for label 1.
        threshold: any number.

    Raises:
        InputError: if a class is missing or a score is not finite.
    """
    truth, values = _pair(labels, scores)
    called = (values >= threshold).astype(int)
    return float(recall_score(truth, called, pos_label=1)), float(recall_score(truth, called, pos_label=0))


def youden_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold that makes Youden's ``J = sensitivity + specificity - 1`` largest on the given scores.

    Between the lowest score that is then called 1 and the highest one that is called 0 every threshold is as good; the
    middle is taken, as neither side should be favoured in scores to come. Of several equally good cuts, the one with
    the higher threshold is taken.

    Args:
        labels: ``[n]``, 0 or 1; both must be there.
        scores: ``[n]``, higher for label 1.

    Raises:
        InputError: if a class is missing or a score is not finite.

    Source: Youden, "Index for rating diagnostic tests", Cancer 3 (1950).
    """
    truth, values = _pair(labels, scores)
    false_positive, true_positive, thresholds = roc_curve(truth, values, drop_intermediate=False)
    finite = np.isfinite(thresholds)
    lowest_called = thresholds[finite][int(np.argmax((true_positive - false_positive)[finite]))]
    below = values[values < lowest_called]
    return float(lowest_called if below.size == 0 else (lowest_called + below.max()) / 2)


def bootstrap_aurocs(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[str] | None = None,
    repeats: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """AUROC of bootstrap samples of patients.

    A sample is a weight for each row, and the weighted AUROC is a sum over sorted scores, so that all samples are
    computed at once; scikit-learn's ``roc_auc_score`` with these weights gives the same numbers one by one.

    Args:
        labels: ``[n]``, 0 or 1; both must be there.
        scores: ``[n]``, higher for label 1.
        patients: of each row; all rows of a patient are drawn together. By default, each row is a patient.
        repeats: number of samples; those with one class only are drawn again.
        seed: of the draws; with the same patients in the same order, the same draws.

    Returns:
        ``[repeats]``.

    Raises:
        InputError: if a class is missing or a score is not finite.
    """
    truth, values = _pair(labels, scores)
    names, owner = np.unique(np.arange(len(truth)) if patients is None else np.asarray(patients), return_inverse=True)
    levels, level = np.unique(values, return_inverse=True)
    at_level = np.zeros((len(truth), len(levels)))
    at_level[np.arange(len(truth)), level] = 1
    rng = np.random.default_rng(seed)
    found: list[float] = []
    while len(found) < repeats:
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=repeats)
        weights = drawn[:, owner].astype(float)
        positive, negative = ((weights * (truth == value)) @ at_level for value in (1, 0))
        # A pair of equal scores counts one half.
        below = negative.cumsum(axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        usable = pairs > 0
        found += ((positive * below).sum(axis=1)[usable] / pairs[usable]).tolist()
    return np.array(found[:repeats])


def auroc_interval(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[str] | None = None,
    repeats: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """AUROC with a percentile bootstrap interval over patients.

    Args:
        labels: ``[n]``, 0 or 1; both must be there.
        scores: ``[n]``, higher for label 1.
        patients: see ``bootstrap_aurocs``.
        repeats: bootstrap samples.
        seed: of the draws.
        level: coverage of the interval, in (0, 1).

    Returns:
        AUROC, lower and upper bound.

    Raises:
        InputError: if a class is missing or a score is not finite.
    """
    samples = bootstrap_aurocs(labels, scores, patients, repeats, seed)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return auroc(labels, scores), float(low), float(high)
