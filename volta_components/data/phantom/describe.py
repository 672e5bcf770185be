# SPDX-License-Identifier: Apache-2.0
"""What a data set of phantoms says of itself: README, licence, tables, a sheet to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from volta_components._version import __version__
from volta_components.data.phantom.labels import LabelMap
from volta_components.data.phantom.subjects import SESSION, SITES, Settings, Subject
from volta_components.data.volumes import read_volume
from volta_components.files import atomic_path, write_csv, write_json, write_text

PARAMETERS_FILE = "code/phantom.json"
LABELS_FOLDER = "derivatives/hippocampus"
TEMPLATE_URL = "https://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009"
_TEMPLATE_NOTICE = """\
The images in this data set are derived from the MNI ICBM152 2009a symmetric template, which comes with this notice:

Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property loss,
or injury to subjects or patients resulting from the use or misuse of this software package.
"""
_README = """\
# Brain phantoms

{count} synthetic T1-weighted head images of no real person. `volta3d phantom` (version {version}) made them from the
MNI ICBM152 template: random size, pose and smooth deformation, and the contrast, bias field, blur and noise of {sites}
site(s). Parameters are in `{parameters}`; the same parameters give the same images.

- `participants.tsv`: sex, age, site. `sub-*/sub-*_sessions.tsv`: age and diagnosis (CN or AD).
- `sub-*/{session}/anat/*_T1w.json`: all parameters of an image and its true volumes (mm^3), under `Phantom`.
- `{labels}`: label maps of the left (1) and right (2) hippocampus.

Sex changes the size of the head. AD shrinks the hippocampi and widens the ventricles, each head by its own severity;
age does the same, mildly. Use the images to try software. They say nothing about people.

The template's notice is in `LICENSE`.
"""
_LABELS_README = """\
# Label maps of the phantoms' hippocampi

`*_desc-hippocampus_dseg.nii.gz` is on the grid of the subject's T1w image: 1 is the left hippocampus, 2 the right one.
They are the anatomy that the image was made from, with the same warp: the exact truth, not a rater's drawing. Volumes
in mm^3 are in the sidecar of the T1w image, under `Phantom`.
"""
_HEADS_README = """\
# Heads grown from label maps

{count} synthetic head images, made by `volta3d phantom` (version {version}) from label maps of {anatomies} real heads:
random size, pose and smooth deformation, and its own simulated scanner for each: contrast between tissues, bias
field, resolution, blur, noise, skull or none. Parameters are in `{parameters}`; the same parameters and label maps give
the same images.

- `participants.tsv`: sex, age, site, and `anatomy`, the label map that a head grew from; `anatomy_id` names it by its
  voxels. **All heads of one anatomy are one patient**: `volta3d prepare` keeps them in one fold.
- `sub-*/sub-*_sessions.tsv`: age and diagnosis (CN or AD).
- `sub-*/{session}/anat/*_T1w.json`: all parameters of an image and its true volumes (mm^3), under `Phantom`.
- `{labels}`: label maps of the left (1) and right (2) hippocampus.
- `code/sheet.png`: some of the heads, to look at.

Sex changes the size of the head. AD shrinks the hippocampi and widens the ventricles, each head by its own severity;
age does the same, mildly. These changes are relative to the anatomy, and anatomies differ among themselves.

The images are derived from the label maps: the licence of the label maps also holds for them.
"""


def describe(output: Path, settings: Settings, subjects: Sequence[Subject], maps: Sequence[LabelMap]) -> None:
    """Write everything of the data set that is not one subject's."""
    generated = [{"Name": "volta3d phantom", "Version": __version__, "Description": f"Parameters: {PARAMETERS_FILE}"}]
    description: dict[str, Any] = {
        "Name": "VolTA-3D brain phantoms",
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "License": "MNI ICBM152 template: free to use, modify and redistribute with the notice in LICENSE",
        "Authors": ["VolTA-3D"],
        "Acknowledgements": "Template: Fonov et al., NeuroImage 54 (2011), by way of nilearn",
        "GeneratedBy": generated,
        "SourceDatasets": [{"URL": TEMPLATE_URL, "Version": "ICBM152 2009a nonlinear symmetric"}],
    }
    if maps:
        description |= {"License": "that of the label maps", "Acknowledgements": "see the label maps' source"}
        del description["SourceDatasets"]
    write_json(output / "dataset_description.json", description)
    derived = {
        **description,
        "Name": "Hippocampus label maps of VolTA-3D brain phantoms",
        "DatasetType": "derivative",
        "SourceDatasets": [{"URL": "../.."}],
    }
    write_json(output / LABELS_FOLDER / "dataset_description.json", derived)
    write_csv(
        output / LABELS_FOLDER / "desc-hippocampus_dseg.tsv",
        ("index", "name", "abbreviation"),
        [(0, "background", "BG"), (1, "left hippocampus", "L-HIP"), (2, "right hippocampus", "R-HIP")],
        "\t",
    )
    # Without entities in its name it holds for every label map.
    shared = {"Description": "Left and right hippocampus as the phantom was made", "SpatialReference": "orig"}
    write_json(output / LABELS_FOLDER / "desc-hippocampus_dseg.json", shared)
    participants: dict[str, Any] = {
        "sex": {"Description": "sex of the phantom", "Levels": {"F": "female", "M": "male"}},
        "age": {"Description": "age of the phantom", "Units": "year"},
        "site": {
            "Description": "simulated scanner",
            "Levels": {site: f"site {site}" for site in list(SITES)[: settings.sites]},
        },
    }
    if maps:
        participants["anatomy"] = {"Description": "label map that the head grew from"}
        participants["anatomy_id"] = {"Description": "who that is: all heads of one anatomy are one patient"}
    write_json(output / "participants.json", participants)
    sessions = {
        "age": {"Description": "age of the phantom at the session", "Units": "year"},
        "diagnosis": {
            "Description": "what the phantom's anatomy shows",
            "Levels": {"CN": "cognitively normal", "AD": "Alzheimer's disease: smaller hippocampi, wider ventricles"},
        },
    }
    write_json(output / "sessions.json", sessions)
    who = {each.name: each.patient_id for each in maps}
    rows = [
        (settings.subject_id(s.number), s.sex, s.age, s.site, *((s.anatomy, who[s.anatomy]) if maps else ()))
        for s in subjects
    ]
    write_csv(output / "participants.tsv", ("participant_id", *participants), rows, "\t")
    readme = (_HEADS_README if maps else _README).format(
        count=len(subjects),
        version=__version__,
        sites=settings.sites,
        anatomies=len(maps),
        parameters=PARAMETERS_FILE,
        session=SESSION,
        labels=LABELS_FOLDER,
    )
    write_text(output / "README.md", readme)
    write_text(output / LABELS_FOLDER / "README.md", _LABELS_README)
    if not maps:
        write_text(output / "LICENSE", _TEMPLATE_NOTICE)


def write_sheet(path: Path, subjects: Sequence[tuple[Path, Path]], most: int = 12) -> None:
    """Write a picture of some heads, three planes each through the hippocampi, these outlined: a sheet to look at."""
    chosen = [subjects[round(place)] for place in np.linspace(0, len(subjects) - 1, min(most, len(subjects)))]
    tiles = [_tile(read_volume(image).voxels, read_volume(labels).voxels) for image, labels in chosen]
    size = [max(tile.shape[axis] for tile in tiles) for axis in (0, 1)]
    tiles = [np.pad(t, ((0, size[0] - t.shape[0]), (0, size[1] - t.shape[1]), (0, 0))) for t in tiles]
    if len(tiles) % 2:
        tiles.append(np.zeros_like(tiles[0]))
    rows = [np.concatenate(tiles[place : place + 2], axis=1) for place in range(0, len(tiles), 2)]
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG")


def _tile(image: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Axial, coronal and sagittal plane of a head beside each other: ``[rows, columns, 3]``."""
    top = float(np.percentile(image[image > 0], 99)) if (image > 0).any() else 1.0
    grey = np.clip(image / top, 0, 1)
    edge = (labels > 0) & ~ndimage.binary_erosion(labels > 0)
    places = np.argwhere(labels > 0)
    middle = [round(float(c)) for c in places.mean(axis=0)] if len(places) else [n // 2 for n in image.shape]
    # The sagittal plane goes through the left hippocampus.
    left = np.argwhere(labels == 1)
    middle[0] = round(float(left[:, 0].mean())) if len(left) else middle[0]
    planes = []
    for axis in (2, 1, 0):
        plane, line, side = (np.take(volume, middle[axis], axis=axis).T[::-1] for volume in (grey, edge, labels))
        colours = np.stack([plane] * 3, axis=-1)
        colours[line & (side == 1)] = (1.0, 0.4, 0.2)
        colours[line & (side == 2)] = (0.2, 0.7, 1.0)
        planes.append(colours)
    height = max(plane.shape[0] for plane in planes)
    planes = [np.pad(plane, ((0, height - plane.shape[0]), (0, 2), (0, 0))) for plane in planes]
    tile: NDArray[np.uint8] = (np.concatenate(planes, axis=1) * 255).astype(np.uint8)
    return tile
