# SPDX-License-Identifier: Apache-2.0
"""The command `volta3d phantom`: a BIDS data set of phantoms."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
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
from volta_components.data.phantom.labels import LabelMap, describe_label_maps, read_label_maps
from volta_components.data.phantom.render import render
from volta_components.data.phantom.scanner import Contrast
from volta_components.data.phantom.subjects import FORMAT, SESSION, Settings, draw_subject, scanner_of
from volta_components.errors import InputError
from volta_components.files import read_json, remove_partials, write_csv, write_json


def _paths(output: Path, subject_id: str) -> tuple[Path, Path, Path, Path]:
    """T1w image, label map, sessions table and sidecar of a subject; the sidecar is written last."""
    anat = Path(subject_id) / SESSION / "anat"
    stem = f"{subject_id}_{SESSION}"
    return (
        output / anat / f"{stem}_T1w.nii.gz",
        output / LABELS_FOLDER / anat / f"{stem}_desc-hippocampus_dseg.nii.gz",
        output / subject_id / f"{subject_id}_sessions.tsv",
        output / anat / f"{stem}_T1w.json",
    )


def _finished(output: Path, subject_id: str) -> bool:
    return all(path.is_file() for path in _paths(output, subject_id))


def _anatomy(settings: Settings, name: str, paths: Mapping[str, str]) -> Anatomy:
    return load_head(name, paths[name]) if name else load_template(settings.spacing)


def write_subject(output: str | os.PathLike[str], settings: Settings, number: int, paths: Mapping[str, str]) -> None:
    """Render one subject and write its files, each whole or not at all.

    Args:
        output: folder of the data set.
        settings: the cohort's.
        number: the subject's.
        paths: label maps by the names of anatomies; empty for the template.
    """
    subject = draw_subject(settings, number)
    anatomy = _anatomy(settings, subject.anatomy, paths)
    scanner = scanner_of(settings, subject, not isinstance(anatomy, Head) or anatomy.has_outside)
    made = render(subject, anatomy, settings.spacing, scanner)
    image, labels, sessions, sidecar = _paths(Path(output), settings.subject_id(number))
    write_nifti(image, made.image, made.affine)
    write_nifti(labels, made.labels, made.affine)
    write_csv(sessions, ("session_id", "age", "diagnosis"), [(SESSION, subject.age, subject.diagnosis)], "\t")
    content = {
        "Modality": "MR",
        "SkullStripped": scanner.mask != "head",
        "Phantom": {"generator": f"volta3d phantom {__version__}", **made.truth},
    }
    write_json(sidecar, content)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the parent winds up, its workers finish


def _run(output: Path, settings: Settings, numbers: list[int], workers: int, paths: Mapping[str, str]) -> None:
    """Make subjects, in this process or in several."""
    bar = tqdm(total=len(numbers), desc="phantoms", unit="subject")
    with bar:
        if workers == 1 or len(numbers) < 3:
            for number in numbers:
                write_subject(output, settings, number, paths)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(numbers)), mp_context=context, initializer=_start_worker)
        try:
            # In order of the anatomies: a worker keeps the last ones in memory.
            numbers = sorted(numbers, key=lambda number: draw_subject(settings, number).anatomy)
            futures: list[Future[None]] = [
                pool.submit(write_subject, output, settings, number, paths) for number in numbers
            ]
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BrokenProcessPool as error:
            raise InputError(
                f"{output}: a worker process was killed, probably for want of memory; give fewer --workers than "
                f"{workers} (about 1 GB each) and start the command again: finished subjects are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _claim(output: Path, settings: Settings, maps: Sequence[LabelMap]) -> None:
    """Make sure that an output folder is new, or holds a cohort of the same parameters.

    Raises:
        InputError: if it holds something else; says what.
    """
    parameters = {**asdict(settings), "anatomies": {each.name: each.digest for each in maps}}
    wanted: dict[str, Any] = {"format": FORMAT, **parameters}
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


def phantom(
    output: str,
    subjects: int,
    seed: int = 0,
    spacing: int = 1,
    first: int = 1,
    prefix: str = "PH",
    sites: int = 3,
    ad_share: float = 0.5,
    effect_sex: float = Settings.effect_sex,
    effect_age: float = Settings.effect_age,
    effect_hippocampus: float = Settings.effect_hippocampus,
    effect_ventricles: float = Settings.effect_ventricles,
    anatomies: str | None = None,
    leave_out: str | Sequence[str] | None = None,
    contrast: Contrast = "t1",
    skull_share: float = Settings.skull_share,
    variation: float = Settings.variation,
    workers: int | None = None,
) -> None:
    """Grow a BIDS data set of brain phantoms with known sex, age, diagnosis and hippocampi.

    Phantoms grow from the MNI152 template, or from a folder of label maps of real heads (--anatomies): then every
    anatomy counts as one patient, in folds, fractions and checks for leaks.

    Subject i of a seed is the same whatever --subjects, --first and --workers are. The command can be interrupted and
    started again, and goes on where it was; with more --subjects it extends the cohort.

    Args:
        output: folder of the data set.
        subjects: how many subjects.
        seed: of everything random.
        spacing: voxel size in mm: 1, 2 or 3.
        first: number of the first subject; cohorts of one seed with other numbers share nobody.
        prefix: letters that subject ids begin with: sub-PH0001.
        sites: number of sites, each with its own contrast: 1 to 3.
        ad_share: share of subjects with AD, 0 to 1; the others are CN.
        effect_sex: difference of log linear head size between men and women.
        effect_age: log volume that the ventricles gain in ten years; the hippocampi lose a third of it.
        effect_hippocampus: log volume that the hippocampi lose with AD, on average.
        effect_ventricles: log volume that the ventricles gain with AD, on average.
        anatomies: folder of label maps in FreeSurfer's numbering (aseg.mgz, aparc+aseg.mgz, SynthSeg's output) that
            heads grow from, in turn; by default the template.
        leave_out: names of anatomies that are not used, separated by commas.
        contrast: t1, or any to draw every tissue's brightness on its own; with --anatomies.
        skull_share: share of subjects with skull, 0 to 1; the others' is taken off; with --anatomies.
        variation: how far heads differ from their anatomy, 0 to 5: 1 as in one study; with --anatomies.
        workers: processes; by default one for each core.

    Raises:
        InputError: if a value is out of its range, or the folder holds something else.
    """
    maps = _label_maps(anatomies, leave_out)
    for line in describe_label_maps(maps):
        print(f"note: {line}")
    settings = Settings(
        seed=seed,
        spacing=spacing,
        sites=sites,
        ad_share=ad_share,
        prefix=str(prefix).removeprefix("sub-"),
        effect_sex=effect_sex,
        effect_age=effect_age,
        effect_hippocampus=effect_hippocampus,
        effect_ventricles=effect_ventricles,
        anatomies=tuple(each.name for each in maps),
        contrast=contrast,
        skull_share=skull_share,
        variation=variation,
    )
    for name, value in (("subjects", subjects), ("first", first), ("workers", 1 if workers is None else workers)):
        if type(value) is not int or value < 1:
            raise InputError(f"--{name} is {value!r}; give a whole number from 1")
    folder = Path(str(output)).expanduser()
    _claim(folder, settings, maps)
    numbers = range(first, first + subjects)
    missing = [number for number in numbers if not _finished(folder, settings.subject_id(number))]
    subject_folders = {path.parent for n in missing for path in _paths(folder, settings.subject_id(n))}
    remove_partials(folder, folder / LABELS_FOLDER, *subject_folders)
    _run(
        folder,
        settings,
        missing,
        joblib.cpu_count() if workers is None else workers,
        {each.name: str(each.path) for each in maps},
    )
    pattern = re.compile(rf"sub-{settings.prefix}(\d{{4,}})")
    there = sorted(int(found[1]) for path in folder.iterdir() if (found := pattern.fullmatch(path.name)))
    whole = [draw_subject(settings, number) for number in there if _finished(folder, settings.subject_id(number))]
    describe(folder, settings, whole, maps)
    images = [_paths(folder, settings.subject_id(subject.number))[:2] for subject in whole]
    write_sheet(folder / "code" / "sheet.png", images)
    grown = f" of {len(maps)} anatomies" if maps else ""
    print(
        f"{folder}: {len(whole)} phantoms{grown} of {spacing} mm ({len(missing)} new); look at {folder}/code/sheet.png"
    )


def _label_maps(folder: str | None, leave_out: str | Sequence[str] | None) -> list[LabelMap]:
    """The label maps that are used."""
    words = leave_out.split(",") if isinstance(leave_out, str) else list(leave_out or [])
    if folder is None:
        if words:
            raise InputError("--leave-out names anatomies; give their folder as --anatomies")
        return []
    return read_label_maps(Path(str(folder)).expanduser(), [word.strip() for word in words])
