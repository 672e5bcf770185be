# SPDX-License-Identifier: Apache-2.0
"""Tables of the classification tasks."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from volta_components.downstream.metrics import (
    BOOTSTRAP,
    FEWEST,
    Array,
    Resampling,
    auroc,
    interval,
    share,
    weighted_mean,
)
from volta_components.report import statistics
from volta_components.report.paper import METRICS, name_of
from volta_components.report.statistics import Comparison, Estimate
from volta_components.report.store import FinishedRun, Study
from volta_components.report.tables import (
    BOLD,
    INTERVALS,
    SEEDS,
    Table,
    cell,
    compare_by,
    comparison_table,
    fraction_table,
    groups_of,
    main_table,
    members_of,
    number,
    plus_minus,
    subjects_of,
)

OPERATING = {
    "youden": "Youden's J, chosen on an inner validation part of the training folds",
    "own": "its run's own threshold",
}


class ClassificationTables:
    """Tables of a classification bundle's finished runs."""

    METRICS = ("auroc", "sensitivity", "specificity")

    def __init__(self, study: Study, samples: int = BOOTSTRAP, seed: int = 0) -> None:
        self.study, self.task = study, study.task
        self.resamplings = _fold_resamplings(study, samples, seed)
        self.estimates: dict[tuple[str, float], dict[str, Estimate]] = {}
        for variant, fraction in itertools.product(study.variants, study.fractions):
            if runs := study.select(variant, fraction):
                found, _ = statistics.summarise(
                    {run.run_id: run.table for run in runs}, {run.run_id: run.fold for run in runs}, self.resamplings
                )
                self.estimates[variant, fraction] = _checked(found, runs)
        full = study.fractions[-1]
        self.largest = {variant: found for (variant, fraction), found in self.estimates.items() if fraction == full}
        pairs = itertools.combinations(study.variants, 2)
        self.compared = [item for pair in pairs if (item := self._compare(*pair)) is not None]

    def check_against_log(self) -> list[str]:
        """Metrics computed from the tables must be those that the runs logged."""
        notes = []
        for run in self.study.runs:
            ours = statistics.classification_metrics(run.table)
            for name in self.METRICS:
                logged = run.metrics.get(name)
                if logged is not None and not math.isclose(logged, float(ours[name]), abs_tol=1e-4):
                    value = f"{float(ours[name]):.4f}"
                    notes.append(f"{run.name} logged {METRICS[name]} {logged:.4f}, but its predictions give {value}.")
        return notes

    def main(self) -> Table:
        """Table I or II."""
        full = self.study.fractions[-1]
        labels = {
            "auroc": "AUROC",
            "sensitivity": f"Sensitivity ({self.task.positive})",
            "specificity": f"Specificity ({self.task.negative})",
        }
        note = f"{self._thresholds()} "
        note += "Here: mean ± SD over folds (n − 1), and the 95 % CI: patients resampled within folds and classes. "
        note += f"{INTERVALS} {BOLD}"
        if self.study.several_seeds:
            note += " " + SEEDS.format("within the fold")
        if full < 1:
            note += f" The largest fraction of the training part that was run is {full:.0%}."
        runs = {variant: self.study.select(variant) for variant in self.study.variants}
        scored = {
            "folds": {variant: str(len({run.fold for run in found})) for variant, found in runs.items()},
            "patients": {variant: str(subjects_of(found)) for variant, found in runs.items()},
        }
        best = {"auroc": statistics.clear_best(self.compared)}
        return main_table(self.study, labels, self.largest, "folds", scored, note, best)

    def _thresholds(self) -> str:
        """Where sensitivity and specificity are taken, here and in the paper."""

        def text(threshold: str) -> str:
            return OPERATING.get(threshold) or f"the threshold {float(threshold):g}"

        chosen: dict[str, dict[str, None]] = defaultdict(dict)
        for variant in self.study.variants:
            for run in self.study.select(variant):
                chosen[text(run.params.get("threshold") or "own")][name_of(variant)] = None
        ours = " or ".join(
            place if len(chosen) == 1 else f"{place} ({', '.join(inits)})" for place, inits in sorted(chosen.items())
        )
        result = f"Sensitivity and specificity are at {ours}."
        if self.task.threshold == "youden":
            result += " The paper's are at Youden's J; it does not say on which subjects that was chosen."
        elif self.task.threshold and {*chosen} != {text(self.task.threshold)}:
            result += f" The paper's are at {text(self.task.threshold)}."
        return result

    def comparisons(self) -> Table:
        """Paired differences of AUROC between inits, on all of the training part."""
        note = (
            "Bootstrap of the difference, the same patients for both inits. Holm: p of the bootstrap, corrected for "
            f"{compare_by(self.compared)}; none for fewer than {FEWEST} patients or {FEWEST // 2} of a class. "
        )
        note += (
            "DeLong: fold differences and variances added up (MLstatkit); not corrected"
            + ("; not run where folds have several seeds" if self.study.several_seeds else "")
            + "; not run where a patient has several scans."
            if statistics.has_delong()
            else "DeLong's test was not run: it needs MLstatkit, which is not installed (pip install "
            "volta-components[delong]); SciPy and scikit-learn do not have it."
        )
        return comparison_table(f"{self.study.bundle}_comparisons", "AUROC", self.compared, note, delong=True)

    def _compare(self, first: str, second: str) -> Comparison | None:
        # Every seed of the one with every seed of the other: the difference of their means.
        runs = itertools.product(self.study.select(first), self.study.select(second))
        pairs = [(a.fold, *_aligned_rows(a.table, b.table)) for a, b in runs if a.fold == b.fold]
        pairs = [(fold, one, two) for fold, one, two in pairs if len(one)]
        if not pairs:
            return None

        def difference(one: pd.DataFrame, two: pd.DataFrame, weights: ArrayLike = 1.0) -> Array:
            label = one["label"].to_numpy()
            ours, theirs = (auroc(label, table["score"].to_numpy(float), weights) for table in (one, two))
            return ours - theirs

        values: dict[int, list[Array]] = defaultdict(list)
        replicates: dict[int, list[Array]] = defaultdict(list)
        for fold, one, two in pairs:
            values[fold].append(difference(one, two))
            replicates[fold].append(difference(one, two, self.resamplings[fold].weights(one["patient_id"])))
        means = _mean_over_folds(replicates)
        low, high = interval(means)
        everyone = pd.concat([one for _, one, _ in pairs])
        patients = statistics.patients_of(everyone)
        is_repeated = any(one["patient_id"].duplicated().any() for _, one, _ in pairs)
        samples = [
            (one["label"].to_numpy(), one["score"].to_numpy(float), two["score"].to_numpy(float))
            for _, one, two in pairs
        ]
        return Comparison(
            first,
            second,
            float(_mean_over_folds(values)),
            low,
            high,
            # A handful of patients are drawn alike too often: any difference would look certain.
            statistics.bootstrap_p(means) if patients >= FEWEST else math.nan,
            everyone["patient_id"].nunique(),
            patients,
            # Several runs of one fold share their subjects, and several scans a patient: no independent samples.
            math.nan if is_repeated or len(values) < len(pairs) or patients < FEWEST else statistics.delong(samples),
        )

    def fractions(self) -> Table | None:
        """Numbers of Figure 2."""
        note = "Mean ± SD over folds and 95 % CI."
        return fraction_table(self.study, "auroc", self.estimates, note)

    def calibration(self) -> Table:
        """Whether probabilities are frequencies: Brier score and expected calibration error."""
        table = Table(
            name=f"{self.study.bundle}_calibration",
            title="Calibration",
            columns=["init", "Brier score", "Brier, no model", "calibration error"],
            note="Of the probability of " + self.task.positive + ", scans of all folds together. Brier score: mean "
            "squared error, 0 at best; without a model, everyone gets the share of the class. Calibration error: mean "
            "distance between probability and frequency in 10 bins; of few scans it is too high.",
        )
        for variant in self.study.variants:
            runs = self.study.select(variant)
            if not runs:
                table.add([name_of(variant), "–", "–", "–"])
                continue
            seeds = Counter(run.fold for run in runs)
            everyone = pd.concat([run.table for run in runs])
            label, score = everyone["label"].to_numpy(), everyone["score"].to_numpy(float)
            error = (score - label) ** 2
            single = np.concatenate([np.full(len(run.table), 1 / seeds[run.fold]) for run in runs])
            drawn = [self.resamplings[run.fold].weights(run.table["patient_id"]) / seeds[run.fold] for run in runs]
            low, high = interval(weighted_mean(error, np.concatenate(drawn, axis=1)))
            brier = Estimate(float(weighted_mean(error, single)), low=low, high=high).checked(subjects_of(runs))
            wrong = statistics.calibration_error(label, score, single)
            share_of_ones = float(weighted_mean(label.astype(float), single))
            record = {"init": variant, "brier": brier.mean, "brier_low": brier.low, "brier_high": brier.high}
            table.add(
                [name_of(variant), cell(brier), number(share_of_ones * (1 - share_of_ones)), number(wrong)],
                {**record, "calibration_error": wrong, "patients": subjects_of(runs)},
            )
        return table

    def breakdown(self) -> Table:
        """AUROC, sensitivity and specificity by site, sex and age band."""
        breakdown = Table(
            name=f"{self.study.bundle}_breakdown",
            title="By site, sex and age",
            groups=[("", 3), *((name_of(variant), 2) for variant in self.study.variants)],
            columns=["group", "patients", self.task.positive, *["AUROC", "sens. / spec."] * len(self.study.variants)],
            note="AUROC over pairs of patients of the same fold, with its 95 % CI; – where a group has one class only. "
            "Small groups have wide intervals; these are not corrected for their number.",
        )
        for group, value in groups_of([run.table for run in self.study.runs]):
            row, numbers = [f"{group}: {value}", "–", "–"], []
            for variant in self.study.variants:
                chosen = [(run, members_of(run.table, group, value)) for run in self.study.select(variant)]
                chosen = [(run, table) for run, table in chosen if len(table)]
                if not chosen:
                    row += ["–", "–"]
                    continue
                tables = [table for _, table in chosen]
                # The seeds of a fold share its weight: for a subject 1 / n, and for a pair of subjects as well.
                seeds = Counter(run.fold for run, _ in chosen)
                single = np.concatenate([np.full(len(table), 1 / seeds[run.fold]) for run, table in chosen])
                plain = [np.full(len(table), seeds[run.fold] ** -0.5) for run, table in chosen]
                drawn = [
                    self.resamplings[run.fold].weights(table["patient_id"]) * weight
                    for (run, table), weight in zip(chosen, plain, strict=True)
                ]
                everyone = pd.concat(tables)
                label, call = everyone["label"].to_numpy() == 1, everyone["prediction"].to_numpy() == 1
                area = float(statistics.pair_auroc(tables, plain))
                low, high = interval(statistics.pair_auroc(tables, drawn))
                shown = Estimate(area, low=low, high=high).checked(statistics.patients_of(everyone))
                shares = [float(share(*pair, single)) for pair in ((call, label), (~call, ~label))]
                counts = everyone["patient_id"].nunique(), everyone.loc[label, "patient_id"].nunique()
                row[1:3] = [str(count) for count in counts]
                row += [
                    cell(shown),
                    " / ".join(plus_minus(item, math.nan) for item in shares),
                ]
                numbers.append(
                    {
                        "group": group,
                        "value": value,
                        "init": variant,
                        "patients": counts[0],
                        "positives": counts[1],
                        "auroc": area,
                        "auroc_low": shown.low,
                        "auroc_high": shown.high,
                        "sensitivity": shares[0],
                        "specificity": shares[1],
                    }
                )
            breakdown.add(row, *numbers)
        return breakdown


def _fold_resamplings(study: Study, samples: int, seed: int) -> dict[int, Resampling]:
    """One draw of patients for each fold, for all inits, fractions and seeds."""
    rows: Any = pd.concat([run.table[["patient_id", "label"]].assign(fold=run.fold) for run in study.runs])
    return {
        fold: Resampling(table["patient_id"], table["label"], samples, [seed, fold])
        for fold, table in rows.groupby("fold")
    }


def _aligned_rows(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scans that two tables share, in the same order."""
    keys = [key for key in ("subject_id", "session") if key in first and key in second]
    one, two = (
        table.assign(_key=table[keys].astype(str).agg("_".join, axis=1)).set_index("_key") for table in (first, second)
    )
    shared = one.index.intersection(two.index)
    return one.loc[shared].reset_index(drop=True), two.loc[shared].reset_index(drop=True)


def _mean_over_folds(by_fold: Mapping[int, Sequence[Array]]) -> Array:
    """Mean over folds of the mean within each."""
    return np.mean([np.mean(found, axis=0) for found in by_fold.values()], axis=0)


def _checked(found: dict[str, Estimate], runs: list[FinishedRun]) -> dict[str, Estimate]:
    """Estimates of an init with intervals that can be believed; see ``Estimate.checked``."""
    everyone = pd.concat([run.table for run in runs])
    # The exact interval of a share takes each row for another patient.
    once = not everyone["patient_id"].duplicated().any()
    result = {"auroc": found["auroc"].checked(statistics.patients_of(everyone))}
    for name, label in {"sensitivity": 1, "specificity": 0}.items():
        members = everyone[everyone["label"] == label]
        hits = int((members["prediction"] == label).sum())
        counts = (hits, len(members)) if once and len(members) else None
        result[name] = found[name].checked(members["patient_id"].nunique(), counts)
    return result
