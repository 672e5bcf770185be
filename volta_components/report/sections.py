# SPDX-License-Identifier: Apache-2.0
"""The section of the report that one bundle gets: its tables, its figures and, of masks, a viewer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from volta_components.errors import InputError
from volta_components.report import figures
from volta_components.report.classification_tables import ClassificationTables
from volta_components.report.masks import Case, find_case, read_mask, scan_name, score_masks
from volta_components.report.page import Section, Viewer
from volta_components.report.paper import name_of
from volta_components.report.segmentation_tables import SegmentationTables
from volta_components.report.store import Store, Study
from volta_components.report.tables import optimistic
from volta_components.report.viewer import share_blobs, slice_viewer


def make_sections(
    studies: list[Study], store: Store, root: Path, tools: Mapping[str, Path], samples: int, seed: int
) -> list[Section]:
    """The section of each study, its figures written; ``tools`` are folders with masks of other tools, by name.

    Raises:
        InputError: if masks cannot be used.
    """
    # Masks first: what is wrong with them should be said before anything is drawn.
    scored = {study.bundle: _score_tools(study, store, tools) for study in studies if study.kind == "segmentation"}
    return [
        _segmentation(study, store, root, scored[study.bundle], samples, seed)
        if study.bundle in scored
        else _classification(study, store, root, samples, seed)
        for study in studies
    ]


def _classification(study: Study, store: Store, root: Path, samples: int, seed: int) -> Section:
    tables = ClassificationTables(study, samples, seed)
    study.notes += tables.check_against_log()
    folder = root / "figures"
    pictures = []
    if len(study.fractions) > 1:
        pictures.append(figures.fraction_figure(study, tables.estimates, folder))
    elif study.bundle == "ixi_sex":
        only = f"{study.fractions[0]:.0%}"
        study.notes.append(f"Figure 2 needs several fractions of the training part; only {only} was run.")
    full = study.fractions[-1]
    areas = {variant: found["auroc"].mean for (variant, share), found in tables.estimates.items() if share == full}
    pictures += [figures.roc_figure(study, areas, folder), figures.reliability_figure(study, folder)]
    pictures += [figures.confusion_figure(study, folder)]
    pictures += _present([figures.training_figure(study, store, folder)])
    made = [
        *(tables.main(), tables.comparisons(), tables.calibration(), tables.fractions()),
        *(optimistic(study), tables.breakdown()),
    ]
    return Section(study, _present(made), pictures)


@dataclass
class _Tool:
    """Another tool's masks: scores like the bundle's, and the files by scan."""

    scores: pd.DataFrame
    files: Mapping[str, Path]


def _score_tools(study: Study, store: Store, tools: Mapping[str, Path]) -> dict[str, _Tool]:
    result = {}
    for name, path in tools.items():
        if name in study.variants:
            raise InputError(f"--masks {name}={path}: an init has this name; choose another")
        scores, files, notes = score_masks(store, study, name, path)
        study.notes += notes
        result[name] = _Tool(scores, files)
    return result


def _segmentation(
    study: Study, store: Store, root: Path, tools: Mapping[str, _Tool], samples: int, seed: int
) -> Section:
    tables = SegmentationTables(study, {name: tool.scores for name, tool in tools.items()}, samples, seed)
    study.notes += tables.check_against_log()
    cases = _cases(study, store, tools)
    shown = {rank: case for rank, case in cases.items() if case.image is not None and case.truth is not None}
    for case in {case.name: case for rank, case in cases.items() if rank not in shown}.values():
        study.notes.append(f"{case.name} cannot be shown: its image or truth is neither in MLflow nor on disk.")
    folder = root / "figures"
    pictures = [figures.case_figure(study, shown, folder)] if shown else []
    if len(study.fractions) > 1:
        pictures.append(figures.fraction_figure(study, tables.estimates, folder))
    volumes = tables.volumes()
    if volumes is not None:
        pictures.append(figures.volume_figure(study, tables.tables, folder))
    pictures += _present([figures.training_figure(study, store, folder)])
    made = [
        *(tables.main(), tables.comparisons(), tables.sides(), volumes, tables.fractions()),
        *(optimistic(study), tables.breakdown()),
    ]
    return Section(study, _present(made), pictures, _viewer(study, shown))


def _present(items: list[Any]) -> list[Any]:
    return [item for item in items if item is not None]


def _cases(study: Study, store: Store, tools: Mapping[str, _Tool]) -> dict[str, Case]:
    """Worst, median and best scan of the reference init; of several seeds, the lowest."""
    rows = [
        (float(score), scan_name(row), run)
        for run in study.select_one_seed(study.reference)
        for row, score in zip(run.table.itertuples(), run.table["dice"], strict=True)
    ]
    rows = sorted((row for row in rows if math.isfinite(row[0])), key=lambda row: row[:2])
    ranks = {"worst": 0, "median": (len(rows) - 1) // 2, "best": len(rows) - 1} if rows else {}
    tables = [(variant, run.table) for variant in study.variants for run in study.select_one_seed(variant)]
    tables += [(name, tool.scores) for name, tool in tools.items()]
    cases: dict[str, Case] = {}
    for rank, place in ranks.items():
        _, name, run = rows[place]
        if name in [case.name for case in cases.values()]:
            continue
        dice = {
            variant: float(score)
            for variant, table in tables
            for row, score in zip(table.itertuples(), table["dice"], strict=True)
            if scan_name(row) == name
        }
        case = find_case(store, study, name, run.fold, dice)
        if case.truth is not None:
            extra = {key: read_mask(tool.files[name], case.truth) for key, tool in tools.items() if name in tool.files}
            case = replace(case, masks={**case.masks, **extra})
        cases[rank] = case
    return cases


def _viewer(study: Study, cases: Mapping[str, Case]) -> Viewer | None:
    """One page for each case and mask, median first."""
    pages = {}
    for rank in [rank for rank in ("median", "worst", "best") if rank in cases]:
        case = cases[rank]
        for variant in case.masks:
            score = f", Dice {case.scores[variant]:.2f}" if variant in case.scores else ""
            title = f"{case.name} ({rank}), {name_of(variant)}{score}"
            pages[title] = slice_viewer(case, variant)
    if not pages:
        study.notes.append("There is no slice viewer: no run kept masks together with image and truth.")
        return None
    return Viewer(*share_blobs(pages))
