# SPDX-License-Identifier: Apache-2.0
"""The section of the report that one bundle gets: its tables, its figures and, of masks, a viewer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from volta_components.report import figures
from volta_components.report.classification_tables import ClassificationTables
from volta_components.report.masks import Case, ToolMasks, find_case, read_mask, scan_name, score_masks
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
    scored = {
        study.bundle: {name: score_masks(store, study, name, path) for name, path in tools.items()}
        for study in studies
        if study.kind == "segmentation"
    }
    folder = root / "figures"
    return [
        _segmentation(study, store, folder, scored[study.bundle], samples, seed)
        if study.bundle in scored
        else _classification(study, store, folder, samples, seed)
        for study in studies
    ]


def _classification(study: Study, store: Store, folder: Path, samples: int, seed: int) -> Section:
    tables = ClassificationTables(study, samples, seed)
    study.notes += tables.check_against_log()
    if study.bundle == "ixi_sex" and len(study.fractions) == 1:
        only = f"{study.fractions[0]:.0%}"
        study.notes.append(f"Figure 2 needs several fractions of the training part; only {only} was run.")
    pictures = [
        figures.fraction_figure(study, tables.estimates, folder),
        figures.roc_figure(study, tables.largest, folder),
        figures.reliability_figure(study, folder),
        figures.confusion_figure(study, folder),
        figures.training_figure(study, store, folder),
    ]
    made = [
        *(tables.main(), tables.comparisons(), tables.calibration(), tables.fractions()),
        *(optimistic(study), tables.breakdown()),
    ]
    return Section(study, [*filter(None, made)], [*filter(None, pictures)])


def _segmentation(
    study: Study, store: Store, folder: Path, tools: Mapping[str, ToolMasks], samples: int, seed: int
) -> Section:
    tables = SegmentationTables(study, {name: tool.scores for name, tool in tools.items()}, samples, seed)
    study.notes += tables.check_against_log()
    cases = _cases(study, store, tools)
    shown = {rank: case for rank, case in cases.items() if case.image is not None and case.truth is not None}
    for case in {case.name: case for rank, case in cases.items() if rank not in shown}.values():
        study.notes.append(f"{case.name} cannot be shown: its image or truth is neither in MLflow nor on disk.")
    volumes = tables.volumes()
    pictures = [
        figures.case_figure(study, shown, folder) if shown else None,
        figures.fraction_figure(study, tables.estimates, folder),
        figures.volume_figure(study, tables.with_volumes, folder) if volumes else None,
        figures.training_figure(study, store, folder),
    ]
    made = [
        *(tables.main(), tables.comparisons(), tables.sides(), volumes, tables.fractions()),
        *(optimistic(study), tables.breakdown()),
    ]
    return Section(study, [*filter(None, made)], [*filter(None, pictures)], _viewer(study, shown))


def _cases(study: Study, store: Store, tools: Mapping[str, ToolMasks]) -> dict[str, Case]:
    """Worst, median and best scan of the reference init; of several seeds, the lowest."""
    reference = [(run.fold, run.table) for run in study.select_one_seed(study.reference)]
    rows = [(score, name, fold) for fold, table in reference for name, score in _dice_of(table)]
    rows = sorted(row for row in rows if math.isfinite(row[0]))
    ranks = {"worst": 0, "median": (len(rows) - 1) // 2, "best": len(rows) - 1} if rows else {}
    tables = [(variant, run.table) for variant in study.variants for run in study.select_one_seed(variant)]
    tables += [(name, tool.scores) for name, tool in tools.items()]
    cases: dict[str, Case] = {}
    for rank, place in ranks.items():
        _, name, fold = rows[place]
        if name in [case.name for case in cases.values()]:
            continue
        dice = {variant: score for variant, table in tables for scan, score in _dice_of(table) if scan == name}
        case = find_case(store, study, name, fold, dice)
        if case.truth is not None:
            for key, tool in tools.items():
                if name in tool.files:
                    case.masks[key] = read_mask(tool.files[name], case.truth)
        cases[rank] = case
    return cases


def _dice_of(table: pd.DataFrame) -> list[tuple[str, float]]:
    """Name and Dice of each scan."""
    return [(scan_name(row), float(score)) for row, score in zip(table.itertuples(), table["dice"], strict=True)]


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
