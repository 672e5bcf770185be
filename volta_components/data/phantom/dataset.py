# SPDX-License-Identifier: Apache-2.0
"""A BIDS data set of phantoms on disk."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import torch
from tqdm import tqdm

from volta_components._version import __version__
from volta_components.data.nifti import write_nifti
from volta_components.data.phantom.anatomy import Anatomy, load_template
from volta_components.data.phantom.describe import LABELS_FOLDER, PARAMETERS_FILE, describe, write_sheet
from volta_components.data.phantom.heads import Head, load_head
from volta_components.data.phantom.labels import LabelMap
from volta_components.data.phantom.render import render
from volta_components.data.phantom.subjects import (
    FORMAT,
    SESSION,
    Settings,
    draw_subject,
    scanned_again,
    scanner_of,
    session_name,
)
from volta_components.data.pool import call_with_each
from volta_components.errors import InputError
from volta_components.files import read_json, remove_partials, write_csv, write_json


def _paths(output: Path, subject_id: str, session: str = SESSION) -> tuple[Path, Path, Path]:
    """T1w image, label map and sidecar of a scan; the sidecar is written last."""
    anat = Path(subject_id) / session / "anat"
    stem = f"{subject_id}_{session}"
    return (
        output / anat / f"{stem}_T1w.nii.gz",
        output / LABELS_FOLDER / anat / f"{stem}_desc-hippocampus_dseg.nii.gz",
        output / anat / f"{stem}_T1w.json",
    )


def _sessions_table(output: Path, subject_id: str) -> Path:
    return output / subject_id / f"{subject_id}_sessions.tsv"


def _files(output: Path, settings: Settings, number: int) -> list[Path]:
    """All files of a subject."""
    name = settings.subject_id(number)
    scans = [path for scan in range(settings.scans) for path in _paths(output, name, session_name(scan))]
    return [_sessions_table(output, name), *scans]


def _finished(output: Path, settings: Settings, number: int) -> bool:
    return all(path.is_file() for path in _files(output, settings, number))


def _anatomy(settings: Settings, name: str, paths: Mapping[str, str]) -> Anatomy:
    return load_head(name, paths[name]) if name else load_template(settings.spacing)


def write_subject(folder: Path, settings: Settings, number: int, paths: Mapping[str, str]) -> None:
    """Render one subject and write its files, each whole or not at all; ``paths`` are label maps by anatomy."""
    subject = draw_subject(settings, number)
    anatomy = _anatomy(settings, subject.anatomy, paths)
    name = settings.subject_id(number)
    rows = [(session_name(scan), subject.age, subject.diagnosis) for scan in range(settings.scans)]
    write_csv(_sessions_table(folder, name), ("session_id", "age", "diagnosis"), rows, "\t")
    for scan in range(settings.scans):
        seen, drawn = scanned_again(settings, subject, scan)
        scanner = scanner_of(drawn, seen, not isinstance(anatomy, Head) or anatomy.has_outside)
        made = render(seen, anatomy, settings.spacing, scanner, scan)
        image, labels, sidecar = _paths(folder, name, session_name(scan))
        write_nifti(image, made.image, made.affine)
        write_nifti(labels, made.labels, made.affine)
        content = {
            "Modality": "MR",
            "SkullStripped": scanner.mask != "head",
            "Phantom": {"generator": f"volta3d phantom {__version__}", **made.truth},
        }
        write_json(sidecar, content)


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes; the parent winds up, its workers finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(output: Path, settings: Settings, numbers: list[int], workers: int, paths: Mapping[str, str]) -> None:
    """Make subjects, in this process or in several."""
    if len(numbers) < 3:
        workers = 1
    if workers > 1:  # in order of the anatomies: a worker keeps the last ones in memory
        numbers = sorted(numbers, key=lambda number: draw_subject(settings, number).anatomy)
    try:
        with tqdm(total=len(numbers), desc="phantoms", unit="subject") as bar:
            make = partial(write_subject, output, settings, paths=paths)
            call_with_each(make, numbers, workers, _start_worker, bar)
    except BrokenProcessPool as error:
        raise InputError(
            f"{output}: a worker process was killed, probably because memory ran out; give fewer --workers than "
            f"{workers} (about 1 GB each) and start the command again: finished subjects are kept"
        ) from error


def _claim(output: Path, settings: Settings, maps: Sequence[LabelMap]) -> None:
    """Make sure that an output folder is new, or holds a cohort of the same parameters."""
    digests = {each.name: each.digest for each in maps}
    wanted: dict[str, Any] = {"format": FORMAT, **asdict(settings), "anatomies": digests}
    if settings.scans == 1:
        del wanted["scans"]  # folders that were made before there was a choice go on
    path = output / PARAMETERS_FILE
    if path.exists():
        found = read_json(path)
        found = found if isinstance(found, dict) else {}
        rows = [(key, f"there {found.get(key)!r}", f"asked {wanted.get(key)!r}") for key in {**wanted, **found}]
        rows = [row for row in rows if found.get(row[0]) != wanted.get(row[0])]
        if rows:
            raise InputError.many(
                f"{output} holds phantoms made with other parameters",
                rows,
                "Give another --output, the same parameters, or remove that folder.",
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not an empty folder and holds no phantom cohort; give another --output")
    write_json(path, wanted)


def make_dataset(
    folder: Path, settings: Settings, numbers: Sequence[int], maps: Sequence[LabelMap], workers: int | None
) -> tuple[int, int]:
    """Make the subjects that are missing, and everything of the data set that is not one subject's.

    Returns:
        How many subjects the data set has now, and how many of them are new.

    Raises:
        InputError: if the folder holds something else.
    """
    _claim(folder, settings, maps)
    missing = [number for number in numbers if not _finished(folder, settings, number)]
    subject_folders = {path.parent for number in missing for path in _files(folder, settings, number)}
    remove_partials(folder, folder / LABELS_FOLDER, *subject_folders)
    _run(folder, settings, missing, workers or joblib.cpu_count(), {each.name: str(each.path) for each in maps})
    pattern = re.compile(rf"sub-{settings.prefix}(\d{{4,}})")
    there = sorted(int(found[1]) for path in folder.iterdir() if (found := pattern.fullmatch(path.name)))
    whole = [draw_subject(settings, number) for number in there if _finished(folder, settings, number)]
    describe(folder, settings, whole, maps)
    images = [_paths(folder, settings.subject_id(subject.number))[:2] for subject in whole]
    write_sheet(folder / "code" / "sheet.png", images)
    return len(whole), len(missing)
