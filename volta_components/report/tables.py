# SPDX-License-Identifier: Apache-2.0
"""The report's tables: numbers for CSV files, and the same numbers as text for the page."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from volta_components.report import statistics
from volta_components.report.paper import METRICS, TASKS, Task, in_order, name_of
from volta_components.report.statistics import BOOTSTRAP, Comparison, Estimate, Resampling
from volta_components.report.store import FinishedRun, Study

SHOWN_OPTIMISTIC = {
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "threshold": "threshold",
    "mean_dice": "Dice",
    "hd95": "HD95 (mm)",
    "epoch": "epoch",
}
AGE_BANDS = (0, 30, 45, 60, 70, 80, 200)
OURS, INTERVAL, PAPER = "here", "95 % CI", "paper"
OPERATING = {"youden": "Youden's J, chosen on an inner validation part of the training folds"}
SEEDS = "Where a fold was trained with several seeds, these are averaged {} first, and count once."


@dataclass
class Table:
    """A table of the report.

    Attributes:
        name: of its CSV file.
        title: above it.
        frame: the numbers, one row for each cell of the page.
        groups: labels over columns, and how many columns each spans.
        columns: labels; those that begin with ``paper`` are set apart.
        rows: texts.
        note: below it.
    """

    name: str
    title: str
    frame: pd.DataFrame
    groups: list[tuple[str, int]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


def plus_minus(mean: float, sd: float, digits: int = 2) -> str:
    """``0.87 ± 0.01``."""
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if math.isfinite(sd) else "")


def bracket(low: float, high: float, digits: int = 2) -> str:
    """``[0.81, 0.90]``."""
    return (
        f"[{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")
        if math.isfinite(low) and math.isfinite(high)
        else "–"
    )


def _lines(mean: float, sd: float, low: float, high: float) -> str:
    """Mean and SD, and the interval on a line of its own."""
    return plus_minus(mean, sd) + ("\n" + bracket(low, high) if math.isfinite(low) and math.isfinite(high) else "")


def p_text(p: float) -> str:
    """A p value, not more exact than it is."""
    return "–" if not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def fold_resamplings(study: Study, samples: int = BOOTSTRAP, seed: int = 0) -> dict[int, Resampling]:
    """One draw of patients for each fold, for all inits, fractions and seeds."""
    return {
        fold: Resampling([run.table for run in study.runs if run.fold == fold], fold, samples, seed)
        for fold in sorted({run.fold for run in study.runs})
    }


def subjects_of(runs: Sequence[FinishedRun]) -> int:
    """Number of patients in the scored parts of runs."""
    return len({patient for run in runs for patient in run.table["patient_id"]})


def _task(study: Study) -> Task:
    return TASKS.get(study.bundle, Task("", study.bundle))


def _rows_of_paper(task: Task, variants: Sequence[str]) -> list[str]:
    """Inits to print: ours, and those that only the paper has."""
    return in_order({*variants, *task.paper})


class ClassificationTables:
    """Tables of a classification bundle.

    Args:
        study: its finished runs.
        samples: bootstrap samples.
        seed: of the bootstrap.
    """

    METRICS = ("auroc", "sensitivity", "specificity")

    def __init__(self, study: Study, samples: int = BOOTSTRAP, seed: int = 0) -> None:
        self.study, self.task = study, _task(study)
        self.resamplings = fold_resamplings(study, samples, seed)
        self.estimates: dict[tuple[str, float], dict[str, Estimate]] = {}
        self.means: dict[tuple[str, float], dict[str, Any]] = {}
        for variant, fraction in itertools.product(study.variants, study.fractions):
            if runs := study.select(variant, fraction):
                self.estimates[variant, fraction], self.means[variant, fraction] = statistics.summarise(
                    {run.run_id: run.table for run in runs}, {run.run_id: run.fold for run in runs}, self.resamplings
                )

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
        names = {
            "auroc": "AUROC",
            "sensitivity": f"Sensitivity ({self.task.positive})",
            "specificity": f"Specificity ({self.task.negative})",
        }
        rows, numbers = [], []
        for variant in _rows_of_paper(self.task, self.study.variants):
            ours, paper = self.estimates.get((variant, full)), self.task.paper.get(variant, {})
            runs = self.study.select(variant)
            row = [name_of(variant)]
            for metric in self.METRICS:
                value = ours[metric] if ours else _nothing()
                row.append(_lines(value.mean, value.sd, value.low, value.high))
                row.append(plus_minus(*paper[metric]) if metric in paper else "–")
                numbers.append(_record(variant, metric, value, paper.get(metric), subjects_of(runs), full))
            rows.append([*row, str(len({run.fold for run in runs})), str(subjects_of(runs))])
        note = f"{self._thresholds()} "
        note += "Here: mean ± SD over folds (n − 1), and the 95 % CI: patients resampled within folds and classes."
        if self.study.several_seeds:
            note += " " + SEEDS.format("within the fold")
        if full < 1:
            note += f" The largest fraction of the training part that was run is {full:.0%}."
        return Table(
            name=f"{self.study.bundle}_main",
            title=(f"Table {self.task.table}. " if self.task.table else "") + self.task.title,
            frame=pd.DataFrame(numbers),
            groups=[("", 1), *((names[metric], 2) for metric in self.METRICS), ("scored", 2)],
            columns=["init", *_by_paper("folds", self.task) * 3, "folds", "patients"],
            rows=rows,
            note=note,
        )

    def _thresholds(self) -> str:
        """Where sensitivity and specificity are taken, here and in the paper."""

        def text(threshold: str) -> str:
            return OPERATING.get(threshold) or f"the threshold {float(threshold):g}"

        chosen: dict[str, list[str]] = {}
        for variant in self.study.variants:
            for run in self.study.select(variant):
                threshold = run.params.get("threshold") or "own"
                chosen.setdefault("its run's own threshold" if threshold == "own" else text(threshold), []).append(
                    variant
                )
        ours = " or ".join(
            place if len(chosen) == 1 else f"{place} ({', '.join(map(name_of, dict.fromkeys(variants)))})"
            for place, variants in sorted(chosen.items())
        )
        result = f"Sensitivity and specificity are at {ours}."
        if self.task.threshold == "youden":
            result += " The paper's are at Youden's J; it does not say on whom that was chosen."
        elif self.task.threshold and {*chosen} != {text(self.task.threshold)}:
            result += f" The paper's are at {text(self.task.threshold)}."
        return result

    def comparisons(self) -> Table:
        """Paired differences of AUROC between inits, on all of the training part."""
        full = self.study.fractions[-1]
        found = [self._compare(first, second, full) for first, second in itertools.combinations(self.study.variants, 2)]
        note = (
            "Bootstrap of the difference, the same patients for both inits. Holm: p of the bootstrap, corrected for "
            f"{_comparisons(found)}. "
        )
        note += (
            "DeLong: fold differences and variances added up (MLstatkit); not corrected"
            + ("; not made where folds have several seeds." if self.study.several_seeds else ".")
            if statistics.has_delong()
            else "DeLong's test was not made: of the libraries at hand none has it (SciPy and scikit-learn do not; "
            "MLstatkit, which has, is not installed: pip install volta-components[delong])."
        )
        return _comparison_table(
            f"{self.study.bundle}_comparisons", "AUROC", [c for c in found if c], note, delong=True
        )

    def _compare(self, first: str, second: str, fraction: float) -> Comparison | None:
        values: dict[int, list[float]] = {}
        replicates: dict[int, list[Any]] = {}
        arrays = []
        patients: set[str] = set()
        # Every seed of the one with every seed of the other: the difference of their means.
        for ours, theirs in itertools.product(self.study.select(first, fraction), self.study.select(second, fraction)):
            if ours.fold != theirs.fold:
                continue
            one, two = _aligned(ours.table, theirs.table)
            if not len(one):
                continue
            weights = self.resamplings[ours.fold].weights(one)
            label = one["label"].to_numpy()
            scores = one["score"].to_numpy(float), two["score"].to_numpy(float)
            difference = statistics.auroc(label, scores[0]) - statistics.auroc(label, scores[1])
            values.setdefault(ours.fold, []).append(float(difference))
            difference = statistics.auroc(label, scores[0], weights) - statistics.auroc(label, scores[1], weights)
            replicates.setdefault(ours.fold, []).append(difference)
            arrays.append((label, *scores))
            patients.update(one["patient_id"])
        if not values:
            return None
        means = np.mean([np.mean(items, axis=0) for items in replicates.values()], axis=0)
        low, high = statistics.interval(means)
        return Comparison(
            first,
            second,
            float(np.mean([np.mean(items) for items in values.values()])),
            low,
            high,
            statistics.bootstrap_p(means),
            len(patients),
            # Several runs of one fold share their subjects and are no independent samples.
            statistics.delong(arrays) if len(arrays) == len(values) else math.nan,
        )

    def fractions(self) -> Table | None:
        """Numbers of Figure 2."""
        note = "Mean ± SD over folds and 95 % CI."
        return _fraction_table(self.study, "auroc", self.estimates, note)

    def breakdown(self) -> Table:
        """AUROC, sensitivity and specificity by site, sex and age band."""
        numbers, rows = [], []
        for group, value in _groups([run.table for run in self.study.runs]):
            row = [f"{group}: {value}", "–", "–"]
            for variant in self.study.variants:
                chosen = [(run, _members(run.table, group, value)) for run in self.study.select(variant)]
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
                    self.resamplings[run.fold].weights(table) * weight
                    for (run, table), weight in zip(chosen, plain, strict=True)
                ]
                everyone = pd.concat(tables)
                label, call = everyone["label"].to_numpy() == 1, everyone["prediction"].to_numpy() == 1
                area = float(statistics.pair_auroc(tables, plain))
                low, high = statistics.interval(statistics.pair_auroc(tables, drawn))
                shares = [float(statistics.share(*pair, single)) for pair in ((call, label), (~call, ~label))]
                counts = everyone["patient_id"].nunique(), everyone.loc[label, "patient_id"].nunique()
                row[1:3] = [str(count) for count in counts]
                row += [_lines(area, math.nan, low, high), " / ".join(plus_minus(item, math.nan) for item in shares)]
                record = {
                    "group": group,
                    "value": value,
                    "init": variant,
                    "patients": counts[0],
                    "positives": counts[1],
                }
                record |= {"auroc": area, "auroc_low": low, "auroc_high": high}
                numbers.append({**record, "sensitivity": shares[0], "specificity": shares[1]})
            rows.append(row)
        return Table(
            name=f"{self.study.bundle}_breakdown",
            title="By site, sex and age",
            frame=pd.DataFrame(numbers),
            groups=[("", 3), *((name_of(variant), 2) for variant in self.study.variants)],
            columns=["group", "patients", self.task.positive, *["AUROC", "sens. / spec."] * len(self.study.variants)],
            rows=rows,
            note="AUROC over pairs of patients of the same fold, with its 95 % CI; – where a group has one class only. "
            "Small groups have wide intervals; these are not corrected for their number.",
        )


class SegmentationTables:
    """Tables of a segmentation bundle.

    Args:
        study: its finished runs.
        tools: tables of other tools' masks, by the tool's name.
        samples: bootstrap samples.
        seed: of the bootstrap.
    """

    METRICS = ("dice", "hd95")

    def __init__(
        self, study: Study, tools: Mapping[str, pd.DataFrame], samples: int = BOOTSTRAP, seed: int = 0
    ) -> None:
        self.study, self.task = study, _task(study)
        penalties = {run.params["hd95_penalty_mm"] for run in study.runs if "hd95_penalty_mm" in run.params}
        # Another tool's masks are penalised as the runs' are, if these agree.
        self.penalty = float(next(iter(penalties))) if len(penalties) == 1 else math.nan
        self.tables = {variant: _scored(study.select(variant)) for variant in study.variants}
        self.tables |= {name: with_penalty(table, self.penalty) for name, table in tools.items()}
        shares = {
            (variant, fraction): _scored(runs)
            for variant, fraction in itertools.product(study.variants, study.fractions)
            if (runs := study.select(variant, fraction))
        }
        self.resampling = Resampling([*self.tables.values(), *shares.values()], 0, samples, seed)
        self.estimates = {
            key: {metric: self._estimate(table, metric) for metric in self.METRICS} for key, table in shares.items()
        }

    def _estimate(self, table: pd.DataFrame, metric: str) -> Estimate:
        values = table[metric].to_numpy(float)
        replicates = statistics.weighted_mean(values, self.resampling.weights(table))
        return statistics.estimate(values, replicates)

    def check_against_log(self) -> list[str]:
        """Means computed from the tables must be those that the runs logged."""
        notes = []
        for run in self.study.runs:
            table = with_penalty(run.table, _penalty_of(run))
            for name, column in {"mean_dice": "dice", "hd95": "hd95", "hd95_with_penalty": "hd95_with_penalty"}.items():
                ours, logged = float(table[column].mean()), run.metrics.get(name)
                if logged is not None and math.isfinite(logged) and not math.isclose(logged, ours, abs_tol=1e-4):
                    notes.append(f"{run.name} logged {name} {logged:.4f}, but its scores give {ours:.4f}.")
        return notes

    def main(self) -> Table:
        """Table III."""
        rows, numbers = [], []
        for variant in [*_rows_of_paper(self.task, self.study.variants), *self._tools()]:
            table, paper = self.tables.get(variant), self.task.paper.get(variant, {})
            count = 0 if table is None else table["patient_id"].nunique()
            row = [name_of(variant)]
            for metric in self.METRICS:
                value = _nothing() if table is None else self._estimate(table, metric)
                row.append(_lines(value.mean, value.sd, value.low, value.high))
                row.append(plus_minus(*paper[metric]) if metric in paper else "–")
                numbers.append(_record(variant, metric, value, paper.get(metric), count, self.study.fractions[-1]))
            rows.append([*row, _failures(table), str(count)])
        return Table(
            name=f"{self.study.bundle}_main",
            title=(f"Table {self.task.table}. " if self.task.table else "") + self.task.title,
            frame=pd.DataFrame(numbers),
            groups=[("", 1), ("Dice", 2), ("HD95 (mm)", 2), ("scored", 2)],
            columns=["init", *_by_paper("subjects", self.task) * 2, "empty masks", "patients"],
            rows=rows,
            note="Here: mean of left and right ± SD between subjects (n − 1), and the 95 % CI: patients resampled. "
            + ("The paper's SD is per epoch, which is another thing. " if self.task.spread == "epochs" else "")
            + "An empty mask has Dice 0 and no HD95: HD95 is over the scans that have both sides; the table of left "
            "and right has it with a penalty as well."
            + (" " + SEEDS.format("for each scan") if self.study.several_seeds else ""),
        )

    def fractions(self) -> Table | None:
        """Dice with less data."""
        return _fraction_table(self.study, "dice", self.estimates, "Mean ± SD between subjects and 95 % CI.")

    def _tools(self) -> list[str]:
        return [name for name in self.tables if name not in self.study.variants]

    def sides(self) -> Table:
        """Left and right apart, failures and the penalty."""
        columns = {"dice_left": 2, "dice_right": 2, "hd95_left": 2, "hd95_right": 2}
        rows, numbers = [], []
        for variant, table in self.tables.items():
            row = [name_of(variant)]
            record: dict[str, Any] = {"init": variant}
            for column, digits in columns.items():
                value = self._estimate(table, column) if column in table else _nothing()
                row.append(plus_minus(value.mean, value.sd, digits))
                record |= {f"{column}_mean": value.mean, f"{column}_sd": value.sd}
            penalised = self._estimate(table, "hd95_with_penalty")
            failures = float(table["failures"].sum()) if "failures" in table else math.nan
            record |= {"failures": failures, "hd95_with_penalty": penalised.mean}
            record |= {"hd95_with_penalty_low": penalised.low, "hd95_with_penalty_high": penalised.high}
            numbers.append(record)
            row.append(_failures(table))
            rows.append([*row, _lines(penalised.mean, penalised.sd, penalised.low, penalised.high)])
        return Table(
            name=f"{self.study.bundle}_sides",
            title="Left, right, and failures",
            frame=pd.DataFrame(numbers),
            groups=[("", 1), ("Dice", 2), ("HD95 (mm)", 2), ("empty masks", 2)],
            columns=["init", "left", "right", "left", "right", "count", "HD95 with penalty"],
            rows=rows,
            note="Mean ± SD between subjects. With penalty: a side with an empty mask counts as "
            + (f"{self.penalty:.0f} mm." if math.isfinite(self.penalty) else "its run's hd95_penalty_mm."),
        )

    def comparisons(self) -> Table:
        """Paired differences of Dice between inits, patient by patient."""
        found = []
        for first, second in itertools.combinations(self.tables, 2):
            one, two = (self.tables[name].groupby("patient_id")["dice"].mean() for name in (first, second))
            shared = one.index.intersection(two.index)
            if not len(shared):
                continue
            frame = pd.DataFrame({"patient_id": shared, "difference": (one[shared] - two[shared]).to_numpy()})
            replicates = statistics.weighted_mean(frame["difference"].to_numpy(), self.resampling.weights(frame))
            low, high = statistics.interval(replicates)
            p = statistics.wilcoxon(one[shared].to_numpy(), two[shared].to_numpy())
            found.append(Comparison(first, second, float(frame["difference"].mean()), low, high, p, len(shared)))
        note = (
            "Wilcoxon signed-rank test of the patients' Dice; interval of the mean difference by bootstrap. Holm: "
            f"corrected for {_comparisons(found)}."
        )
        return _comparison_table(f"{self.study.bundle}_comparisons", "Dice", found, note)

    def breakdown(self) -> Table:
        """Dice and HD95 by site, sex and age band."""
        numbers, rows = [], []
        for group, value in _groups([*self.tables.values()]):
            row = [f"{group}: {value}", "–"]
            for variant, table in self.tables.items():
                chosen = _members(table, group, value)
                count = chosen["patient_id"].nunique()
                record: dict[str, Any] = {"group": group, "value": value, "init": variant, "patients": count}
                for metric in self.METRICS:
                    item = self._estimate(chosen, metric) if count else _nothing()
                    row.append(_lines(item.mean, item.sd, item.low, item.high))
                    record |= {f"{metric}_mean": item.mean, f"{metric}_sd": item.sd}
                    record |= {f"{metric}_low": item.low, f"{metric}_high": item.high}
                if count:
                    row[1] = str(count)
                    numbers.append(record)
            rows.append(row)
        return Table(
            name=f"{self.study.bundle}_breakdown",
            title="By site, sex and age",
            frame=pd.DataFrame(numbers),
            groups=[("", 2), *((name_of(variant), 2) for variant in self.tables)],
            columns=["group", "patients", *["Dice", "HD95 (mm)"] * len(self.tables)],
            rows=rows,
            note="Mean ± SD between scans, and the 95 % CI of the mean. Small groups have wide intervals; these are "
            "not corrected for their number.",
        )


def optimistic(study: Study) -> Table | None:
    """Choices made on the scored part itself, as the paper did or may have done: too good, and named so."""
    names = sorted({name for run in study.runs for name in run.metrics if name.startswith("optimistic_")})
    if not names:
        return None
    what, why = {
        "classification": ("threshold", "Shown because the paper does not say on whom it chose Youden's J."),
        "segmentation": ("epoch", "Shown because the paper took the epoch that has the best Dice on its hold-out."),
    }[study.kind]
    shown = [f"optimistic_{name}" for name in SHOWN_OPTIMISTIC if f"optimistic_{name}" in names]
    numbers, rows = [], []
    for variant in study.variants:
        texts = {}
        for name in names:
            value = statistics.estimate([run.metrics.get(name, math.nan) for run in study.select(variant)])
            numbers.append({"init": variant, "metric": name, "mean": value.mean, "sd": value.sd, "runs": value.count})
            texts[name] = plus_minus(value.mean, value.sd, 0 if name == "optimistic_epoch" else 2)
        rows.append([name_of(variant), *(texts[name] for name in shown)])
    return Table(
        name=f"{study.bundle}_optimistic",
        title=f"Optimistic: the {what} chosen on the scored part itself",
        frame=pd.DataFrame(numbers),
        columns=["init", *(SHOWN_OPTIMISTIC[name.removeprefix("optimistic_")] for name in shown)],
        rows=rows,
        note=f"Too good by construction. {why} Mean ± SD over runs.",
    )


def run_table(studies: Sequence[Study]) -> Table:
    """Every run that counts, and what it was made from."""
    keys = (
        "datalist_name",
        "datalist_hash",
        "encoder_sha256",
        "pretrain_datalist_hash",
        "code_version",
        "leak",
        "phantom",
    )
    numbers, rows = [], []
    for study in studies:
        for run in sorted(
            study.runs, key=lambda run: (study.variants.index(run.variant), run.fraction, run.fold, run.seed)
        ):
            tags = {"started_by": "hand" if run.by_hand else "crossval"}
            tags |= {key: run.tags.get(key, "") for key in keys}
            numbers.append({"bundle": study.bundle, "run": run.name, "run_id": run.run_id, "seed": run.seed, **tags})
            hashes = [(tags[key] or "–")[:12] for key in ("datalist_hash", "encoder_sha256")]
            rest = tags["code_version"] or "–", tags["leak"] or "–", run.run_id[:8]
            rows.append([study.bundle, run.name, tags["started_by"], *hashes, *rest])
    return Table(
        name="runs",
        title="Runs that count",
        frame=pd.DataFrame(numbers),
        columns=["bundle", "run", "started by", "datalist", "encoder", "code", "leak", "MLflow id"],
        rows=rows,
    )


def _comparisons(found: Sequence[Comparison | None]) -> str:
    return "the only comparison of this table" if len(found) == 1 else f"the {len(found)} comparisons of this table"


def _comparison_table(name: str, metric: str, found: list[Comparison], note: str, delong: bool = False) -> Table:
    corrected = statistics.holm([item.p for item in found])
    rows, numbers = [], []
    for item, holm in zip(found, corrected, strict=True):
        row = [f"{name_of(item.first)} − {name_of(item.second)}", f"{item.difference:+.3f}".replace("-", "−")]
        row += [bracket(item.low, item.high, 3), p_text(item.p), p_text(holm)]
        rows.append([*row, *([p_text(item.delong)] if delong else []), str(item.count)])
        record = {"first": item.first, "second": item.second, "metric": metric, "difference": item.difference}
        record |= {"low": item.low, "high": item.high, "p": item.p, "p_holm": holm, "patients": item.count}
        numbers.append({**record, **({"p_delong": item.delong} if delong else {})})
    return Table(
        name=name,
        title=f"Paired differences of {metric}",
        frame=pd.DataFrame(numbers),
        columns=[
            "comparison",
            "difference",
            INTERVAL,
            "p",
            "p (Holm)",
            *(["p (DeLong)"] if delong else []),
            "patients",
        ],
        rows=rows,
        note=note if found else "Needs two inits that were scored on the same patients.",
    )


def _aligned(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scans that two tables share, in the same order."""
    keys = [key for key in ("subject_id", "session") if key in first and key in second]
    one, two = (
        table.assign(_key=table[keys].astype(str).agg("_".join, axis=1)).set_index("_key") for table in (first, second)
    )
    shared = one.index.intersection(two.index)
    return one.loc[shared].reset_index(drop=True), two.loc[shared].reset_index(drop=True)


def _penalty_of(run: FinishedRun) -> float:
    return float(run.params.get("hd95_penalty_mm", math.nan))


def with_penalty(table: pd.DataFrame, penalty: float) -> pd.DataFrame:
    """Add ``hd95_with_penalty``: the mean of both sides, where an empty mask counts as so many mm."""
    sides = [side for side in ("hd95_left", "hd95_right") if side in table]
    if len(sides) < 2:
        return table.assign(hd95_with_penalty=math.nan)
    return table.assign(hd95_with_penalty=table[sides].fillna(penalty).mean(axis=1, skipna=False))


def _scored(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """A row for each scan of the scored parts: where a fold has several seeds, the mean over these."""
    if not runs:
        return pd.DataFrame(columns=["subject_id", "patient_id", "dice", "hd95", "hd95_with_penalty"])
    rows = pd.concat(
        [with_penalty(run.table, _penalty_of(run)).assign(fold=run.fold) for run in runs], ignore_index=True
    )
    if len({run.fold for run in runs}) == len(runs):
        return rows
    keys = [key for key in ("fold", "subject_id", "session") if key in rows]
    measured = [
        column for column in rows if column not in {*keys, "age"} and pd.api.types.is_numeric_dtype(rows[column])
    ]
    how = {column: "mean" if column in measured else "first" for column in rows if column not in keys}
    return rows.groupby(keys, sort=False, dropna=False, as_index=False).agg(how)


def _failures(table: pd.DataFrame | None) -> str:
    return "–" if table is None or "failures" not in table else f"{round(float(table['failures'].sum()), 1):g}"


def _by_paper(spread: str, task: Task) -> list[str]:
    """Labels of our column and the paper's, each with what its SD is over."""
    words = {"folds": "± SD over folds", "subjects": "± SD of subjects", "epochs": "± SD per epoch"}
    return [f"{OURS}\n{words[spread]}", f"{PAPER}\n{words[task.spread]}" if task.paper else PAPER]


def _fraction_table(
    study: Study, metric: str, estimates: Mapping[tuple[str, float], Mapping[str, Estimate]], note: str
) -> Table | None:
    """A metric by share of the training part, if there are several."""
    if len(study.fractions) < 2:
        return None
    numbers, rows = [], []
    for variant in study.variants:
        row = [name_of(variant)]
        for fraction in study.fractions:
            value = estimates.get((variant, fraction), {}).get(metric, _nothing())
            count = subjects_of(study.select(variant, fraction))
            numbers.append(_record(variant, metric, value, None, count, fraction))
            row.append(_lines(value.mean, value.sd, value.low, value.high))
        rows.append(row)
    return Table(
        name=f"{study.bundle}_fractions",
        title=f"{METRICS[metric]} by share of the training part",
        frame=pd.DataFrame(numbers),
        columns=["init", *(f"{fraction:.0%}" for fraction in study.fractions)],
        rows=rows,
        note=f"{note} The scored part is always whole; a smaller share is part of a larger one.",
    )


def _nothing() -> Estimate:
    return Estimate(math.nan, math.nan, math.nan, math.nan, 0)


def _record(
    variant: str, metric: str, value: Estimate, paper: tuple[float, float] | None, patients: int, fraction: float
) -> dict[str, Any]:
    record = {"init": variant, "metric": metric, "fraction": fraction, "mean": value.mean, "sd": value.sd}
    record |= {"ci_low": value.low, "ci_high": value.high, "count": value.count, "patients": patients}
    return {**record, "paper_mean": paper[0] if paper else math.nan, "paper_sd": paper[1] if paper else math.nan}


def age_band(age: float) -> str:
    """``60–69``; bands are those of ``AGE_BANDS``."""
    for low, high in itertools.pairwise(AGE_BANDS):
        if low <= age < high:
            return f"under {high}" if low == 0 else f"{low} and over" if high == AGE_BANDS[-1] else f"{low}–{high - 1}"
    return "unknown"


def _labels(table: pd.DataFrame, group: str) -> pd.Series:
    if group == "age":
        if "age" not in table:
            return pd.Series("unknown", index=table.index)
        return pd.to_numeric(table["age"], errors="coerce").map(lambda age: age_band(age) if age == age else "unknown")
    if group not in table:
        return pd.Series("unknown", index=table.index)
    return table[group].astype("object").where(table[group].notna(), "unknown").astype(str)


def _groups(tables: Sequence[pd.DataFrame]) -> list[tuple[str, str]]:
    """Site, sex and age band with their values; a group that nobody recorded is left out."""
    result = []
    order = [age_band(low) for low in AGE_BANDS[:-1]]
    for group in ("site", "sex", "age"):
        values = {value for table in tables for value in _labels(table, group)}
        if values - {"unknown"}:
            key = {value: (value == "unknown", order.index(value) if value in order else 0, value) for value in values}
            result += [(group, value) for value in sorted(values, key=key.__getitem__)]
    return result


def _members(table: pd.DataFrame, group: str, value: str) -> pd.DataFrame:
    return table[_labels(table, group) == value]
