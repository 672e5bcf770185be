# SPDX-License-Identifier: Apache-2.0
"""The report's tables: numbers for CSV files, and the same numbers as text for the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from volta_components.report import statistics
from volta_components.report.paper import METRICS, in_order, name_of
from volta_components.report.statistics import Comparison, Estimate
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
BOLD = (
    "Bold: better than every other init. In the table of paired differences, Holm's p is below 0.05, and test, mean "
    "and interval agree on which init is better."
)
INTERVALS = (
    "A bootstrap interval needs 20 patients that differ, for AUROC ten of each class; otherwise shares get the exact "
    "one (Clopper-Pearson), and other numbers none."
)
SEEDS = "Where a fold was trained with several seeds, these are averaged {} first, and count once."


@dataclass
class Table:
    """A table of the report.

    Attributes:
        name: of its CSV file.
        title: above it.
        columns: labels; those that begin with ``paper`` are set apart.
        groups: labels over columns, and how many columns each spans.
        note: below it.
        rows: texts of the page.
        numbers: rows of the CSV file, by column.
        bold: row and column of cells that are better than all others.
    """

    name: str
    title: str
    columns: list[str]
    groups: list[tuple[str, int]] = field(default_factory=list)
    note: str = ""
    rows: list[list[str]] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    bold: set[tuple[int, int]] = field(default_factory=set)

    def add(self, texts: Sequence[str], *numbers: dict[str, Any]) -> None:
        """Add a row of the page, and what the CSV file has of it."""
        self.rows.append([*texts])
        self.numbers += numbers

    @property
    def frame(self) -> pd.DataFrame:
        """What the CSV file has."""
        return pd.DataFrame(self.numbers)


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """A number as text: zero has no sign, and a minus is one."""
    if not math.isfinite(value):
        return "–"
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", "−")


def plus_minus(mean: float, sd: float, digits: int = 2) -> str:
    """``0.87 ± 0.01``."""
    return number(mean, digits) + (f" ± {number(sd, digits)}" if math.isfinite(mean) and math.isfinite(sd) else "")


def bracket(low: float, high: float, digits: int = 2) -> str:
    """``[0.81, 0.90]``."""
    known = math.isfinite(low) and math.isfinite(high)
    return f"[{number(low, digits)}, {number(high, digits)}]" if known else "–"


def cell(value: Estimate) -> str:
    """Mean and SD, and the interval, or why there is none, on a line of its own."""
    below = ""
    if math.isfinite(value.low) and math.isfinite(value.high):
        below = bracket(value.low, value.high) + (" exact" if value.interval == "exact" else "")
    elif value.interval != "bootstrap":
        below = value.interval
    return plus_minus(value.mean, value.sd) + (f"\n{below}" if below else "")


def p_text(p: float) -> str:
    """A p value, not more exact than it is."""
    return "–" if not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def subjects_of(runs: Sequence[FinishedRun]) -> int:
    """Number of patients in the scored parts of runs."""
    return len({patient for run in runs for patient in run.table["patient_id"]})


def optimistic(study: Study) -> Table | None:
    """Choices made on the scored part itself, as the paper did or may have done: too good, and named so."""
    names = sorted({name for run in study.runs for name in run.metrics if name.startswith("optimistic_")})
    if not names:
        return None
    what, why = {
        "classification": ("threshold", "Shown because the paper does not say on which subjects it chose Youden's J."),
        "segmentation": ("epoch", "Shown because the paper took the epoch that has the best Dice on its hold-out."),
    }[study.kind]
    shown = [f"optimistic_{name}" for name in SHOWN_OPTIMISTIC if f"optimistic_{name}" in names]
    table = Table(
        name=f"{study.bundle}_optimistic",
        title=f"Optimistic: the {what} chosen on the scored part itself",
        columns=["init", *(SHOWN_OPTIMISTIC[name.removeprefix("optimistic_")] for name in shown)],
        note=f"Too good by construction. {why} Mean ± SD over runs.",
    )
    for variant in study.variants:
        texts, numbers = {}, []
        for name in names:
            value = statistics.estimate([run.metrics.get(name, math.nan) for run in study.select(variant)])
            numbers.append({"init": variant, "metric": name, "mean": value.mean, "sd": value.sd, "runs": value.count})
            texts[name] = plus_minus(value.mean, value.sd, 0 if name == "optimistic_epoch" else 2)
        table.add([name_of(variant), *(texts[name] for name in shown)], *numbers)
    return table


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
    table = Table(
        name="runs",
        title="Runs that count",
        columns=["bundle", "run", "started by", "datalist", "encoder", "code", "leak", "MLflow id"],
    )
    for study in studies:
        for run in sorted(
            study.runs, key=lambda run: (study.variants.index(run.variant), run.fraction, run.fold, run.seed)
        ):
            tags = {"started_by": "hand" if run.by_hand else "crossval"}
            tags |= {key: run.tags.get(key, "") for key in keys}
            hashes = [(tags[key] or "–")[:12] for key in ("datalist_hash", "encoder_sha256")]
            rest = tags["code_version"] or "–", tags["leak"] or "–", run.run_id[:8]
            table.add(
                [study.bundle, run.name, tags["started_by"], *hashes, *rest],
                {"bundle": study.bundle, "run": run.name, "run_id": run.run_id, "seed": run.seed, **tags},
            )
    return table


def made_table(studies: Sequence[Study]) -> Table:
    """What the runs of each init were computed on, how long they took, and the commands that started them."""
    table = Table(
        name="made",
        title="Hardware, time and commands",
        columns=["bundle", "init", "runs", "hours", "GiB", "hardware", "command"],
        note="Hours: of training, added up over runs, side by side or not. GiB: memory at the peak of a run. Where a "
        "run was started by hand, its command is in MLflow.",
    )
    for study in studies:
        for variant in study.variants:
            runs = study.runs_of(variant)
            hours = sum(run.metrics.get("cost/hours", (run.ended - run.started) / 3.6e6) for run in runs)
            peak = "cost/peak_memory_gib"
            memory = max((run.metrics[peak] for run in runs if peak in run.metrics), default=math.nan)
            found = {
                what: "\n".join(sorted({run.tags[what] for run in runs if what in run.tags})) or "–"
                for what in ("hardware", "made_by")
            }
            shown = str(len(runs)), number(hours, 2), number(memory, 1)
            known = {"bundle": study.bundle, "init": variant, "runs": len(runs), "hours": hours}
            table.add(
                [study.bundle, name_of(variant), *shown, *found.values()], {**known, "peak_memory_gib": memory, **found}
            )
    return table


def compare_by(found: Sequence[Comparison]) -> str:
    """How many comparisons a correction covers, in words."""
    return "the only comparison of this table" if len(found) == 1 else f"the {len(found)} comparisons of this table"


def comparison_table(name: str, metric: str, found: list[Comparison], note: str, delong: bool = False) -> Table:
    """Paired comparisons with Holm's correction."""
    further = ["p (DeLong)"] if delong else []
    table = Table(
        name=name,
        title=f"Paired differences of {metric}",
        columns=["comparison", "difference", INTERVAL, "p", "p (Holm)", *further, "patients"],
        note=note if found else "Needs two inits that were scored on the same patients.",
    )
    for item, holm in zip(found, statistics.holm([item.p for item in found]), strict=True):
        checked = Estimate(low=item.low, high=item.high).checked(item.patients)
        text = bracket(checked.low, checked.high, 3) if checked.interval == "bootstrap" else checked.interval
        row = [f"{name_of(item.first)} − {name_of(item.second)}", number(item.difference, 3, sign=True)]
        row += [text, p_text(item.p), p_text(holm)]
        record = {"first": item.first, "second": item.second, "metric": metric, "difference": item.difference}
        record |= {"low": checked.low, "high": checked.high, "p": item.p, "p_holm": holm, "patients": item.count}
        if delong:
            row.append(p_text(item.delong))
            record["p_delong"] = item.delong
        table.add([*row, str(item.count)], record)
    return table


def main_table(
    study: Study,
    labels: Mapping[str, str],
    estimates: Mapping[str, Mapping[str, Estimate]],
    spread: str,
    scored: Mapping[str, Mapping[str, str]],
    note: str,
    best: Mapping[str, str | None],
) -> Table:
    """The paper's table: each init's numbers beside the paper's.

    Args:
        study: its runs.
        labels: of the columns, by metric.
        estimates: by init and metric.
        spread: what the SD here is over: ``folds``, ``subjects``.
        scored: the last columns, by label and init; ``patients`` among them.
        note: below the table.
        best: the init that is better than all others, by metric.
    """
    task = study.task
    words = {"folds": "± SD over folds", "subjects": "± SD of subjects", "epochs": "± SD per epoch"}
    ours, paper = f"{OURS}\n{words[spread]}", f"{PAPER}\n{words[task.spread]}" if task.paper else PAPER
    table = Table(
        name=f"{study.bundle}_main",
        title=(f"Table {task.table}. " if task.table else "") + task.title,
        columns=["init", *[ours, paper] * len(labels), *scored],
        groups=[("", 1), *((label, 2) for label in labels.values()), ("scored", len(scored))],
        note=note,
    )
    inits = in_order({*study.variants, *task.paper})
    for variant in [*inits, *(name for name in estimates if name not in inits)]:
        row, numbers, theirs = [name_of(variant)], [], task.paper.get(variant, {})
        count = int(scored["patients"].get(variant, 0))
        for metric in labels:
            value = estimates.get(variant, {}).get(metric, Estimate())
            if best.get(metric) == variant:
                table.bold.add((len(table.rows), len(row)))
            mean, sd = theirs.get(metric, (math.nan, math.nan))
            row += [cell(value), plus_minus(mean, sd)]
            record = number_record(variant, metric, value, count, study.fractions[-1])
            numbers.append({**record, "paper_mean": mean, "paper_sd": sd})
        table.add([*row, *(column.get(variant, "–") for column in scored.values())], *numbers)
    return table


def fraction_table(
    study: Study, metric: str, estimates: Mapping[tuple[str, float], Mapping[str, Estimate]], note: str
) -> Table | None:
    """A metric by share of the training part, if there are several."""
    if len(study.fractions) < 2:
        return None
    table = Table(
        name=f"{study.bundle}_fractions",
        title=f"{METRICS[metric]} by share of the training part",
        columns=["init", *(f"{fraction:.0%}" for fraction in study.fractions)],
        note=f"{note} The scored part is always whole; a smaller share is part of a larger one.",
    )
    for variant in study.variants:
        row, numbers = [name_of(variant)], []
        for fraction in study.fractions:
            value = estimates.get((variant, fraction), {}).get(metric, Estimate())
            count = subjects_of(study.select(variant, fraction))
            numbers.append(number_record(variant, metric, value, count, fraction))
            row.append(cell(value))
        table.add(row, *numbers)
    return table


def number_record(variant: str, metric: str, value: Estimate, patients: int, fraction: float) -> dict[str, Any]:
    """One number of a table, with what it was computed from."""
    record = {"init": variant, "metric": metric, "fraction": fraction, "mean": value.mean, "sd": value.sd}
    return record | {
        "ci_low": value.low,
        "ci_high": value.high,
        "interval": value.interval,
        "count": value.count,
        "patients": patients,
    }


def age_band(age: float) -> str:
    """``60–69``; bands are those of ``AGE_BANDS``."""
    for low, high in itertools.pairwise(AGE_BANDS):
        if low <= age < high:
            return f"under {high}" if low == 0 else f"{low} and over" if high == AGE_BANDS[-1] else f"{low}–{high - 1}"
    return "unknown"


def _labels(table: pd.DataFrame, group: str) -> pd.Series:
    if group not in table:
        return pd.Series("unknown", index=table.index)
    if group == "age":
        return pd.to_numeric(table["age"], errors="coerce").map(age_band)
    return table[group].astype("object").where(table[group].notna(), "unknown").astype(str)


def groups_of(tables: Sequence[pd.DataFrame]) -> list[tuple[str, str]]:
    """Site, sex and age band with their values; a group that nobody recorded is left out."""
    result = []
    order = [age_band(low) for low in AGE_BANDS[:-1]]
    for group in ("site", "sex", "age"):
        values = {value for table in tables for value in _labels(table, group)}
        if known := values - {"unknown"}:
            result += [(group, value) for value in [*in_order(known, order), *(values - known)]]
    return result


def members_of(table: pd.DataFrame, group: str, value: str) -> pd.DataFrame:
    """Rows of a table that belong to a group."""
    return table[_labels(table, group) == value]
