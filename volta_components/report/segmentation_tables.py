# SPDX-License-Identifier: Apache-2.0
"""Tables of the segmentation task."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from volta_components.data.labels import SIDES
from volta_components.downstream.metrics import BOOTSTRAP, Resampling, interval, weighted_mean
from volta_components.report import statistics
from volta_components.report.paper import name_of
from volta_components.report.statistics import Comparison, Estimate
from volta_components.report.store import FinishedRun, Study
from volta_components.report.tables import (
    BOLD,
    INTERVALS,
    SEEDS,
    Table,
    bracket,
    cell,
    compare_by,
    comparison_table,
    fraction_table,
    groups_of,
    main_table,
    members_of,
    number,
    plus_minus,
)


class SegmentationTables:
    """Tables of a segmentation bundle's finished runs, and of other tools' masks by the tool's name."""

    METRICS = ("dice", "hd95")

    def __init__(
        self, study: Study, tools: Mapping[str, pd.DataFrame], samples: int = BOOTSTRAP, seed: int = 0
    ) -> None:
        self.study, self.task = study, study.task
        penalties = {run.params["hd95_penalty_mm"] for run in study.runs if "hd95_penalty_mm" in run.params}
        # Another tool's masks are penalised as the runs' are, if these agree.
        self.penalty = float(next(iter(penalties))) if len(penalties) == 1 else math.nan
        self.tables = {variant: _scored_table(study.select(variant)) for variant in study.variants}
        self.tables |= {name: _with_penalty(table, self.penalty) for name, table in tools.items()}
        shares = {
            (variant, fraction): _scored_table(runs)
            for variant, fraction in itertools.product(study.variants, study.fractions)
            if (runs := study.select(variant, fraction))
        }
        volumes = {f"{what}_{side}_mm3" for what in ("volume", "true_volume") for side in SIDES}
        self.with_volumes = {name: table for name, table in self.tables.items() if volumes <= {*table}}
        patients = pd.concat([table["patient_id"] for table in [*self.tables.values(), *shares.values()]])
        self.resampling = Resampling(patients, samples=samples, seed=[seed, 0])
        self.estimates = {key: self._estimates(table) for key, table in shares.items()}
        pairs = itertools.combinations(self.tables, 2)
        self.compared = [item for pair in pairs if (item := self._compare(*pair)) is not None]

    def _estimates(self, table: pd.DataFrame) -> dict[str, Estimate]:
        return {metric: self._estimate(table, metric) for metric in self.METRICS}

    def _estimate(self, table: pd.DataFrame, metric: str) -> Estimate:
        values = table[metric].to_numpy(float)
        replicates = weighted_mean(values, self.resampling.weights(table["patient_id"]))
        known = table["patient_id"][np.isfinite(values)].nunique()
        return statistics.estimate(values, replicates).checked(known)

    def check_against_log(self) -> list[str]:
        """Means computed from the tables must be those that the runs logged."""
        notes = []
        for run in self.study.runs:
            table = _with_penalty(run.table, _penalty_of(run))
            for name, column in {"mean_dice": "dice", "hd95": "hd95", "hd95_with_penalty": "hd95_with_penalty"}.items():
                ours, logged = float(table[column].mean()), run.metrics.get(name)
                if logged is not None and math.isfinite(logged) and not math.isclose(logged, ours, abs_tol=1e-4):
                    notes.append(f"{run.name} logged {name} {logged:.4f}, but its scores give {ours:.4f}.")
        return notes

    def main(self) -> Table:
        """Table III."""
        note = (
            "Here: mean of left and right ± SD between subjects (n − 1), and the 95 % CI: patients resampled. "
            + ("The paper's SD is over epochs, so it cannot be compared. " if self.task.spread == "epochs" else "")
            + "An empty mask has Dice 0 and no HD95. HD95 is over the scans with both sides; the table of left "
            f"and right also has it with a penalty. {INTERVALS} {BOLD}"
            + (" " + SEEDS.format("for each scan") if self.study.several_seeds else "")
        )
        scored = {
            "empty masks": {variant: _count_failures(table) for variant, table in self.tables.items()},
            "patients": {variant: str(table["patient_id"].nunique()) for variant, table in self.tables.items()},
        }
        labels = {"dice": "Dice", "hd95": "HD95 (mm)"}
        estimates = {variant: self._estimates(table) for variant, table in self.tables.items()}
        best = {"dice": statistics.clear_best(self.compared)}
        return main_table(self.study, labels, estimates, "subjects", scored, note, best)

    def fractions(self) -> Table | None:
        """Dice with less data."""
        return fraction_table(self.study, "dice", self.estimates, "Mean ± SD between subjects and 95 % CI.")

    def sides(self) -> Table:
        """Left and right apart, failures and the penalty."""
        sides = Table(
            name=f"{self.study.bundle}_sides",
            title="Left, right, and failures",
            groups=[("", 1), ("Dice", 2), ("HD95 (mm)", 2), ("empty masks", 2)],
            columns=["init", "left", "right", "left", "right", "count", "HD95 with penalty"],
            note="Mean ± SD between subjects. With penalty: a side with an empty mask counts as "
            + (f"{self.penalty:.0f} mm." if math.isfinite(self.penalty) else "its run's hd95_penalty_mm."),
        )
        for variant, table in self.tables.items():
            row = [name_of(variant)]
            record: dict[str, Any] = {"init": variant}
            for column in ("dice_left", "dice_right", "hd95_left", "hd95_right"):
                value = self._estimate(table, column) if column in table else Estimate()
                row.append(plus_minus(value.mean, value.sd))
                record |= {f"{column}_mean": value.mean, f"{column}_sd": value.sd}
            penalised = self._estimate(table, "hd95_with_penalty")
            failures = float(table["failures"].sum()) if "failures" in table else math.nan
            record |= {"failures": failures, "hd95_with_penalty": penalised.mean}
            record |= {"hd95_with_penalty_low": penalised.low, "hd95_with_penalty_high": penalised.high}
            sides.add([*row, _count_failures(table), cell(penalised)], record)
        return sides

    def volumes(self) -> Table | None:
        """How far measured volumes are from the true ones: bias, limits of agreement, ICC."""
        volumes = Table(
            name=f"{self.study.bundle}_volumes",
            title="Agreement of volumes",
            groups=[("", 1), ("left", 2), ("right", 2)],
            columns=["init", *["bias (mm³)\nlimits of agreement", "ICC"] * 2],
            note="Bias: mean of measured − true volume; limits: bias ± 1.96 SD, where 95 % of scans lie (Bland and "
            "Altman). ICC(2,1): absolute agreement, 1 at best. An empty mask has a volume of 0.",
        )
        if not self.with_volumes:
            return None
        for variant, table in self.tables.items():
            if variant not in self.with_volumes:
                volumes.add([name_of(variant), *["–"] * (len(volumes.columns) - 1)])
                continue
            row = [name_of(variant)]
            record: dict[str, Any] = {"init": variant}
            for side in SIDES:
                names = [f"volume_{side}_mm3", f"true_volume_{side}_mm3"]
                measured, true = table[names].dropna().to_numpy(float).T
                bias, low, high = statistics.limits_of_agreement(measured, true)
                icc = statistics.intraclass_correlation(np.stack([measured, true], axis=1))
                row += [f"{number(bias, 0, sign=True)}\n{bracket(low, high, 0)}", number(icc)]
                record |= {f"bias_{side}_mm3": bias, f"low_{side}_mm3": low, f"high_{side}_mm3": high}
                record |= {f"icc_{side}": icc}
            volumes.add(row, record)
        return volumes

    def _compare(self, first: str, second: str) -> Comparison | None:
        one, two = (self.tables[name].groupby("patient_id")["dice"].mean() for name in (first, second))
        shared = one.index.intersection(two.index)
        if not len(shared):
            return None
        one, two = one[shared], two[shared]
        low, high = interval(weighted_mean((one - two).to_numpy(), self.resampling.weights(shared)))
        values = one.to_numpy(), two.to_numpy()
        p, rank = statistics.wilcoxon(*values), statistics.rank_difference(*values)
        return Comparison(first, second, float((one - two).mean()), low, high, p, len(shared), len(shared), rank=rank)

    def comparisons(self) -> Table:
        """Paired differences of Dice between inits, patient by patient."""
        note = (
            "Wilcoxon signed-rank test of the patients' Dice; interval of the mean difference by bootstrap. Holm: "
            f"corrected for {compare_by(self.compared)}."
        )
        return comparison_table(f"{self.study.bundle}_comparisons", "Dice", self.compared, note)

    def breakdown(self) -> Table:
        """Dice and HD95 by site, sex and age band."""
        breakdown = Table(
            name=f"{self.study.bundle}_breakdown",
            title="By site, sex and age",
            groups=[("", 2), *((name_of(variant), 2) for variant in self.tables)],
            columns=["group", "patients", *["Dice", "HD95 (mm)"] * len(self.tables)],
            note="Mean ± SD between scans, and the 95 % CI of the mean. Small groups have wide intervals; these are "
            "not corrected for the number of groups.",
        )
        for group, value in groups_of([*self.tables.values()]):
            row, numbers = [f"{group}: {value}", "–"], []
            for variant, table in self.tables.items():
                chosen = members_of(table, group, value)
                count = chosen["patient_id"].nunique()
                record: dict[str, Any] = {"group": group, "value": value, "init": variant, "patients": count}
                for metric in self.METRICS:
                    item = self._estimate(chosen, metric) if count else Estimate()
                    row.append(cell(item))
                    record |= {f"{metric}_mean": item.mean, f"{metric}_sd": item.sd}
                    record |= {f"{metric}_low": item.low, f"{metric}_high": item.high}
                if count:
                    row[1] = str(count)
                    numbers.append(record)
            breakdown.add(row, *numbers)
        return breakdown


def _penalty_of(run: FinishedRun) -> float:
    """HD95 in mm that a missing side counts as."""
    return float(run.params.get("hd95_penalty_mm", math.nan))


def _with_penalty(table: pd.DataFrame, penalty: float) -> pd.DataFrame:
    """Add ``hd95_with_penalty``: the mean of both sides, where an empty mask counts as so many mm."""
    sides = [side for side in ("hd95_left", "hd95_right") if side in table]
    if len(sides) < 2:
        return table.assign(hd95_with_penalty=math.nan)
    return table.assign(hd95_with_penalty=table[sides].fillna(penalty).mean(axis=1, skipna=False))


def _scored_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """A row for each scan of the scored parts: where a fold has several seeds, the mean over these."""
    if not runs:
        return pd.DataFrame(columns=["subject_id", "patient_id", "dice", "hd95", "hd95_with_penalty"])
    rows = pd.concat(
        [_with_penalty(run.table, _penalty_of(run)).assign(fold=run.fold) for run in runs], ignore_index=True
    )
    if len({run.fold for run in runs}) == len(runs):
        return rows
    keys = [key for key in ("fold", "subject_id", "session") if key in rows]
    measured = [
        column for column in rows if column not in {*keys, "age"} and pd.api.types.is_numeric_dtype(rows[column])
    ]
    how = {column: "mean" if column in measured else "first" for column in rows if column not in keys}
    return rows.groupby(keys, sort=False, dropna=False, as_index=False).agg(how)


def _count_failures(table: pd.DataFrame) -> str:
    """Sides without a mask, as text."""
    return "–" if "failures" not in table else f"{round(float(table['failures'].sum()), 1):g}"
