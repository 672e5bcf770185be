# SPDX-License-Identifier: Apache-2.0
"""Metrics of a two-class classifier, from scikit-learn where it has them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks.utils import one_hot
from numpy.typing import ArrayLike
from scipy.stats import bootstrap
from sklearn.metrics import recall_score, roc_auc_score, roc_curve
from torch import Tensor

from volta_components.data.labels import SIDES
from volta_components.errors import InputError


def one_hot_pair(output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Prediction and truth of an evaluator's output, both one-hot ``[B, 3, D, H, W]``, for MONAI's metrics."""
    logits = output["pred"]
    predicted = logits.argmax(dim=1, keepdim=True)
    return one_hot(predicted, logits.shape[1]), one_hot(output["label"], logits.shape[1])


def score_mask(mask: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Dice and HD95 of one scan, per side and as the mean of both sides, with volumes.

    HD95 is the larger of both directions' 95th percentiles of distances between surfaces, in mm. It is NaN for a side
    whose mask is empty, which counts as a failure; then the mean is NaN as well. MONAI's ``HausdorffDistance`` handler
    knows no spacing and drops NaN silently, hence this function around ``compute_hausdorff_distance``.

    Args:
        mask: ``[D, H, W]``, 1 left, 2 right.
        truth: ``[D, H, W]``, the same; both sides there.
        spacing: mm along each axis.

    Returns:
        ``dice_left``, ``dice_right``, ``dice``, ``hd95_left``, ``hd95_right``, ``hd95``, ``failures`` (0 to 2),
        ``volume_left_mm3``, ``volume_right_mm3``, ``true_volume_left_mm3``, ``true_volume_right_mm3``.
    """
    pair = [torch.from_numpy(np.stack([array == value for value in SIDES.values()])[None]) for array in (mask, truth)]
    predicted, true = (tensor.float() for tensor in pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about empty masks, which are counted here
        dice = compute_dice(predicted, true, include_background=True, ignore_empty=False)[0].tolist()
        distance = compute_hausdorff_distance(
            predicted, true, include_background=True, percentile=95, spacing=[float(side) for side in spacing]
        )[0].tolist()
    voxel = float(np.prod([float(side) for side in spacing]))
    result: dict[str, float] = {}
    for name, values in (("dice", dice), ("hd95", distance)):
        result |= {f"{name}_{side}": float(value) for side, value in zip(SIDES, values, strict=True)}
        result[name] = float(np.mean(values))
    result["failures"] = sum(not (mask == value).any() for value in SIDES.values())
    for what, array in (("volume", mask), ("true_volume", truth)):
        result |= {f"{what}_{side}_mm3": int((array == value).sum()) * voxel for side, value in SIDES.items()}
    return result


def summarise_scores(rows: Sequence[Mapping[str, float]], penalty: float) -> dict[str, float]:
    """Means over scans.

    Args:
        rows: see ``score_mask``.
        penalty: HD95 in mm that a side with an empty mask counts as in ``hd95_with_penalty``.

    Returns:
        ``mean_dice``, ``dice_left``, ``dice_right``; ``hd95``, ``hd95_left``, ``hd95_right`` over those that have one
        (left out when nobody has); ``hd95_with_penalty`` over everybody; ``hd95_failures``, sides with an empty mask.
    """
    result = {
        "mean_dice": float(np.mean([row["dice"] for row in rows])),
        **{f"dice_{side}": float(np.mean([row[f"dice_{side}"] for row in rows])) for side in SIDES},
    }
    for name in ("hd95", *(f"hd95_{side}" for side in SIDES)):
        values = [row[name] for row in rows if not math.isnan(row[name])]
        if values:
            result[name] = float(np.mean(values))
    sides = np.array([[row[f"hd95_{side}"] for side in SIDES] for row in rows])
    result["hd95_with_penalty"] = float(np.where(np.isnan(sides), penalty, sides).mean())
    result["hd95_failures"] = float(sum(row["failures"] for row in rows))
    return result


def score_intervals(rows: Sequence[Mapping[str, float]], patients: Sequence[str]) -> dict[str, list[float]]:
    """95 % bootstrap intervals over patients of the mean Dice and HD95.

    Args:
        rows: see ``score_mask``.
        patients: of each row; scans of one patient are averaged first.

    Returns:
        Lower and upper bound of ``mean_dice`` and ``hd95``, where two patients or more have a value.
    """
    result = {}
    for name, key in (("mean_dice", "dice"), ("hd95", "hd95")):
        by_patient: dict[str, list[float]] = {}
        for patient, row in zip(patients, rows, strict=True):
            if not math.isnan(row[key]):
                by_patient.setdefault(patient, []).append(row[key])
        means = [float(np.mean(values)) for values in by_patient.values()]
        if len(means) > 1:
            found = bootstrap((means,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
            result[name] = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    return result


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
