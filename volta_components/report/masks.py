# SPDX-License-Identifier: Apache-2.0
"""Segmentations: image, truth and masks of a scan, and masks of other tools."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.processing import resample_from_to

from volta_components.data.labels import SIDES, centre_x
from volta_components.data.layouts.common import LEFT, RIGHT
from volta_components.downstream.metrics import score_mask
from volta_components.downstream.results import PERSON_COLUMNS
from volta_components.errors import InputError
from volta_components.files import plain_cell
from volta_components.report.store import FinishedRun, Store, Study

FREESURFER = {17: LEFT, 53: RIGHT}


@dataclass
class ToolMasks:
    """Another tool's masks: scores like the bundle's, and the files by scan."""

    scores: pd.DataFrame
    files: Mapping[str, Path]


@dataclass
class Case:
    """One scan of a subject, ``<subject_id>_<session>``, with its masks and their Dice by init or tool.

    Image and truth are None where neither MLflow nor the data set's folder has them.
    """

    name: str
    image: nib.Nifti1Image | None
    truth: nib.Nifti1Image | None
    masks: dict[str, nib.Nifti1Image]
    scores: dict[str, float]


def scan_name(row: Any) -> str:
    """Subject and session of a table's row, as in file names."""
    session = getattr(row, "session", None)
    return f"{row.subject_id}_{session}" if isinstance(session, str) and session else str(row.subject_id)


def _load_first(store: Store, runs: Iterable[FinishedRun], folder: str, name: str) -> nib.Nifti1Image | None:
    """A scan's volume of ``predictions/<folder>``, from the first of the runs that has it."""
    path = next((path for run in runs for path in _places(store, run, folder, name)), None)
    return None if path is None else _load(path)


def _places(store: Store, run: FinishedRun, folder: str, name: str) -> Iterator[Path]:
    """Files of a run's volume; images and labels may be elsewhere on disk, as listed in ``paths.csv``."""
    for suffix in (".nii.gz", ".nii"):
        if path := store.artifact(run.run_id, f"predictions/{folder}/{name}{suffix}"):
            yield path
    column = {"images": "image", "labels": "label"}.get(folder)
    if column and (listing := store.artifact(run.run_id, "predictions/paths.csv")):
        for row in pd.read_csv(listing, dtype=str).map(plain_cell).itertuples():
            path = Path(str(getattr(row, column, "")))
            if scan_name(row) == name and path.is_file():
                yield path


def _load(path: Path) -> nib.Nifti1Image:
    try:
        image: Any = nib.load(path)
        return nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, gzip.BadGzipFile, ValueError) as error:
        raise InputError(f"{path}: not a readable volume ({error}); write it again") from error


def find_case(store: Store, study: Study, name: str, fold: int, scores: dict[str, float]) -> Case:
    """Image, truth and every init's mask of one scan."""
    runs = _runs_of_fold(study, fold)
    found = {variant: _load_first(store, [run], "masks", name) for variant, run in runs.items()}
    masks = {variant: mask for variant, mask in found.items() if mask is not None}
    image, truth = (_load_first(store, runs.values(), folder, name) for folder in ("images", "labels"))
    return Case(name, image, truth, masks, scores)


def _runs_of_fold(study: Study, fold: int) -> dict[str, FinishedRun]:
    """The run of each init that scored a fold; of several seeds, the lowest."""
    return {v: run for v in study.variants for run in study.select_one_seed(v) if run.fold == fold}


def score_masks(store: Store, study: Study, tool: str, folder: Path) -> ToolMasks:
    """Score another tool's label maps on the scans that the reference init was scored on; the study gets notes.

    Label maps have left = 1 and right = 2, or FreeSurfer's 17 and 53; they may be on any grid in the scans' world
    space, and are resampled (nearest) to the truth's grid, as FreeSurfer's own grid is not the scan's. Files are
    ``<scan>.nii[.gz]``, ``<scan>.mgz``, or FreeSurfer's ``<scan>/mri/aseg.mgz``, where scan is
    ``<subject_id>_<session>`` or ``<subject_id>``.

    Raises:
        InputError: if an init has the tool's name, the folder is missing, has none of the scans, or a label map cannot
            be used.
    """
    if tool in study.variants:
        raise InputError(f"--masks {tool}={folder}: an init has this name; choose another")
    if not folder.is_dir():
        raise InputError(f"--masks {tool}={folder}: no such folder")
    rows: list[dict[str, Any]] = []
    absent: list[str] = []
    no_truth: list[str] = []
    bad: list[tuple[str, str, str]] = []
    files: dict[str, Path] = {}
    for run in study.select_one_seed(study.reference):
        beside = _runs_of_fold(study, run.fold)
        for row in run.table.itertuples():
            name = scan_name(row)
            path = _find(folder, name, str(row.subject_id))
            if path is None:
                absent.append(name)
                continue
            truth = _load_first(store, beside.values(), "labels", name)
            if truth is None:
                no_truth.append(name)
                continue
            try:
                mask = read_mask(path, truth)
            except InputError as error:
                bad.append((name, str(path), str(error)))
                continue
            files[name] = path
            theirs, true = (np.asanyarray(volume.dataobj) for volume in (mask, truth))
            scores = score_mask(theirs, true, nib.affines.voxel_sizes(truth.affine))
            facts = {key: getattr(row, key) for key in PERSON_COLUMNS if hasattr(row, key)}
            rows.append({**facts, "fold": run.fold, **scores})
    if bad:
        raise InputError.many(
            f"--masks {tool}={folder}: {len(bad)} label maps cannot be used",
            bad,
            "Label maps need left = 1 and right = 2 (or FreeSurfer's 17 and 53), in the scans' world space; "
            "fix them or take them out of the folder.",
        )
    if not rows:
        expected = ", ".join((absent + no_truth)[:3])
        reason = "the truths of its scans are neither in MLflow nor on disk" if no_truth else "none of the scored scans"
        raise InputError(f"--masks {tool}={folder}: {reason}; expected files such as {expected}.nii.gz")
    if absent:
        study.notes.append(
            f"{tool} has no mask of {len(absent)} scored scans, which its row leaves out: {', '.join(absent)}."
        )
    if no_truth:
        missing = ", ".join(no_truth)
        study.notes.append(f"{tool} could not be scored on {len(no_truth)} scans without a truth: {missing}.")
    return ToolMasks(pd.DataFrame(rows), files)


def read_mask(path: Path, truth: nib.Nifti1Image) -> nib.Nifti1Image:
    """A label map with left = 1 and right = 2 on the truth's grid.

    Raises:
        InputError: if labels are others, left and right are swapped, or one label has both sides.
    """
    source = _load(path)
    values = np.rint(np.asanyarray(source.dataobj)).astype(np.int64)
    if values.ndim != 3:
        raise InputError(f"{values.ndim} axes instead of 3")
    labels = {int(value) for value in np.unique(values)}
    if labels & FREESURFER.keys():
        values = sum(side * (values == label) for label, side in FREESURFER.items())
    elif not labels <= {0, 1, 2}:
        raise InputError(f"labels {sorted(labels)[:8]}")
    left, right = (values == label for label in SIDES.values())
    if left.any() and right.any() and centre_x(left, source.affine) > centre_x(right, source.affine):
        raise InputError("left and right are swapped")
    image = nib.Nifti1Image(values.astype(np.uint8), source.affine)
    if image.shape != truth.shape or not np.allclose(image.affine, truth.affine, atol=1e-3):
        image = resample_from_to(image, (truth.shape[:3], truth.affine), order=0)
        if values.any() and not np.asanyarray(image.dataobj).any():
            raise InputError("lies outside the scan")
    mask, true = (np.asanyarray(volume.dataobj) for volume in (image, truth))
    has_right = (values == RIGHT).any()
    if not has_right and (true == LEFT).any() and ((mask == LEFT) & (true == RIGHT)).any():
        raise InputError(f"has both sides under one label; give the right one {RIGHT}")
    return image


def _find(folder: Path, name: str, subject: str) -> Path | None:
    for stem in dict.fromkeys((name, subject)):
        for pattern in ("{}.nii.gz", "{}.nii", "{}.mgz", "{}/mri/aseg.mgz", "{}/mri/aseg.nii.gz"):
            if (path := folder / pattern.format(stem)).is_file():
                return path
    return None
