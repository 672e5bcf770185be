# SPDX-License-Identifier: Apache-2.0
"""The command ``volta3d report``: from MLflow to tables, figures and a page that needs no network."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from volta_components.errors import InputError
from volta_components.files import atomic_path, safe_cell, write_text


def report(
    output: Path | str,
    tracking_uri: str | None = None,
    masks: Mapping[str, Path | str] | None = None,
    experiments: Sequence[str] = (),
    bootstrap: int = 2000,
    seed: int = 0,
    pretraining: Sequence[Path | str] = (),
    relocate: Path | str | None = None,
) -> int:
    """Write the paper's tables and figures from finished cross-validations, and one page with all of them.

    Reads MLflow alone. Writes OUTPUT/index.html (one file that works without a network), OUTPUT/subjects.html (all
    predictions by subject), OUTPUT/tables (CSV) and OUTPUT/figures (PNG and SVG). Tables and figures of an earlier
    report in OUTPUT that this one does not have are removed.

    Args:
        output: Folder to write to.
        tracking_uri: MLflow's store; by default that of MLFLOW_TRACKING_URI, or else runs/mlruns.db.
        masks: Hippocampus masks of other tools, for a row of Table III each. A folder has label maps SCAN.nii.gz with
            left = 1 and right = 2, or FreeSurfer's SCAN/mri/aseg.mgz.
        experiments: Only these experiments of MLflow; all by default.
        bootstrap: Number of bootstrap samples.
        seed: Seed of the bootstrap.
        pretraining: Folders of the pretraining, for a section of its own: its run (with mlruns.db) and its evaluation
            (with probes.json). A pretraining in the same store is found without it.
        relocate: Where MLflow's artifacts are now, if they were moved. Beside the database they are found without it.

    Returns:
        0, or 1 if a combination of init, fold and fraction has no finished run: a cross-validation that is not
        complete. Combinations are of those that were planned and those that have runs. A task without any runs is named
        in the report; this is not a failure.

    Raises:
        InputError: if the store is missing or has no finished runs, artifacts are not where they should be, or masks
            cannot be used.
    """
    if bootstrap < 100:
        raise InputError(f"--bootstrap {bootstrap}: at least 100 samples")
    tools = {name: Path(folder) for name, folder in (masks or {}).items()}
    # Here, since they import torch and pandas: help and mistakes should not wait for it.
    from volta_components.crossval.store import tracking_address
    from volta_components.report.page import render, render_subjects
    from volta_components.report.paper import TASKS
    from volta_components.report.pretraining import describe_pretraining
    from volta_components.report.sections import make_sections
    from volta_components.report.store import Store, read_studies
    from volta_components.report.tables import made_table, run_table

    uri = tracking_address(tracking_uri, Path("runs"))
    store = Store(uri, None if relocate is None else Path(relocate))
    studies = read_studies(store, list(experiments) or None)
    if tools and not any(study.kind == "segmentation" for study in studies):
        raise InputError(f"--masks: {uri} has no finished segmentation runs to compare them with")
    root = Path(output)
    encoders = {run.tags.get("encoder_sha256", "") for study in studies for run in study.runs} - {""}
    before = describe_pretraining(store, [Path(folder) for folder in pretraining], root / "figures", encoders)
    sections = make_sections(studies, store, root, tools, bootstrap, seed)
    runs, made = run_table(studies), made_table(studies)
    for table in [
        runs,
        made,
        *(before.tables if before else []),
        *(table for section in sections for table in section.tables),
    ]:
        with atomic_path(root / "tables" / f"{table.name}.csv") as temporary:
            table.frame.map(safe_cell).rename(columns=safe_cell).to_csv(temporary, index=False)
    there = {study.bundle for study in studies}
    absent = [f"Table {task.table}, {task.short}" for bundle, task in TASKS.items() if bundle not in there]
    page = render(sections, runs, made, before, absent, root)
    earlier = root / "index.html"
    outdated = _linked_files(earlier.read_text(encoding="utf-8")) - _linked_files(page) if earlier.is_file() else set()
    write_text(root / "index.html", page)
    for name in outdated:
        (root / name).unlink(missing_ok=True)
    write_text(root / "subjects.html", render_subjects(studies))
    for section in sections:
        for line in [*section.study.alarms, *section.study.notes]:
            print(f"{section.study.bundle}: {line}", file=sys.stderr)
    if absent:
        print(f"No finished runs for {', '.join(absent)}.", file=sys.stderr)
    print(root.resolve() / "index.html")
    return int(any(study.incomplete for study in studies))


def _linked_files(page: str) -> set[str]:
    """The tables and figures that a report's page links to: all that it wrote."""
    return {html.unescape(name) for name in re.findall(r'href="((?:tables|figures)/[^"/]+)"', page)}
