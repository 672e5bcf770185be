# SPDX-License-Identifier: Apache-2.0
"""Statistics of the report: estimates over folds, and tests that SciPy and scikit-learn do not have ready-made.

Patients are resampled within folds, and the same resample serves every init: differences between inits are paired.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from volta_components.downstream.metrics import (
    FEWEST,
    Array,
    Resampling,
    auroc,
    auroc_within,
    interval,
    is_believable,
    patients_for_auroc,
    share,
)

BINS = 10  # of a reliability diagram


@dataclass(frozen=True)
class Estimate:
    """A mean over runs or subjects, its spread and its uncertainty.

    Attributes:
        mean: NaN where there is nothing to average.
        sd: sample standard deviation (n - 1); NaN for fewer than two.
        low: lower end of the 95 % bootstrap confidence interval of the mean.
        high: its upper end.
        count: how many values were averaged.
        interval: where the interval comes from (``bootstrap``, ``exact``), or why there is none.
    """

    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan
    count: int = 0
    interval: str = "bootstrap"

    def checked(self, patients: int, counts: tuple[int, int] | None = None) -> Estimate:
        """The same with an interval that can be believed, or with none.

        See ``is_believable``. A share of patients then gets the exact interval of Clopper and Pearson.

        Args:
            patients: how many were resampled.
            counts: of a share, hits and patients, each counted once.
        """
        if not math.isfinite(self.low) or is_believable(self.low, self.high, patients):
            return self
        if counts is not None:
            exact = stats.binomtest(*counts).proportion_ci(0.95, method="exact")
            return replace(self, low=float(exact.low), high=float(exact.high), interval="exact")
        why = "too few" if patients < FEWEST else "no spread"
        return replace(self, low=math.nan, high=math.nan, interval=why)


@dataclass(frozen=True)
class Comparison:
    """A paired test between two inits: first minus second, its 95 % interval, and two-sided p values.

    DeLong's p is NaN where the test was not made. ``count`` is how many patients entered, ``patients`` how many of them
    the interval rests on. ``rank`` is which way a test of ranks points, see ``rank_difference``; None for a test of the
    difference itself.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    count: int
    patients: int
    delong: float = math.nan
    rank: float | None = None

    @property
    def better(self) -> str | None:
        """The init that is better by the mean difference, its interval and the test; None where these disagree."""
        signs = {np.sign(value) for value in (self.difference, self.low, self.high)}
        signs |= {np.sign(self.rank)} if self.rank is not None else set()
        return self.first if signs == {1} else self.second if signs == {-1} else None


def classification_metrics(table: pd.DataFrame, weights: ArrayLike = 1.0) -> dict[str, Array]:
    """AUROC, sensitivity and specificity of a table with label, score, prediction; weights are ``[..., rows]``."""
    label, prediction = table["label"].to_numpy().astype(bool), table["prediction"].to_numpy().astype(bool)
    return {
        "auroc": auroc(label, table["score"].to_numpy(float), weights),
        "sensitivity": share(prediction, label, weights),
        "specificity": share(~prediction, ~label, weights),
    }


def estimate(values: Sequence[float] | NDArray[Any], replicates: NDArray[Any] | None = None) -> Estimate:
    """Summarise values; the interval is the percentiles of ``replicates``, which are bootstrap means.

    NaN values are left out.
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    low, high = interval(replicates) if replicates is not None else (math.nan, math.nan)
    return Estimate(
        mean=float(known.mean()) if len(known) else math.nan,
        sd=float(known.std(ddof=1)) if len(known) > 1 else math.nan,
        low=low,
        high=high,
        count=len(known),
    )


def patients_of(table: pd.DataFrame) -> int:
    """``patients_for_auroc`` of a table with label and patient_id."""
    return patients_for_auroc(table["label"], table["patient_id"])


def bootstrap_p(replicates: NDArray[Any]) -> float:
    """Two-sided p value that a difference is zero, from its bootstrap replicates.

    Twice the smaller share of replicates at or beyond zero, each counted with one sample more, so that p is never 0. A
    difference that is zero but for rounding is zero.
    """
    known = np.asarray(replicates, dtype=float)
    known = np.round(known[np.isfinite(known)], 12)
    if not len(known):
        return math.nan
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(known) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several tests; NaN stays NaN and is not counted.

    Source: Holm, 1979.
    """
    p = np.asarray(p_values, dtype=float)
    rising = p.argsort()[: np.isfinite(p).sum()]  # NaN is last
    adjusted = np.full(len(p), math.nan)
    adjusted[rising] = np.maximum.accumulate(np.minimum(1, p[rising] * np.arange(len(rising), 0, -1)))
    return adjusted.tolist()


def wilcoxon(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Two-sided p value of the Wilcoxon signed-rank test of paired values; 1 where every pair is equal."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    difference = difference[np.isfinite(difference)]
    if not len(difference):
        return math.nan
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0


def rank_difference(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Sum of the signed ranks of paired values: above 0 where ``wilcoxon`` is on the side of the first."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    difference = difference[np.isfinite(difference) & (difference != 0)]
    return float((np.sign(difference) * stats.rankdata(abs(difference))).sum())


def delong(pairs: Sequence[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]) -> float:
    """Two-sided p value of DeLong's test that the mean AUROC over folds is the same for two inits; NaN for none.

    For each fold: labels, scores of the first init, scores of the second, subject by subject. Folds are independent
    samples: their differences and variances add up. The variances are MLstatkit's, the one package on PyPI with the
    paired test; it is optional since it is young. Where DeLong's variance is zero, that package would quietly give a
    bootstrap p value instead; here no p value is given.
    """
    try:
        from MLstatkit import Delong_test
    except ImportError:
        return math.nan
    difference = variance = 0.0
    for labels, first, second in pairs:
        counts = np.bincount(np.asarray(labels).astype(int), minlength=2)
        if counts.min() < 2:
            return math.nan
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of that bootstrap's one sample
                *_, auc_first, auc_second, info = Delong_test(labels, first, second, n_boot=1)
        except FloatingPointError:  # a zero variance, and its one bootstrap sample has a single class
            return math.nan
        if info["var_diff"] is None:
            return math.nan
        difference += auc_first - auc_second
        variance += info["var_diff"]
    return float(2 * stats.norm.sf(abs(difference) / math.sqrt(variance))) if variance > 0 else math.nan


def has_delong() -> bool:
    """Whether DeLong's test can be made here."""
    from importlib.util import find_spec

    return find_spec("MLstatkit") is not None


def summarise(
    runs: Mapping[Any, pd.DataFrame], folds: Mapping[Any, int], resamplings: Mapping[int, Resampling]
) -> tuple[dict[str, Estimate], dict[str, Array]]:
    """Estimates of a classification init's metrics, and bootstrap replicates of their means over folds.

    Several runs of a fold (seeds) are averaged first: they share their subjects, and are one value of the fold.
    """
    values, replicates = [], []
    for fold in sorted({folds[key] for key in runs}):
        tables = [table for key, table in runs.items() if folds[key] == fold]
        values.append(_mean([classification_metrics(table) for table in tables]))
        weighted = [classification_metrics(table, resamplings[fold].weights(table["patient_id"])) for table in tables]
        replicates.append(_mean(weighted))
    means = _mean(replicates)
    return {name: estimate([float(item[name]) for item in values], means[name]) for name in means}, means


def _mean(items: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {name: np.mean([item[name] for item in items], axis=0) for name in items[0]}


def pair_auroc(tables: Sequence[pd.DataFrame], weights: Sequence[NDArray[Any]] | None = None) -> Array:
    """AUROC of a few subjects of each fold, a table each; see ``auroc_within``."""
    label, score = (np.concatenate([table[name].to_numpy(float) for table in tables]) for name in ("label", "score"))
    folds = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    return auroc_within(label, score, folds, 1.0 if weights is None else np.concatenate(list(weights), axis=-1))


def calibration_error(labels: NDArray[Any], scores: NDArray[Any], weights: NDArray[Any]) -> float:
    """Expected calibration error over bins of equal width: how far probabilities are from frequencies, on average.

    Args:
        labels: 0 or 1, ``[N]``.
        scores: probabilities of 1, ``[N]``.
        weights: how much each counts, ``[N]``.

    Source: Guo et al., "On calibration of modern neural networks" (2017), equation 3, for a two-class problem.
    """
    # Bins as scikit-learn's: a score on an edge belongs to the lower bin.
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], scores)
    # A bin's weight times the distance of its means is the distance of its sums.
    return float(abs(np.bincount(bins, weights * (labels - scores))).sum() / weights.sum())


def limits_of_agreement(measured: NDArray[Any], true: NDArray[Any]) -> tuple[float, float, float]:
    """Mean difference and 95 % limits of agreement (± 1.96 SD of the differences); NaN limits for fewer than two.

    Source: Bland and Altman, Lancet 327 (1986).
    """
    difference = np.asarray(measured, float) - np.asarray(true, float)
    bias = float(difference.mean()) if len(difference) else math.nan
    half = 1.96 * float(difference.std(ddof=1)) if len(difference) > 1 else math.nan
    return bias, bias - half, bias + half


def intraclass_correlation(ratings: NDArray[Any]) -> float:
    """ICC(2,1): absolute agreement of single ratings, two-way random effects; NaN for fewer than two subjects.

    Args:
        ratings: ``[subjects, raters]``.

    Source: Shrout and Fleiss, Psychological Bulletin 86 (1979).
    """
    values = np.asarray(ratings, float)
    subjects, raters = values.shape
    if subjects < 2:
        return math.nan
    grand = values.mean()
    rows = raters * ((values.mean(1) - grand) ** 2).sum() / (subjects - 1)
    columns = subjects * ((values.mean(0) - grand) ** 2).sum() / (raters - 1)
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + grand
    error = (rest**2).sum() / ((subjects - 1) * (raters - 1))
    total = rows + (raters - 1) * error + raters * (columns - error) / subjects
    return float((rows - error) / total) if total > 0 else math.nan


def clear_best(found: Sequence[Comparison]) -> str | None:
    """The init that is better than every other one, each time with a corrected p below 0.05; else None.

    Mean difference, interval and test must agree on which init is better: one failure can turn the mean against a test
    of ranks.
    """
    beaten: dict[str, set[str]] = {}
    inits = {name for item in found for name in (item.first, item.second)}
    for item, p in zip(found, holm([item.p for item in found]), strict=True):
        if p < 0.05 and item.better:
            beaten.setdefault(item.better, set()).add(item.second if item.better == item.first else item.first)
    return next((name for name, others in beaten.items() if others == inits - {name}), None)
