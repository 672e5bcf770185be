# SPDX-License-Identifier: Apache-2.0
"""What a data set of phantoms says of itself: README, licence, tables, a sheet to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.util import montage

from volta_components._version import __version__
from volta_components.data.phantom.labels import LabelMap
from volta_components.data.phantom.subjects import SESSION, SITES, Settings, Subject
from volta_components.data.volumes import read_volume
from volta_components.files import atomic_path, write_csv, write_json, write_text
from volta_components.templates import template_environment

PARAMETERS_FILE = "code/phantom.json"
LABELS_FOLDER = "derivatives/hippocampus"
TEMPLATE_URL = "https://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009"


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
    facts = {
        "count": len(subjects),
        "version": __version__,
        "sites": settings.sites,
        "anatomies": len(maps),
        "parameters": PARAMETERS_FILE,
        "session": SESSION,
        "labels": LABELS_FOLDER,
    }
    templates = template_environment("volta_components.data")
    texts = {"README.md": "phantom_readme.md.jinja", f"{LABELS_FOLDER}/README.md": "phantom_labels_readme.md.jinja"}
    if not maps:
        texts["LICENSE"] = "phantom_license.jinja"
    for name, template in texts.items():
        write_text(output / name, templates.get_template(template).render(facts))


def write_sheet(path: Path, subjects: Sequence[tuple[Path, Path]]) -> None:
    """Write a picture of some heads, three planes each through the hippocampi, these outlined: a sheet to look at."""
    chosen = [subjects[round(place)] for place in np.linspace(0, len(subjects) - 1, min(12, len(subjects)))]
    tiles = [_tile(read_volume(image).voxels, read_volume(labels).voxels) for image, labels in chosen]
    size = [max(tile.shape[axis] for tile in tiles) for axis in (0, 1)]
    tiles = [np.pad(t, ((0, size[0] - t.shape[0]), (0, size[1] - t.shape[1]), (0, 0))) for t in tiles]
    sheet = montage(tiles, fill=[0, 0, 0], grid_shape=(math.ceil(len(tiles) / 2), 2), channel_axis=-1)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


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
