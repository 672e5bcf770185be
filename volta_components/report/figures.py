# SPDX-License-Identifier: Apache-2.0
"""The report's figures, each as PNG and SVG, without a display."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from volta_components.data.labels import SIDE_COLOURS, SIDES
from volta_components.downstream.pictures import coronal_slice, draw_outlines
from volta_components.files import atomic_path
from volta_components.report.masks import Case
from volta_components.report.paper import METRICS, colours_of, name_of
from volta_components.report.statistics import BINS, Estimate, limits_of_agreement
from volta_components.report.store import Store, Study
from volta_components.report.tables import number

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#8a919c",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    # The same data give the same file.
    "svg.hashsalt": "volta3d",
    "svg.fonttype": "path",
}
CURVES = {
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "val/auroc": "validation AUROC",
    "val/mean_dice": "validation Dice",
}


@dataclass(frozen=True)
class Picture:
    """A figure that was written.

    Attributes:
        png: for the eye.
        svg: for papers; None of a picture that was not drawn here.
        title: of the figure.
        caption: below it.
        inches: width that it was drawn for, so that text has the same size in all of them.
    """

    png: Path
    svg: Path | None
    title: str
    caption: str
    inches: float


def write(figure: Figure, folder: Path, name: str, title: str, caption: str) -> Picture:
    """Write a figure as PNG and SVG."""
    paths = folder / f"{name}.png", folder / f"{name}.svg"
    for path in paths:
        with atomic_path(path) as temporary, mpl.rc_context(STYLE):
            metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(temporary, dpi=150, metadata=metadata, facecolor="white")
    return Picture(*paths, title, caption, float(figure.get_figwidth()))


@mpl.rc_context(STYLE)
def fraction_figure(
    study: Study, estimates: Mapping[tuple[str, float], Mapping[str, Estimate]], folder: Path
) -> Picture | None:
    """Figure 2: AUROC or Dice against the share of the training part, if there are several.

    Bands are one SD over folds for AUROC. Dice has no folds to differ between: its bands are confidence intervals.
    """
    if len(study.fractions) < 2:
        return None
    colours = colours_of(study.variants)
    metric = "auroc" if study.kind == "classification" else "dice"
    figure = Figure(figsize=(4.9, 3.9))
    axes = figure.subplots()
    for variant in study.variants:
        known = [fraction for fraction in study.fractions if (variant, fraction) in estimates]
        values = [estimates[variant, fraction][metric] for fraction in known]
        x = 100 * np.array(known)
        mean = np.array([value.mean for value in values])
        if metric == "auroc":
            sd = np.nan_to_num([value.sd for value in values])
            low, high = mean - sd, np.minimum(mean + sd, 1)
        else:
            low, high = np.array([(value.low, value.high) for value in values]).T
        axes.fill_between(x, low, high, color=colours[variant], alpha=0.15, linewidth=0)
        axes.plot(x, mean, marker="o", markersize=4, color=colours[variant], label=name_of(variant))
    axes.set(xlabel="share of the training part (%)", ylabel=METRICS[metric], xticks=[100 * f for f in study.fractions])
    axes.legend(loc="best")
    number = "Figure 2. " if study.bundle == "ixi_sex" else ""
    band = "Mean over folds; band: ± 1 SD over folds." if metric == "auroc" else "Mean over scans; band: its 95 % CI."
    caption = f"{band} The scored part is always whole."
    title = f"{number}{METRICS[metric]} with less data"
    return write(figure, folder, f"{study.bundle}_fractions", title, caption)


@mpl.rc_context(STYLE)
def roc_figure(study: Study, estimates: Mapping[str, Mapping[str, Estimate]], folder: Path) -> Picture:
    """ROC curves: each fold thin, their vertical mean thick, with each init's AUROC."""
    colours = colours_of(study.variants)
    grid = np.linspace(0, 1, 201)
    figure, axes = _with_diagonal()
    for variant in study.variants:
        curves = []
        for run in study.select(variant):
            if run.table["label"].nunique() < 2:
                continue
            false, true, _ = roc_curve(run.table["label"], run.table["score"], drop_intermediate=False)
            axes.plot(false, true, color=colours[variant], linewidth=0.6, alpha=0.35)
            curves.append(step_at(grid, false, true))
        if curves:
            mean = np.concatenate([[0.0], np.mean(curves, axis=0)])
            label = f"{name_of(variant)}, AUROC {number(estimates[variant]['auroc'].mean)}"
            axes.plot([0.0, *grid], mean, color=colours[variant], linewidth=2, label=label)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.legend(loc="lower right")
    each = "each fold and seed" if study.several_seeds else "each fold"
    caption = f"Thin: {each}. Thick: mean sensitivity of these at each specificity."
    return write(figure, folder, f"{study.bundle}_roc", "ROC curves", caption)


@mpl.rc_context(STYLE)
def reliability_figure(study: Study, folder: Path) -> Picture:
    """How often a class is true, by its predicted probability."""
    colours = colours_of(study.variants)
    figure, axes = _with_diagonal()
    for variant in study.variants_at_largest:
        everyone = pd.concat([run.table for run in study.select(variant)])
        true, predicted = calibration_curve(everyone["label"], everyone["score"], n_bins=BINS)
        axes.plot(predicted, true, marker="o", markersize=4, color=colours[variant], label=name_of(variant))
    axes.set(xlabel="predicted probability", ylabel="share of the class", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="best")
    caption = f"Scans of all folds in {BINS} bins of equal width; on the dashed line, probabilities are frequencies."
    caption += " A scan counts once for each seed of its fold." if study.several_seeds else ""
    return write(figure, folder, f"{study.bundle}_reliability", "Reliability diagram", caption)


def _with_diagonal() -> tuple[Figure, Any]:
    """A figure with one panel and a dashed line from (0, 0) to (1, 1)."""
    figure = Figure(figsize=(4.9, 3.9))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#b5bac2", linewidth=0.8, linestyle="--")
    return figure, axes


@mpl.rc_context(STYLE)
def volume_figure(study: Study, tables: Mapping[str, pd.DataFrame], folder: Path) -> Picture:
    """Bland-Altman plots: measured minus true volume against the mean of both, by side."""
    figure = Figure(figsize=(2.9 * len(tables) + 0.4, 2.9))
    panels = np.atleast_1d(figure.subplots(1, len(tables), sharey=True, sharex=True))
    for axes, (variant, table) in zip(panels, tables.items(), strict=True):
        for side, label in SIDES.items():
            measured, true = (table[f"{what}_{side}_mm3"].to_numpy(float) for what in ("volume", "true_volume"))
            colour, marker = SIDE_COLOURS[label], "o" if side == "left" else "^"
            dots: Any = {"edgecolors": "#333", "linewidths": 0.4, "s": 22, "marker": marker}
            axes.scatter((measured + true) / 2, measured - true, color=colour, label=side, **dots)
            bias, low, high = limits_of_agreement(measured, true)
            axes.axhline(bias, color=colour, linewidth=1.4)
            for limit in (low, high):
                axes.axhline(limit, color=colour, linewidth=1, linestyle="--")
        axes.axhline(0, color="#8a919c", linewidth=0.6)
        axes.set(title=name_of(variant), xlabel="mean of both (mm³)")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    panels[0].set_ylabel("measured − true (mm³)")
    panels[0].legend(loc="best")
    caption = "Bland-Altman plot of each side's volume. Solid: mean difference. Dashed: limits of agreement."
    return write(figure, folder, f"{study.bundle}_volumes", "Agreement of volumes", caption)


def step_at(grid: NDArray[Any], false: NDArray[Any], true: NDArray[Any]) -> NDArray[Any]:
    """Sensitivity that a curve reaches at false positive rates ``grid``: the highest at or before each."""
    return np.maximum.accumulate(true)[np.searchsorted(false, grid + 1e-12, side="right") - 1]


@mpl.rc_context({**STYLE, "axes.grid": False})
def confusion_figure(study: Study, folder: Path) -> Picture:
    """Confusion matrices, added up over folds."""
    classes = [study.task.negative, study.task.positive]
    variants = study.variants_at_largest
    figure = Figure(figsize=(2.5 * len(variants) + 0.3, 2.9))
    for axes, variant in zip(np.atleast_1d(figure.subplots(1, len(variants))), variants, strict=True):
        folds = itertools.groupby(study.select(variant), key=lambda run: run.fold)
        counts = confusion([[run.table for run in runs] for _, runs in folds])
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            dark = shares[row, column] > 0.55
            text = f"{round(count, 1):g}\n{shares[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "#1d2733")
        axes.set(xticks=[0, 1], yticks=[0, 1], xticklabels=classes, yticklabels=classes, title=name_of(variant))
        axes.set(xlabel="predicted", ylabel="true" if variant == variants[0] else "")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    once = "counted once (the mean over seeds)" if study.several_seeds else "scored once"
    caption = f"Scans of all folds, each {once}, at each run's own threshold; shares are of the true class."
    return write(figure, folder, f"{study.bundle}_confusion", "Confusion matrices", caption)


def confusion(folds: Sequence[Sequence[Any]]) -> NDArray[Any]:
    """Counts ``[true class, predicted class]``, added up over folds; the tables of a fold (seeds) are averaged."""
    counts = np.zeros((2, 2))
    for tables in folds:
        for table in tables:
            place = table["label"].to_numpy(int), table["prediction"].to_numpy(int)
            np.add.at(counts, place, 1 / len(tables))
    return counts


def learning_curves(study: Study, store: Store) -> dict[str, list[tuple[str, NDArray[Any], NDArray[Any]]]]:
    """Init, epochs and values of each run's curve, by metric; the bundles log these by epoch."""
    curves: dict[str, list[tuple[str, NDArray[Any], NDArray[Any]]]] = {}
    for variant in study.variants:
        for run in study.select(variant):
            for metric in CURVES:
                if metric in run.metrics and len(points := store.history(run.run_id, metric)) > 1:
                    epochs, values = np.array(points).T
                    curves.setdefault(metric, []).append((variant, *_binned(epochs, values)))
    return curves


@mpl.rc_context(STYLE)
def training_figure(study: Study, store: Store, folder: Path) -> Picture | None:
    """Training and validation curves, one panel a metric."""
    colours = colours_of(study.variants)
    histories = learning_curves(study, store)
    if not histories:
        return None
    shown = [metric for metric in CURVES if metric in histories]
    figure = Figure(figsize=(3.3 * len(shown), 2.9))
    panels = np.atleast_1d(figure.subplots(1, len(shown)))
    for axes, metric in zip(panels, shown, strict=True):
        labelled = set()
        for variant, epochs_axis, values in histories[metric]:
            label = None if variant in labelled else name_of(variant)
            labelled.add(variant)
            # Few points are shown as such: a validation now and then.
            marker = "o" if len(values) < 15 else None
            look: Any = {"linewidth": 1, "alpha": 0.7, "marker": marker, "markersize": 2.5}
            axes.plot(epochs_axis, values, color=colours[variant], label=label, **look)
        axes.set(xlabel="epoch", title=CURVES[metric])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(loc="best")
    line = "each fold and seed" if study.several_seeds else "each fold"
    caption = f"One line for {line}, on {study.fractions[-1]:.0%} of the training part."
    if any("validation" in CURVES[metric] for metric in shown):
        inner = any(float(run.params.get("validation_fraction", 1)) > 0 for run in study.runs)
        caption += (
            " Validation is on the inner part, never the scored one."
            if inner
            else " There is no inner part: validation is on the scored one, and nothing was chosen by it."
        )
    return write(figure, folder, f"{study.bundle}_training", "Training curves", caption)


def _binned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means of neighbours, where there are more points than can be seen."""
    bins = 150
    if len(x) <= bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    sizes = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


@mpl.rc_context({**STYLE, "axes.grid": False})
def case_figure(study: Study, cases: Mapping[str, Case], folder: Path) -> Picture:
    """Figure 3: one coronal slice of the worst, median and best subject, with the truth and each mask."""
    columns = list(dict.fromkeys(name for case in cases.values() for name in case.masks))
    slices = [coronal_slice({"image": case.image, "truth": case.truth, **case.masks}) for case in cases.values()]
    side = min(2.5, 10.4 / (len(columns) + 1))
    heights = [side * aspect * plane.shape[1] / plane.shape[0] for plane, _, aspect in slices]
    figure = Figure(figsize=(side * (len(columns) + 1) + 0.4, sum(heights) + 0.1 * len(cases) + 0.4))
    axes = figure.subplots(len(cases), len(columns) + 1, squeeze=False, height_ratios=heights)
    for row, (rank, case) in enumerate(cases.items()):
        background, planes, aspect = slices[row]
        for place, name in enumerate(["truth", *columns]):
            panel = axes[row, place]
            draw_outlines(panel, background, planes.get(name), aspect)
            if row == 0:
                panel.set_title("ground truth" if name == "truth" else name_of(name))
            if place == 0:
                panel.set_ylabel(f"{rank}\n{case.name}", fontsize=8)
            elif name in case.scores:
                text = f"Dice {case.scores[name]:.2f}" if name in planes else "no mask kept"
                panel.text(0.03, 0.04, text, transform=panel.transAxes, color="white", fontsize=8, weight="bold")
    reference = name_of(study.reference)
    caption = (
        f"Coronal slice with most hippocampus; left hippocampus orange, right cyan; the left of the picture is the "
        f"subject's left. Worst, median and best by the Dice of {reference}."
    )
    title = ("Figure 3. " if study.bundle == "harp_hippocampus" else "") + "Segmentations"
    return write(figure, folder, f"{study.bundle}_cases", title, caption)
