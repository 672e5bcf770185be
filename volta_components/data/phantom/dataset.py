# SPDX-License-Identifier: Apache-2.0
"""The command `volta3d phantom`: a BIDS data set of phantoms."""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
import signal
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib
import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from volta_components._version import __version__
from volta_components.data.phantom.render import render
from volta_components.data.phantom.subjects import FORMAT, SESSION, SITES, Settings, Subject, draw_subject
from volta_components.errors import InputError
from volta_components.files import atomic_path, read_json, remove_partials, write_json

"""Size of every image, mm: left-right, posterior-anterior, inferior-superior."""


"""Raised whenever the same parameters begin to give other images."""


PARAMETERS_FILE = "code/phantom.json"


LABELS_FOLDER = "derivatives/hippocampus"


TEMPLATE_URL = "https://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009"


"""The part of MNI space that is used, mm; the corners of template and velocity grid alike."""


"""Spacing of the velocity grid, mm."""


"""Middle of the template's brain, mm: what a head is scaled and turned about."""


"""The template is 145 mm wide; the mean head must leave room for larger ones in 144 mm."""


"""Least distance between brain and edge of the image, mm; as much as the step at which a brain's surface is sampled."""


"""Smoothing and amplitude of the random velocity: standard deviations, mm; the latter of each component."""


_TEMPLATE_NOTICE = """\
The images in this data set are derived from the MNI ICBM152 2009a symmetric template, which comes with this notice:

Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property loss,
or injury to subjects or patients resulting from the use or misuse of this software package.
"""


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


def _write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _save(path: Path, volume: NDArray[Any], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def write_subject(output: str | os.PathLike[str], settings: Settings, number: int) -> None:
    """Render one subject and write its files, each whole or not at all."""
    subject = draw_subject(settings, number)
    made = render(subject, settings.spacing)
    image, labels, sessions, sidecar = _paths(Path(output), settings.subject_id(number))
    _save(image, made.image, made.affine)
    _save(labels, made.labels, made.affine)
    _write_table(sessions, ("session_id", "age", "diagnosis"), [(SESSION, subject.age, subject.diagnosis)])
    content = {
        "Modality": "MR",
        "SkullStripped": True,
        "Phantom": {"generator": f"volta3d phantom {__version__}", **made.truth},
    }
    write_json(sidecar, content)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the parent winds up, its workers finish


def _run(output: Path, settings: Settings, numbers: list[int], workers: int) -> None:
    """Make subjects, in this process or in several."""
    bar = tqdm(total=len(numbers), desc="phantoms", unit="subject")
    with bar:
        if workers == 1 or len(numbers) < 3:
            for number in numbers:
                write_subject(output, settings, number)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(numbers)), mp_context=context, initializer=_start_worker)
        try:
            futures: list[Future[None]] = [pool.submit(write_subject, output, settings, number) for number in numbers]
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


def _claim(output: Path, settings: Settings) -> None:
    """Make sure that an output folder is new, or holds a cohort of the same parameters.

    Raises:
        InputError: if it holds something else; says what.
    """
    wanted: dict[str, Any] = {"format": FORMAT, **asdict(settings)}
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


_README = """\
# Brain phantoms

{count} synthetic T1-weighted head images of nobody, made by `volta3d phantom` (version {version}) from the MNI ICBM152
template: random size, pose and smooth deformation, and the contrast, bias field, blur and noise of {sites} site(s).
Parameters are in `{parameters}`; the same parameters give the same images.

- `participants.tsv`: sex, age, site. `sub-*/sub-*_sessions.tsv`: age and diagnosis (CN or AD).
- `sub-*/{session}/anat/*_T1w.json`: all parameters of an image and its true volumes (mm^3), under `Phantom`.
- `{labels}`: label maps of the left (1) and right (2) hippocampus.

Sex changes the size of the head; AD shrinks the hippocampi and widens the ventricles by a severity; age does the
same, mildly. The images are good for trying software. They say nothing about people.

The template's notice is in `LICENSE`.
"""


_LABELS_README = """\
# Label maps of the phantoms' hippocampi

`*_desc-hippocampus_dseg.nii.gz` is on the grid of the subject's T1w image: 1 is the left hippocampus, 2 the right one.
They are the anatomy that the image was made from, warped as it was: the truth, not somebody's drawing. Volumes in mm^3
are in the sidecar of the T1w image, under `Phantom`.
"""


def _describe(output: Path, settings: Settings, subjects: list[Subject]) -> None:
    """Write everything of the data set that is not one subject's."""
    generated = [{"Name": "volta3d phantom", "Version": __version__, "Description": f"Parameters: {PARAMETERS_FILE}"}]
    description = {
        "Name": "VolTA-3D brain phantoms",
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "License": "MNI ICBM152 template: free to use, modify and redistribute with the notice in LICENSE",
        "Authors": ["VolTA-3D"],
        "Acknowledgements": "Template: Fonov et al., NeuroImage 54 (2011), by way of nilearn",
        "GeneratedBy": generated,
        "SourceDatasets": [{"URL": TEMPLATE_URL, "Version": "ICBM152 2009a nonlinear symmetric"}],
    }
    write_json(output / "dataset_description.json", description)
    derived = {
        **description,
        "Name": "Hippocampus label maps of VolTA-3D brain phantoms",
        "DatasetType": "derivative",
        "SourceDatasets": [{"URL": "../.."}],
    }
    write_json(output / LABELS_FOLDER / "dataset_description.json", derived)
    _write_table(
        output / LABELS_FOLDER / "desc-hippocampus_dseg.tsv",
        ("index", "name", "abbreviation"),
        [(0, "background", "BG"), (1, "left hippocampus", "L-HIP"), (2, "right hippocampus", "R-HIP")],
    )
    # Without entities in its name it holds for every label map.
    shared = {"Description": "Left and right hippocampus as the phantom was made", "SpatialReference": "orig"}
    write_json(output / LABELS_FOLDER / "desc-hippocampus_dseg.json", shared)
    participants = {
        "sex": {"Description": "sex of the phantom", "Levels": {"F": "female", "M": "male"}},
        "age": {"Description": "age of the phantom", "Units": "year"},
        "site": {
            "Description": "simulated scanner",
            "Levels": {site: f"site {site}" for site in list(SITES)[: settings.sites]},
        },
    }
    write_json(output / "participants.json", participants)
    sessions = {
        "age": {"Description": "age of the phantom at the session", "Units": "year"},
        "diagnosis": {
            "Description": "what the phantom's anatomy shows",
            "Levels": {"CN": "cognitively normal", "AD": "Alzheimer's disease: smaller hippocampi, wider ventricles"},
        },
    }
    write_json(output / "sessions.json", sessions)
    rows = [(settings.subject_id(s.number), s.sex, s.age, s.site) for s in subjects]
    _write_table(output / "participants.tsv", ("participant_id", "sex", "age", "site"), rows)
    readme = _README.format(
        count=len(subjects),
        version=__version__,
        sites=settings.sites,
        parameters=PARAMETERS_FILE,
        session=SESSION,
        labels=LABELS_FOLDER,
    )
    labels = _LABELS_README
    texts = (("README.md", readme), (f"{LABELS_FOLDER}/README.md", labels), ("LICENSE", _TEMPLATE_NOTICE))
    for name, text in texts:
        with atomic_path(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


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
    workers: int | None = None,
) -> None:
    """Grow a BIDS data set of brain phantoms with known sex, age, diagnosis and hippocampi.

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
        workers: processes; by default one for each core.

    Raises:
        InputError: if a value is out of its range, or the folder holds something else.
    """
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
    )
    for name, value in (("subjects", subjects), ("first", first), ("workers", 1 if workers is None else workers)):
        if type(value) is not int or value < 1:
            raise InputError(f"--{name} is {value!r}; give a whole number from 1")
    folder = Path(str(output)).expanduser()
    _claim(folder, settings)
    numbers = range(first, first + subjects)
    missing = [number for number in numbers if not _finished(folder, settings.subject_id(number))]
    subject_folders = {path.parent for n in missing for path in _paths(folder, settings.subject_id(n))}
    remove_partials(folder, folder / LABELS_FOLDER, *subject_folders)
    _run(folder, settings, missing, joblib.cpu_count() if workers is None else workers)
    pattern = re.compile(rf"sub-{settings.prefix}(\d{{4,}})")
    there = sorted(int(found[1]) for path in folder.iterdir() if (found := pattern.fullmatch(path.name)))
    whole = [draw_subject(settings, number) for number in there if _finished(folder, settings.subject_id(number))]
    _describe(folder, settings, whole)
    print(f"{folder}: {len(whole)} phantoms of {spacing} mm ({len(missing)} new)")
