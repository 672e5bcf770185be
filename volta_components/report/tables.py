# SPDX-License-Identifier: Apache-2.0
"""The report's tables: numbers for CSV files, and the same numbers as text for the page."""

from __future__ import annotations

import itertools
import math
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


@dataclass
class Table:
    """A table of the report.

    Attributes:
        name: of its CSV file.
        title: above it.
        frame: the numbers, one row for each cell of the page.
        groups: labels over columns, and how many columns each spans.
        columns: labels; those called ``paper`` are set apart.
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
        note = f"Sensitivity and specificity at {self.task.threshold or 'the threshold of each run'}. "
        note += "Here: mean ± SD over folds (n − 1), and the 95 % CI: patients resampled within folds and classes."
        if full < 1:
            note += f" The largest fraction of the training part that was run is {full:.0%}."
        return Table(
            name=f"{self.study.bundle}_main",
            title=(f"Table {self.task.table}. " if self.task.table else "") + self.task.title,
            frame=pd.DataFrame(numbers),
            groups=[("", 1), *((names[metric], 2) for metric in self.METRICS), ("scored", 2)],
            columns=["init", *[OURS, PAPER] * 3, "folds", "patients"],
            rows=rows,
            note=note,
        )

    def comparisons(self) -> Table:
        """Paired differences of AUROC between inits, on all of the training part."""
        full = self.study.fractions[-1]
        found = [self._compare(first, second, full) for first, second in itertools.combinations(self.study.variants, 2)]
        note = (
            "Bootstrap of the difference, the same patients for both inits. Holm: p of the bootstrap, corrected for "
            f"{_comparisons(found)}. "
        )
        note += (
            "DeLong: fold differences and variances added up (MLstatkit); not corrected."
            if statistics.has_delong()
            else "DeLong's test was not made: of the libraries at hand none has it (SciPy and scikit-learn do not; "
            "MLstatkit, which has, is not installed: pip install volta-components[delong])."
        )
        return _comparison_table(
            f"{self.study.bundle}_comparisons", "AUROC", [c for c in found if c], note, delong=True
        )

    def _compare(self, first: str, second: str, fraction: float) -> Comparison | None:
        runs = {(run.fold, run.seed): run for run in self.study.select(second, fraction)}
        pairs = [
            _aligned(run.table, runs[run.fold, run.seed].table, run.fold)
            for run in self.study.select(first, fraction)
            if (run.fold, run.seed) in runs
        ]
        pairs = [pair for pair in pairs if len(pair[0])]
        if not pairs:
            return None
        values, replicates, arrays = [], [], []
        for one, two, fold in pairs:
            weights = self.resamplings[fold].weights(one)
            label = one["label"].to_numpy()
            scores = one["score"].to_numpy(float), two["score"].to_numpy(float)
            values.append(float(statistics.auroc(label, scores[0]) - statistics.auroc(label, scores[1])))
            replicates.append(statistics.auroc(label, scores[0], weights) - statistics.auroc(label, scores[1], weights))
            arrays.append((label, *scores))
        means = np.mean(replicates, axis=0)
        low, high = statistics.interval(means)
        independent = len(pairs) == len({fold for *_, fold in pairs})
        return Comparison(
            first,
            second,
            float(np.mean(values)),
            low,
            high,
            statistics.bootstrap_p(means),
            len({patient for one, *_ in pairs for patient in one["patient_id"]}),
            # Several runs of one fold share their subjects and are no independent samples.
            statistics.delong(arrays) if independent else math.nan,
        )

    def fractions(self) -> Table | None:
        """Numbers of Figure 2."""
        if len(self.study.fractions) < 2:
            return None
        numbers, rows = [], []
        for variant in self.study.variants:
            row = [name_of(variant)]
            for fraction in self.study.fractions:
                value = self.estimates.get((variant, fraction), {}).get("auroc", _nothing())
                count = subjects_of(self.study.select(variant, fraction))
                numbers.append(_record(variant, "auroc", value, None, count, fraction))
                row.append(_lines(value.mean, value.sd, value.low, value.high))
            rows.append(row)
        return Table(
            name=f"{self.study.bundle}_fractions",
            title="AUROC by share of the training part",
            frame=pd.DataFrame(numbers),
            columns=["init", *(f"{fraction:.0%}" for fraction in self.study.fractions)],
            rows=rows,
            note="Mean ± SD over folds and 95 % CI. The scored fold is always whole; a smaller fraction is part of a "
            "larger one.",
        )

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
                weights = [self.resamplings[run.fold].weights(table) for run, table in chosen]
                everyone = pd.concat(tables)
                label, call = everyone["label"].to_numpy() == 1, everyone["prediction"].to_numpy() == 1
                area = float(statistics.pair_auroc(tables))
                low, high = statistics.interval(statistics.pair_auroc(tables, weights))
                shares = float(statistics.share(call, label)), float(statistics.share(~call, ~label))
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
        self.tables = {variant: _scored(study.select(variant)) for variant in study.variants} | dict(tools)
        self.resampling = Resampling([*self.tables.values()], 0, samples, seed)

    def _estimate(self, table: pd.DataFrame, metric: str) -> Estimate:
        values = table[metric].to_numpy(float)
        replicates = statistics.weighted_mean(values, self.resampling.weights(table))
        return statistics.estimate(values, replicates)

    def check_against_log(self) -> list[str]:
        """Means computed from the tables must be those that the runs logged."""
        notes = []
        for run in self.study.runs:
            for name, column in {"mean_dice": "dice", "hd95": "hd95"}.items():
                ours, logged = float(run.table[column].mean()), run.metrics.get(name)
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
            failures = "–" if table is None or "failures" not in table else str(int(table["failures"].sum()))
            rows.append([*row, failures, str(count)])
        return Table(
            name=f"{self.study.bundle}_main",
            title=(f"Table {self.task.table}. " if self.task.table else "") + self.task.title,
            frame=pd.DataFrame(numbers),
            groups=[("", 1), ("Dice", 2), ("HD95 (mm)", 2), ("scored", 2)],
            columns=["init", *[OURS, PAPER] * 2, "empty masks", "patients"],
            rows=rows,
            note="Here: mean of left and right ± SD between subjects (n − 1), and the 95 % CI: patients resampled. An "
            "empty mask has Dice 0 and no HD95: HD95 is over the scans that have one; the table below has it with a "
            "penalty as well.",
        )

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
            runs = self.study.select(variant)
            penalised = [run.metrics["hd95_with_penalty"] for run in runs if "hd95_with_penalty" in run.metrics]
            mean = float(np.mean(penalised)) if penalised else math.nan
            failures = int(table["failures"].sum()) if "failures" in table else 0
            numbers.append({**record, "failures": failures, "hd95_with_penalty": mean})
            rows.append([*row, str(failures), plus_minus(mean, math.nan)])
        return Table(
            name=f"{self.study.bundle}_sides",
            title="Left, right, and failures",
            frame=pd.DataFrame(numbers),
            groups=[("", 1), ("Dice", 2), ("HD95 (mm)", 2), ("empty masks", 2)],
            columns=["init", "left", "right", "left", "right", "count", "HD95 with penalty"],
            rows=rows,
            note=f"With penalty: a side with an empty mask counts as {self._penalty()}.",
        )

    def _penalty(self) -> str:
        values = {run.params["hd95_penalty_mm"] for run in self.study.runs if "hd95_penalty_mm" in run.params}
        return f"{float(values.pop()):.0f} mm" if len(values) == 1 else "its run's hd95_penalty_mm"

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
    """Choices made on the scored fold itself, as the paper may have done: too good, and named so."""
    names = sorted({name for run in study.runs for name in run.metrics if name.startswith("optimistic_")})
    if not names:
        return None
    shown = [name for name in names if name.removeprefix("optimistic_") in SHOWN_OPTIMISTIC]
    numbers, rows = [], []
    for variant in study.variants:
        row = [name_of(variant)]
        for name in names:
            value = statistics.estimate([run.metrics.get(name, math.nan) for run in study.select(variant)])
            numbers.append({"init": variant, "metric": name, "mean": value.mean, "sd": value.sd, "runs": value.count})
            if name in shown:
                row.append(plus_minus(value.mean, value.sd, 0 if name == "optimistic_epoch" else 2))
        rows.append(row)
    return Table(
        name=f"{study.bundle}_optimistic",
        title="Optimistic: threshold or epoch chosen on the scored fold itself",
        frame=pd.DataFrame(numbers),
        columns=["init", *(SHOWN_OPTIMISTIC[name.removeprefix("optimistic_")] for name in shown)],
        rows=rows,
        note="Too good by construction; shown because the paper does not say how it chose. Mean ± SD over runs.",
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
            study.runs, key=lambda run: (in_order({*study.variants}).index(run.variant), run.fraction, run.fold)
        ):
            tags = {key: run.tags.get(key, "") for key in keys}
            numbers.append({"bundle": study.bundle, "run": run.name, "run_id": run.run_id, "seed": run.seed, **tags})
            hashes = [(tags[key] or "–")[:12] for key in ("datalist_hash", "encoder_sha256")]
            rows.append(
                [study.bundle, run.name, *hashes, tags["code_version"] or "–", tags["leak"] or "–", run.run_id[:8]]
            )
    return Table(
        name="runs",
        title="Runs that count",
        frame=pd.DataFrame(numbers),
        columns=["bundle", "run", "datalist", "encoder", "code", "leak", "MLflow id"],
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


def _aligned(first: pd.DataFrame, second: pd.DataFrame, fold: int) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """The scans that two tables share, in the same order."""
    keys = [key for key in ("subject_id", "session") if key in first and key in second]
    one, two = (
        table.assign(_key=table[keys].astype(str).agg("_".join, axis=1)).set_index("_key") for table in (first, second)
    )
    shared = one.index.intersection(two.index)
    return one.loc[shared].reset_index(drop=True), two.loc[shared].reset_index(drop=True), fold


def _scored(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    if not runs:
        return pd.DataFrame(columns=["subject_id", "patient_id", "dice", "hd95"])
    return pd.concat([run.table.assign(fold=run.fold) for run in runs], ignore_index=True)


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
