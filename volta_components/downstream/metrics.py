# SPDX-License-Identifier: Apache-2.0
"""Metrics of two-class classifiers and of label maps, and their bootstrap over patients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks.utils import one_hot
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_curve
from torch import Tensor

from volta_components.data.labels import SIDES
from volta_components.errors import InputError

Array = NDArray[np.float64]
CONFIDENCE = 0.95
BOOTSTRAP = 2000
FEWEST = 20  # patients that a bootstrap interval needs; for an AUROC, half as many of each class


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
    """Means over scans of what ``score_mask`` gives; ``penalty`` is the HD95 (mm) of a side with an empty mask.

    Returns:
        ``mean_dice``, ``dice_left``, ``dice_right``; ``hd95``, ``hd95_left``, ``hd95_right`` over scans that have one
        (left out if none has); ``hd95_with_penalty`` over all scans; ``hd95_failures``, sides with an empty mask.
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


def score_intervals(rows: Sequence[Mapping[str, float]], patients: Sequence[str]) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of ``mean_dice`` and ``hd95``, where these can be believed; see ``is_believable``.

    They are means over scans, and so is what an interval is of; patients are drawn, each with all of their scans.
    """
    result = {}
    for name, key in (("mean_dice", "dice"), ("hd95", "hd95")):
        known = [(patient, row[key]) for patient, row in zip(patients, rows, strict=True) if not math.isnan(row[key])]
        owners = [patient for patient, _ in known]
        weights = Resampling(owners).weights(owners)
        limits = interval(weighted_mean(np.array([value for _, value in known]), weights))
        if is_believable(*limits, len(set(owners))):
            result[name] = limits
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


def sensitivity_specificity(labels: ArrayLike, scores: ArrayLike, threshold: float) -> tuple[float, float]:
    """Shares of label 1 and of label 0 that are called right, when ``score >= threshold`` is called 1.

    Raises:
        InputError: if a class is missing or a score is not finite.
    """
    truth, values = _pair(labels, scores)
    called = values >= threshold
    return float(share(called, truth == 1)), float(share(~called, truth == 0))


def youden_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold that makes Youden's ``J = sensitivity + specificity - 1`` largest on the given scores.

    Between the lowest score that is then called 1 and the highest one that is called 0 every threshold is as good; the
    middle is taken, as neither side should be favoured in scores to come. Of several equally good cuts, the one with
    the higher threshold is taken.

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


def auroc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike = 1.0) -> Array:
    """Area under the ROC curve, for many weightings of the rows at once.

    Args:
        labels: ``[n]``, 0 or 1.
        scores: ``[n]``, higher for label 1; a pair of equal scores counts one half.
        weights: ``[..., n]``, such as how often a bootstrap sample holds each row.

    Returns:
        ``[...]``; NaN where a class is missing.

    Source: the Mann-Whitney form; scikit-learn's ``roc_auc_score`` gives the same numbers one weighting at a time.
    """
    positive, values = np.asarray(labels).astype(bool), np.asarray(scores, dtype=float)
    given = np.asarray(weights, dtype=float)
    order = values.argsort()
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))  # of each level of equal scores
    ones, zeros = (np.add.reduceat((given * which)[..., order], starts, axis=-1) for which in (positive, ~positive))
    ahead = ones * (zeros.cumsum(axis=-1) - zeros / 2)
    return ratio(ahead.sum(-1), ones.sum(-1) * zeros.sum(-1))


def auroc_within(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, weights: ArrayLike = 1.0) -> Array:
    """AUROC of pairs *of the same group*: every pair of a one and a zero counts once.

    Scores of different folds come from different models and are not compared: where shares of a class differ between
    folds, a model that knows nothing but these shares would be below 0.5. Unlike a mean over groups it is defined when
    some group has none of a class, as happens in small ones.

    Args:
        labels: ``[n]``, 0 or 1.
        scores: ``[n]``, higher for label 1.
        groups: ``[n]``, such as the fold of each row.
        weights: ``[..., n]``, as for ``auroc``.

    Returns:
        ``[...]``; NaN where no group has both classes.
    """
    positive, values, owner = np.asarray(labels).astype(bool), np.asarray(scores, dtype=float), np.asarray(groups)
    given = np.asarray(weights, dtype=float) * np.ones(len(values))
    wins, pairs = np.zeros(given.shape[:-1]), np.zeros(given.shape[:-1])
    for group in np.unique(owner):
        here = owner == group
        weight = given[..., here]
        number = weight[..., positive[here]].sum(-1) * weight[..., ~positive[here]].sum(-1)
        wins = wins + np.nan_to_num(auroc(positive[here], values[here], weight)) * number
        pairs = pairs + number
    return ratio(wins, pairs)


def share(hits: ArrayLike, among: ArrayLike, weights: ArrayLike = 1.0) -> Array:
    """Weighted share of the rows ``hits [n]`` among the rows ``among [n]``, for ``weights [..., n]``."""
    counted = np.asarray(weights) * np.asarray(among).astype(float)
    return ratio((counted * np.asarray(hits)).sum(-1), counted.sum(-1))


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> Array:
    """Mean of ``values [n]`` for each row of ``weights [..., n]``, leaving out NaN."""
    known = np.isfinite(values)
    return ratio((weights[..., known] * values[known]).sum(-1), weights[..., known].sum(-1))


def ratio(upper: Array, lower: Array) -> Array:
    """``upper / lower``; NaN where ``lower`` is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lower > 0, np.divide(upper, lower), np.nan)


class Resampling:
    """How often each bootstrap sample holds each patient; all rows of a patient are drawn together.

    Patients are drawn with replacement, within their stratum where there are strata. The draw depends on the seed and
    the patients alone, so that differences between models that were scored on the same patients are paired.

    Args:
        patients: of each row, in any order.
        strata: of each row, whole numbers; a patient with several counts by the largest.
        samples: number of bootstrap samples.
        seed: of the draw.
    """

    def __init__(
        self,
        patients: Iterable[Hashable],
        strata: ArrayLike | None = None,
        samples: int = BOOTSTRAP,
        seed: int | Sequence[int] = 0,
    ) -> None:
        names, owner = np.unique(np.asarray(list(patients)), return_inverse=True)
        self.place = {name: number for number, name in enumerate(names.tolist())}
        self.counts = np.zeros((samples, len(names)))
        stratum = np.zeros(len(names), dtype=int)
        if strata is not None:
            np.maximum.at(stratum, owner, np.asarray(strata).astype(int))
        rng = np.random.default_rng(seed)
        for value in np.unique(stratum):
            columns = np.flatnonzero(stratum == value)
            self.counts[:, columns] = rng.multinomial(len(columns), np.full(len(columns), 1 / len(columns)), samples)

    def weights(self, patients: Iterable[Hashable]) -> Array:
        """``[samples, rows]``: how often each sample holds the patient of each row."""
        return self.counts[:, [self.place[patient] for patient in patients]]


def interval(replicates: ArrayLike) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap replicates, leaving out NaN; NaN where nothing is left."""
    known = np.asarray(replicates, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def is_believable(low: float, high: float, patients: int) -> bool:
    """Whether a bootstrap interval of so many patients means what it says.

    The percentiles of a bootstrap are too narrow for fewer than 20 patients, and have no width where all of them agree.
    """
    return patients >= FEWEST and high - low > 1e-9


def patients_for_auroc(labels: ArrayLike, patients: Iterable[Hashable]) -> int:
    """How many patients an AUROC's interval rests on: all, but at most twice those of the rarer class.

    Of 40 patients with two of a class, a 95 % interval would hold the true value 70 times of 100.
    """
    truth, owners = np.asarray(labels).astype(int), np.asarray(list(patients))
    return min(len(np.unique(owners)), *(2 * len(np.unique(owners[truth == label])) for label in (0, 1)))


def auroc_interval(
    labels: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[Hashable] | None = None,
    samples: int = BOOTSTRAP,
    seed: int = 0,
) -> tuple[float, float, float]:
    """AUROC with its 95 % bootstrap interval over patients (by default, each row is one): value, lower, upper bound.

    Bootstrap samples of one class only are left out. The bounds are NaN where they could not be believed; see
    ``is_believable`` and ``patients_for_auroc``.

    Raises:
        InputError: if a class is missing or a score is not finite.
    """
    truth, values = _pair(labels, scores)
    owners = range(len(truth)) if patients is None else patients
    weights = Resampling(owners, samples=samples, seed=seed).weights(owners)
    limits = interval(auroc(truth, values, weights))
    if not is_believable(*limits, patients_for_auroc(truth, owners)):
        limits = math.nan, math.nan
    return float(auroc(truth, values)), *limits
