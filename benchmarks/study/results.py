# SPDX-License-Identifier: Apache-2.0
"""Results of the study: scores of the held-out anatomies with intervals, differences from scratch, learning curves.

Anatomies, their renderings, the seeds of fine-tuning and those of pretraining are all drawn with replacement, again and
again, and the same draws serve every init: differences are paired. With four anatomies such intervals are too narrow:
of what is called 95 %, about 80 to 90 % hold the true value.

*Untrained encoder* is the same network, trained by the same rule, from an encoder that has learned nothing: beside it,
the weights alone differ. *From scratch* trains the encoder like everything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from benchmarks.study.plan import TASKS, UNTRAINED, Study
from volta_components.downstream.metrics import BOOTSTRAP, Array, auroc, interval, weighted_mean
from volta_components.errors import InputError
from volta_components.files import atomic_path, write_text
from volta_components.report.figures import STYLE
from volta_components.report.paper import METRICS, colours_of, in_order, name_of
from volta_components.report.store import FinishedRun, Store, read_studies

HEAD = ["subject_id", "session"]
CURVE = {"dice": "val/mean_dice", "auroc": "val/auroc"}


@dataclass(frozen=True)
class Draws:
    """How often each bootstrap sample holds each head, fine-tuning seed and pretraining: ``[samples, ...]``."""

    heads: Array
    seeds: Array
    pretrainings: Array


def draw(anatomies: Sequence[str], seeds: int, pretrainings: int, samples: int = BOOTSTRAP, seed: int = 0) -> Draws:
    """Draw anatomies; of each one drawn, as many of its renderings as it has; seeds; pretrainings.

    Args:
        anatomies: of each head.
        seeds: number of fine-tuning seeds.
        pretrainings: number of pretrainings.
        samples: bootstrap samples.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)

    def some(count: int) -> NDArray[np.int64]:
        return rng.multinomial(count, np.full(count, 1 / count), samples)

    names, owner = np.unique(np.asarray(anatomies), return_inverse=True)
    times = some(len(names))
    heads = np.zeros((samples, len(owner)))
    for number in range(len(names)):
        own = np.flatnonzero(owner == number)
        # An anatomy that is drawn twice has two independent draws of its renderings, which add up.
        heads[:, own] = rng.multinomial(times[:, number] * len(own), np.full(len(own), 1 / len(own)))
    return Draws(heads, some(seeds).astype(float), some(pretrainings).astype(float))


def replicates(metric: str, label: Array, scores: Array, draws: Draws) -> tuple[float, Array]:
    """The mean of a metric over pretrainings and seeds, and its bootstrap replicates.

    Args:
        metric: ``auroc``, or ``dice``: the mean over heads.
        label: of each head, ``[heads]``: 0 or 1. Only ``auroc`` looks at it.
        scores: ``[pretrainings, seeds, heads]``; one pretraining for what starts from scratch.
        draws: see ``draw``.
    """

    def measured(values: Array, weights: Array) -> Array:
        return auroc(label, values, weights) if metric == "auroc" else weighted_mean(values, weights)

    ones = np.ones(scores.shape[-1])
    value = float(np.mean([[measured(values, ones) for values in row] for row in scores]))
    found = np.array([[measured(values, draws.heads) for values in row] for row in scores])
    which = draws.pretrainings if len(scores) > 1 else np.ones((len(draws.heads), 1))
    weights = which.T[:, None] * draws.seeds.T[None]
    return value, (found * weights).sum((0, 1)) / weights.sum((0, 1))


@dataclass(frozen=True)
class Cell:
    """The runs of one init and fraction, by pretraining and seed, and what they are scored by: ``auroc``, ``dice``."""

    runs: dict[tuple[int, int], FinishedRun]
    metric: str

    @property
    def table(self) -> pd.DataFrame:
        """Of any of the runs, which all score the same heads."""
        return next(iter(self.runs.values())).table

    @property
    def column(self) -> str:
        """Where a run's table has each head's score."""
        return "score" if self.metric == "auroc" else "dice"

    def scores(self, seeds: Sequence[int], heads: pd.DataFrame) -> Array:
        """``[pretrainings, seeds, heads]``.

        Args:
            seeds: of fine-tuning.
            heads: subjects and sessions that must have been scored, in this order.

        Raises:
            InputError: if a run is missing, or has scored other heads.
        """
        rows = []
        for number in sorted({number for number, _ in self.runs}):
            rows.append([])
            for seed in seeds:
                run = self.runs.get((number, seed))
                if run is None:
                    raise InputError(f"pretraining {number}, seed {seed}: no finished run; start the study again")
                if not run.table[HEAD].equals(heads):
                    raise InputError(f"{run.name} has scored other heads than the runs beside it")
                rows[-1].append(run.table[self.column].to_numpy(float))
        return np.array(rows)


def read_cells(study: Study, store: Store, task: str) -> dict[tuple[str, float], Cell]:
    """The finished runs of a task by init and fraction.

    Raises:
        InputError: if there are none.
    """
    runs: dict[tuple[str, float], dict[tuple[int, int], FinishedRun]] = {}
    kind = "classification"
    known = dict(store.experiments)
    for number in [*range(study.size.pretrainings), UNTRAINED]:
        store.experiments = dict(known)  # which read_studies narrows
        (found,) = read_studies(store, [study.experiment(task, number)])
        kind = found.kind
        for run in found.runs:
            variant, place = (UNTRAINED + run.variant, 0) if number == UNTRAINED else (run.variant, int(number))
            runs.setdefault((variant, run.fraction), {})[place, run.seed] = run
    store.experiments = known
    return {key: Cell(of, "auroc" if kind == "classification" else "dice") for key, of in runs.items()}


def score_rows(task: str, cells: Mapping[tuple[str, float], Cell], samples: int = BOOTSTRAP) -> list[dict[str, Any]]:
    """A row for each fraction and init: value, interval, and how far it is above others.

    These are the same network from scratch (``difference``), and the same training from an untrained encoder.
    """
    rows = []
    seeds = sorted({seed for cell in cells.values() for _, seed in cell.runs})
    pretrainings = len({number for cell in cells.values() for number, _ in cell.runs})
    first = next(iter(cells.values()))
    draws = draw(first.table["patient_id"].tolist(), len(seeds), pretrainings, samples)
    label = first.table["label" if first.metric == "auroc" else "dice"].to_numpy(float)
    for fraction in sorted({share for _, share in cells}):
        here = {variant: cells[variant, fraction] for variant in in_order(v for v, share in cells if share == fraction)}
        arrays = {variant: cell.scores(seeds, first.table[HEAD]) for variant, cell in here.items()}
        found = {variant: replicates(first.metric, label, array, draws) for variant, array in arrays.items()}
        for variant, (value, values) in found.items():
            row = {"task": task, "fraction": fraction, "init": variant, "metric": first.metric, "value": value}
            row |= dict(zip(("low", "high"), interval(values), strict=True))
            for name, base in (("difference", Study.scratch(task, variant)), ("untrained", UNTRAINED + variant)):
                if base in found and variant != base:
                    row[name] = value - found[base][0]
                    ends = interval(values - found[base][1])
                    row |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
            row["runs"] = len(here[variant].runs)
            rows.append(row)
    return rows


def curves(cells: Mapping[tuple[str, float], Cell], store: Store) -> dict[tuple[str, float], tuple[Array, Array]]:
    """Epochs and mean score over all runs of the heads that the curves are of, by init and fraction."""
    found = {}
    for key, cell in cells.items():
        points = [store.history(run.run_id, CURVE[cell.metric]) for run in cell.runs.values()]
        if all(points) and len({len(one) for one in points}) == 1:
            values = np.array(points)
            found[key] = values[0, :, 0], values[:, :, 1].mean(axis=0)
    return found


def last_gain(epochs: Array, values: Array) -> float:
    """What the last quarter of a curve has gained."""
    return float(values[-1] - np.interp(0.75 * epochs[-1], epochs, values))


def last_score(epochs: Array, values: Array) -> float:
    """The last value of a curve."""
    return float(values[-1])


# What the last column of the tables says of a curve: its heading, the number and its form, a note; where people are
# held back, and where not.
OF_CURVES: dict[bool, tuple[str, Callable[[Array, Array], float], str, str]] = {
    True: (
        "held-back people",
        last_score,
        ".3f",
        "`held-back people`: the score, at the end, of people who are neither trained on nor scored; choose by it how "
        "long to train an init (`--longer`).",
    ),
    False: (
        "last quarter",
        last_gain,
        "+.3f",
        "`last quarter`: what the curve has gained over the last quarter of the epochs. The learning rate is near 0 "
        "there: a small gain alone does not say that more epochs would give no more (`--longer 4`).",
    ),
}


def score_tables(task: str, cells: Mapping[tuple[str, float], Cell]) -> list[pd.DataFrame]:
    """The scores of every head by every run, for those who would compute other intervals."""
    tables = []
    for (variant, fraction), cell in cells.items():
        kept = [*HEAD, "patient_id", *(["label"] if cell.metric == "auroc" else [])]
        for (number, seed), run in cell.runs.items():
            scores = run.table[kept].assign(score=run.table[cell.column].astype(float))
            about = {"task": task, "init": variant, "fraction": fraction, "pretraining": number, "seed": seed}
            tables.append(scores.assign(**about)[[*about, *kept, "score"]])
    return tables


def called(variant: str) -> str:
    """How an init is called in the tables and figures."""
    if not variant.startswith(UNTRAINED):
        return name_of(variant)
    return (
        name_of(variant.removeprefix(UNTRAINED))
        .replace("VolTA-3D", "Untrained encoder")
        .replace("encoder frozen", "frozen")
    )


def draw_curves(path: Path, metric: str, found: Mapping[tuple[str, float], tuple[Array, Array]]) -> None:
    """A panel for each fraction, a line for each init; dashed, from an untrained encoder."""
    fractions = sorted({fraction for _, fraction in found})
    variants = in_order({variant for variant, _ in found})
    colours = colours_of(list(dict.fromkeys(variant.removeprefix(UNTRAINED) for variant in variants)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(fractions), 2.9))
        panels = np.atleast_1d(figure.subplots(1, len(fractions), sharey=True))
        for axes, fraction in zip(panels, fractions, strict=True):
            for variant in (variant for variant in variants if (variant, fraction) in found):
                # An untrained encoder's line is that of its init, dashed.
                colour, style = colours[variant.removeprefix(UNTRAINED)], "--" if variant.startswith(UNTRAINED) else "-"
                points = found[variant, fraction]
                axes.plot(*points, style, color=colour, marker="o", markersize=2.5, label=called(variant))
            axes.set(xlabel="epoch", title=f"{fraction:.0%} of the anatomies")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        panels[0].set_ylabel(METRICS[metric])
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(3, len(labels)))
        figure.savefig(path, dpi=150, bbox_inches="tight")


def write_results(study: Study) -> Path:
    """Write ``results.md``, ``results.csv``, ``scores.csv`` and a figure of learning curves for each task.

    Their names end with ``Study.tag``.

    Returns:
        The page.

    Raises:
        InputError: if runs are missing.
    """
    store = Store(study.store)
    rows: list[dict[str, Any]] = []
    scores: list[pd.DataFrame] = []
    lines = ["# The study", "", *(__doc__ or "").split("\n\n", 1)[1].strip().splitlines()]
    about, of_curve, form, note = OF_CURVES[study.held_back]
    for task in TASKS:
        cells = read_cells(study, store, task)
        found = curves(cells, store)
        scores += score_tables(task, cells)
        metric = next(iter(cells.values())).metric
        picture = f"curves_{task}{study.tag}.png"
        draw_curves(study.root / picture, metric, found)
        ends = {key: of_curve(*points) for key, points in found.items()}
        lines += [
            "",
            f"## {task}",
            "",
            f"| anatomies | init | {METRICS[metric]} (95 %) | beside scratch | beside untrained | {about} |",
            "|---|---|---|---|---|---|",
        ]
        for row in score_rows(task, cells):
            end = ends.get((row["init"], row["fraction"]), float("nan"))
            rows.append({**row, re.sub(r"\W", "_", about): end})
            beside = [
                f"{row[name]:+.3f} ({row[f'{name}_low']:+.3f} to {row[f'{name}_high']:+.3f})" if name in row else "–"
                for name in ("difference", "untrained")
            ]
            scored = "{value:.3f} ({low:.3f} to {high:.3f})".format(**row)
            texts = (f"{row['fraction']:.0%}", called(row["init"]), scored, *beside, format(end, form))
            lines.append(f"| {' | '.join(texts)} |")
        lines += ["", f"![Score of {'held-back' if study.held_back else 'scored'} heads by epoch]({picture})"]
    lines += ["", note]
    for name, table in (("results", pd.DataFrame(rows)), ("scores", pd.concat(scores))):
        with atomic_path(study.root / f"{name}{study.tag}.csv") as temporary:
            table.to_csv(temporary, index=False)
    page = study.root / f"results{study.tag}.md"
    write_text(page, "\n".join(lines) + "\n")
    return page
