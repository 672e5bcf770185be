# SPDX-License-Identifier: Apache-2.0
"""Small heads with a bright ellipsoid on each side, raw and prepared, for the tests of segmentation."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from volta_components.data.datalist import make_content
from volta_components.data.nifti import write_nifti
from volta_components.files import read_json, sha256_file, write_json

SIDE = 32
ORIENTATIONS = [
    "".join(code[i] for code, i in zip(axes, signs, strict=True))
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product((0, 1), repeat=3)
]


def head(shape: tuple[int, int, int], affine: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A head around the world's origin: volume in [0, 1] and label map, 1 at x = -7 mm, 2 (smaller) at x = +7 mm."""
    rng = np.random.default_rng(seed)
    x, y, z = np.moveaxis(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
    shift = rng.uniform(-1, 1, size=3)
    volume = 0.4 * ((x / 14) ** 2 + (y / 15) ** 2 + (z / 13) ** 2 < 1)
    volume += 0.03 * np.sin(x / 3 + shift[0]) * np.cos(y / 4 + shift[1]) * (volume > 0)
    label = np.zeros(shape, np.uint8)
    for value, centre, size in ((1, -7, 3.6), (2, 7, 3.1)):
        distance = ((x - centre - shift[0]) / size) ** 2
        distance += ((y - 2 - shift[1]) / (size + 1)) ** 2 + ((z + 1 - shift[2]) / size) ** 2
        label[distance < 1] = value
    volume[label > 0] = 0.9
    return np.clip(volume + rng.normal(scale=0.01, size=shape), 0, 1).astype(np.float32), label


def centred_affine(shape: tuple[int, int, int], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """RAS, with the world's origin in the middle of the volume."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * np.array(spacing)
    return affine


def write_scan(folder: Path, name: str, volume: np.ndarray, label: np.ndarray, affine: np.ndarray) -> dict[str, str]:
    """Write a scan and its label map; an item for them."""
    item = {"image": str(folder / f"{name}_T1w.nii.gz"), "label": str(folder / f"{name}_label.nii.gz")}
    for array, path in ((volume, item["image"]), (label, item["label"])):
        write_nifti(path, array, affine)
    return {**item, "subject_id": name}


def write_head(folder: Path) -> dict[str, str]:
    """Write a head that is no prepared volume, with its label map; an item for them."""
    affine = centred_affine((36, 40, 34))
    return write_scan(folder, "sub-01", *head((36, 40, 34), affine), affine)


def reoriented(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    """The same voxels at the same places, stored in another order."""
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(codes))))


def make_labelled(
    folder: Path,
    count: int = 10,
    folds: int = 5,
    cohort: str = "fake",
    shape: tuple[int, int, int] = (SIDE,) * 3,
    spacing: float = 1.0,
) -> Path:
    """A prepared data set of 32^3 at 1 mm with label maps, as ``volta3d prepare`` would write it."""
    # The head is as large in voxels whatever the spacing.
    voxels, affine = centred_affine(shape), centred_affine(shape, (spacing,) * 3)
    items = []
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        volume, label = head(shape, voxels, seed=number)
        volume = (volume - volume.min()) / (volume.max() - volume.min())
        subject = f"sub-{number:04d}"
        name = f"{subject}_ses-M000.nii"
        nib.save(nib.Nifti1Image(volume, affine), folder / "images" / name)
        nib.save(nib.Nifti1Image(label, affine), folder / "labels" / name)
        digest = sha256_file(folder / "images" / name)
        items.append(
            {
                "image": f"images/{name}",
                "label": f"labels/{name}",
                "subject_id": subject,
                "patient_id": subject,
                "session": "ses-M000",
                "site": "AB"[number % 2],
                "cohort": cohort,
                "sex": "FM"[number % 2],
                "diagnosis": ("CN", "AD")[number // 2 % 2],
                "age": 60.0 + number,
                "fold": number % folds,
                "source": name,
                "source_sha256": digest,
                "sha256": digest,
            }
        )
    write_json(folder / "datalist.json", make_content(cohort, [spacing] * 3, list(shape), 0, folds, items, []))
    return folder


def make_quick_start(folder: Path) -> Path:
    """The same on the grid of the bundles' ``tiny.json``: each of three folds has both sexes and diagnoses."""
    make_labelled(folder, count=24, folds=3, shape=(48, 64, 64), spacing=3.0)
    content = read_json(folder / "datalist.json")
    items = [{**item, "fold": number // 4 % 3} for number, item in enumerate(content["training"])]
    write_json(folder / "datalist.json", make_content("fake", [3.0] * 3, [48, 64, 64], 0, 3, items, []))
    return folder
