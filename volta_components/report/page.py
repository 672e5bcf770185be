# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file with every figure and the slice viewer inside."""

from __future__ import annotations

import base64
import datetime
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from volta_components._version import __version__
from volta_components.data.labels import SIDES
from volta_components.report.figures import Picture
from volta_components.report.paper import name_of
from volta_components.report.pretraining import Pretraining
from volta_components.report.store import Study
from volta_components.report.tables import Table, number
from volta_components.report.viewer import AGREEMENT
from volta_components.templates import template_environment


@dataclass
class Viewer:
    """The slice viewer: HTML by title, long texts taken out, and those texts."""

    pages: dict[str, str]
    blobs: dict[str, str]


@dataclass
class Section:
    """One bundle's part of the page. The main table comes first; a segmentation has a viewer."""

    study: Study
    tables: list[Table]
    pictures: list[Picture] = field(default_factory=list)
    viewer: Viewer | None = None


def render(
    sections: list[Section], runs: Table, made: Table, pretraining: Pretraining | None, absent: list[str], root: Path
) -> str:
    """The page as text; links to CSV, PNG and SVG are relative to its folder, ``root``."""
    environment = template_environment("volta_components.report", is_html=True)
    environment.filters["embedded"] = embedded
    environment.filters["relative"] = lambda path: Path(path).relative_to(root).as_posix()
    tags = [run.tags for section in sections for run in section.study.runs]
    return environment.get_template("index.html.jinja").render(
        sections=sections,
        runs=runs,
        made=made,
        pretraining=pretraining,
        absent=absent,
        phantoms=[section.study.bundle for section in sections if section.study.phantom],
        doubts=[section for section in sections if section.study.alarms],
        missing=[(section.study.bundle, note) for section in sections for note in section.study.notes],
        data_sets=sorted({(tag.get("datalist_name", "unnamed"), tag.get("datalist_hash", "")[:12]) for tag in tags}),
        agreement=AGREEMENT,
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


def render_subjects(studies: list[Study]) -> str:
    """A page with all predictions of each subject: every task, init, fold and seed.

    The same id in two data sets is two subjects, whose headings then name the data set.
    """
    subjects: dict[tuple[str, str], dict[str, Any]] = {}
    for study in studies:
        task = study.task
        for run in sorted(study.runs, key=lambda run: (-run.fraction, study.variants.index(run.variant), run.seed)):
            for row in run.table.to_dict("records"):
                about = {"task": task.short or task.title, "init": name_of(run.variant), "fold": run.fold}
                about |= {"session": _text(row.get("session")), "training": f"{run.fraction:.0%}", "seed": run.seed}
                if study.kind == "classification":
                    classes = (task.negative, task.positive)
                    about |= {"truth": classes[row["label"]], "prediction": classes[row["prediction"]]}
                    about |= {f"P({task.positive})": number(row["score"], 3)}
                else:
                    names = {"dice_left": (3, "Dice left"), "dice_right": (3, "Dice right"), "hd95": (2, "HD95 (mm)")}
                    about |= {label: number(row.get(name, math.nan), d) for name, (d, label) in names.items()}
                    for side in SIDES:
                        pair = [row.get(f"{what}_{side}_mm3", math.nan) for what in ("volume", "true_volume")]
                        about[f"{side}, mm³ (true)"] = " (".join(number(value, 0) for value in pair) + ")"
                name, data = str(row["subject_id"]), run.tags.get("datalist_hash", "")
                label = f"{run.tags.get('datalist_name', 'unnamed')} {data[:8]}".strip()
                new = {"data": label, "facts": {}, "tasks": {}}
                subject = subjects.setdefault((name, data), new)
                subject["facts"] |= {key: text for key in ("site", "sex", "age") if (text := _text(row.get(key)))}
                subject["tasks"].setdefault(study.bundle, []).append(about)
    environment = template_environment("volta_components.report", is_html=True)
    times = Counter(name for name, _ in subjects)
    headings = {
        name if times[name] == 1 else f"{name} ({subject['data']})": subject
        for (name, _), subject in sorted(subjects.items())
    }
    return environment.get_template("subjects.html.jinja").render(subjects=headings)


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def embedded(path: Path) -> str:
    """A PNG as a ``data:`` address."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
