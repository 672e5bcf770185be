# SPDX-License-Identifier: Apache-2.0
"""What a person looks at after preparing: marks on odd volumes, a table, a contact sheet and a page to sort and click.

Pictures are drawn from small thumbnails that were made while each volume was in memory, so that none is read again.
Pillow draws them: its PNG files are the same bytes each time, which the resume test relies on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from volta_components.data.labels import SIDE_COLOURS
from volta_components.files import atomic_path, write_csv, write_text
from volta_components.templates import template_environment

THUMBNAIL = 96  # pixels a side of each of the three views
SHEET_COLUMNS, SHEET_ROWS = 4, 25
# Absolute limits beyond which a volume is marked; named in the page.
LIMITS = {
    "cut at a side": 0.005,
    "cut at the bottom": 0.35,
    "foreground at least": 0.03,
    "source spacing, mm": 3.0,
    "oblique, degrees": 20.0,
    "robust deviations": 6.0,
}
_RELATIVE = ("foreground_fraction", "mean", "snr")
_NAMES = """
subject_id session fold sex age diagnosis site marks
spacing orientation oblique_degrees shape type minimum maximum low high
foreground_fraction mean snr stripped cut cut_left cut_right cut_back cut_front cut_bottom cut_top
label_volume_mm3 source
"""
_COLUMNS = _NAMES.split()
# What one looks for; the page shows the other columns on demand.
_FIRST = ("subject_id", "session", "marks", "cut", "snr")


def thumbnail(image: np.ndarray, label: np.ndarray | None = None) -> bytes:
    """Sagittal, coronal and axial middle slice of ``[X, Y, Z]`` in [0, 1] side by side, as PNG.

    With a label map they go through its centre, labels in colour.
    """
    centre = [n // 2 for n in image.shape]
    if label is not None and label.any():
        centre = [round(float(np.mean(index))) for index in np.nonzero(label)]
    views = []
    for axis in range(3):
        flat = np.take(image, centre[axis], axis=axis).T[::-1]
        grey = np.uint8(np.round(255 * np.clip(flat, 0, 1)))
        colour = np.stack([grey] * 3, axis=-1)
        if label is not None:
            mask = np.take(label, centre[axis], axis=axis).T[::-1]
            for side, name in SIDE_COLOURS.items():
                colour[mask == side] = ImageColor.getrgb(name)
        picture = Image.fromarray(colour)
        scale = THUMBNAIL / max(picture.size)
        picture = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BILINEAR
        )
        view = Image.new("RGB", (THUMBNAIL, THUMBNAIL))
        view.paste(picture, ((THUMBNAIL - picture.width) // 2, (THUMBNAIL - picture.height) // 2))
        views.append(np.asarray(view))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(views, axis=1)).save(buffer, "PNG")
    return buffer.getvalue()


def find_marks(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What is odd about each volume: beyond an absolute limit, or far from the rest of the data set; nothing for most.

    Far is more than 6 robust deviations (1.4826 times the median absolute one) from the median, among at least 10. Rows
    are the measures of :class:`volta_components.data.preprocess.Prepared`, with its ``warnings``.
    """
    marks: list[list[str]] = [list(row.get("warnings", [])) for row in rows]
    for row, found in zip(rows, marks, strict=True):
        for side in ("left", "right", "back", "front", "top"):
            if row[f"cut_{side}"] > LIMITS["cut at a side"]:
                found.append(f"{100 * row[f'cut_{side}']:.1f} % of the foreground cut at the {side}")
        if row["cut_bottom"] > LIMITS["cut at the bottom"]:
            found.append(f"{100 * row['cut_bottom']:.0f} % of the foreground cut at the bottom")
        if row["foreground_fraction"] < LIMITS["foreground at least"]:
            found.append(f"foreground fills only {100 * row['foreground_fraction']:.1f} % of the window")
        if max(float(s) for s in row["spacing"].split("x")) > LIMITS["source spacing, mm"]:
            found.append(f"coarse source ({row['spacing']} mm)")
        if row["oblique_degrees"] > LIMITS["oblique, degrees"]:
            found.append(f"oblique by {row['oblique_degrees']:.0f} degrees")
    for name in _RELATIVE:
        values = np.array([np.nan if row.get(name) is None else float(row[name]) for row in rows])
        if np.isfinite(values).sum() < 10:
            continue
        middle = np.nanmedian(values)
        deviation = max(1.4826 * np.nanmedian(np.abs(values - middle)), 1e-3 * abs(middle), 1e-9)
        for value, found in zip(values, marks, strict=True):
            if np.isfinite(value) and abs(value - middle) / deviation > LIMITS["robust deviations"]:
                found.append(f"{name} {value:.3g} is far from the median {middle:.3g}")
    return marks


def write_contact_sheets(folder: Path, entries: Sequence[tuple[str, Path, bool]]) -> list[Path]:
    """Draw all thumbnails (caption, file, marked) on sheets of 100, marked ones framed in red.

    The first is ``contact_sheet.png``; further ones are numbered from 2.
    """
    per_sheet = SHEET_COLUMNS * SHEET_ROWS
    width, height = 3 * THUMBNAIL + 8, THUMBNAIL + 20
    paths = []
    for number, first in enumerate(range(0, len(entries), per_sheet), start=1):
        part = entries[first : first + per_sheet]
        columns = min(SHEET_COLUMNS, len(part))
        sheet = Image.new("RGB", (columns * width, -(-len(part) // columns) * height), (24, 24, 24))
        draw = ImageDraw.Draw(sheet)
        for i, (caption, path, marked) in enumerate(part):
            x, y = i % columns * width, i // columns * height
            with Image.open(path) as picture:
                sheet.paste(picture, (x + 4, y + 16))
            draw.text((x + 5, y + 3), caption, fill=(255, 120, 100) if marked else (220, 220, 220))
            if marked:
                draw.rectangle((x + 2, y + 14, x + width - 4, y + height - 3), outline=(255, 60, 40), width=2)
        path = folder / ("contact_sheet.png" if number == 1 else f"contact_sheet_{number:02d}.png")
        with atomic_path(path) as temporary:
            sheet.save(temporary, "PNG")
        paths.append(path)
    return paths


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = _COLUMNS) -> None:
    """Write rows as CSV, atomically; lists are joined by semicolons, objects are JSON."""

    def text(value: Any) -> Any:
        if isinstance(value, list):
            return "; ".join(map(str, value))
        return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value

    write_csv(path, columns, ([text(row.get(column)) for column in columns] for row in rows))


def write_page(
    path: Path,
    title: str,
    summary: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    findings: Sequence[Mapping[str, Any]],
) -> None:
    """Write the QC page: one row a volume, sortable by a click on a column; needs no network.

    Thumbnails are looked for in ``thumbnails/`` beside it. A row has item, measures, ``marks`` and ``key`` of a volume.
    """
    order = [*_FIRST, *(name for name in _COLUMNS if name not in _FIRST)]
    columns = [column for column in order if any(row.get(column) not in (None, "", []) for row in rows)]
    template = template_environment("volta_components.data", is_html=True).get_template("qc.html.jinja")
    write_text(
        path,
        template.render(
            title=title,
            summary=summary,
            limits=LIMITS,
            columns=columns,
            first=_FIRST,
            rows=rows,
            findings=findings,
            side_colours=SIDE_COLOURS,
        ),
    )
